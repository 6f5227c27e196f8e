//! Who is at which bus, device and function, and where their BARs are.
//!
//! After each write to a header the places of all BARs are worked out anew: decode on in the function
//! and in the bridge above, the bridge's window around it, one of the host bridge's windows around
//! that. Those that changed leave the bus first, doorbells and all, then the new ones enter it, so that
//! two that change places do not meet.

use std::ops::Range;
use std::sync::Arc;

use super::config_space::{ConfigSpace, Identity};
use super::endpoint::{Endpoint, on_bus};
use super::root_port::{Effect, RootPort};
use crate::bus::Bus;

/// One device number on bus 0; every device has function 0 alone.
pub(super) enum Slot {
    HostBridge(Box<ConfigSpace>),
    Builtin(Box<Endpoint>),
    Port(Box<RootPort>),
}

/// All functions.
pub(super) struct Tree {
    /// By device number.
    pub(super) slots: Vec<Slot>,
    /// What the host bridge forwards.
    windows: [Range<u64>; 2],
    mmio: Arc<Bus>,
    /// Told the name of a device that was taken out, on the thread that brought it about and with the
    /// topology locked.
    pub(super) ejected: Box<dyn Fn(&str) + Send>,
}

/// A bus, device and function number as configuration accesses carry them: 8, 5 and 3 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bdf(pub(super) u16);

impl Bdf {
    pub(super) fn new(bus: u8, device: u8) -> Self {
        Self(u16::from(bus) << 8 | u16::from(device) << 3)
    }
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(bdf) = self;
        write!(
            f,
            "0000:{:02x}:{:02x}.{}",
            bdf >> 8,
            bdf >> 3 & 0x1f,
            bdf & 7
        )
    }
}

impl Tree {
    /// A tree with the host bridge in it.
    pub(super) fn new(windows: [Range<u64>; 2], mmio: Arc<Bus>) -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem: (0x1af4, 0x1100),
        };
        Self {
            slots: vec![Slot::HostBridge(Box::new(ConfigSpace::new(&identity, 0)))],
            windows,
            mmio,
            ejected: Box::new(|_| ()),
        }
    }

    /// Reads configuration space; all ones where nobody is.
    pub(super) fn read(&mut self, at: Bdf, offset: usize, data: &mut [u8]) {
        match self.find(at) {
            Some(Found::Bridge(config)) => config.read(offset, data),
            Some(Found::Port(port)) => port.read(offset, data),
            Some(Found::Endpoint(endpoint)) => endpoint.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space, and moves what that moves. Returns a device that was taken out, to be
    /// dropped when the topology is no longer locked.
    pub(super) fn write(&mut self, at: Bdf, offset: usize, data: &[u8]) -> Option<Box<Endpoint>> {
        let effect = match self.find(at)? {
            Found::Bridge(config) => {
                config.write(offset, data);
                Effect::None
            }
            Found::Port(port) => port.write(offset, data),
            Found::Endpoint(endpoint) => {
                endpoint.write(offset, data);
                Effect::None
            }
        };
        if offset < 0x40 || !matches!(effect, Effect::None) {
            self.place_bars();
        }
        self.follow(effect)
    }

    /// Puts a device below a port that has none; `None` where every port has one. The port that was used
    /// least: Linux overlooks a card for a second after it switched its slot off, and then takes the button's
    /// word for it, with its five seconds.
    pub(super) fn insert(&mut self, endpoint: Box<Endpoint>) -> Option<Bdf> {
        let free = self.ports().filter(|port| port.endpoint().is_none());
        let port = free.min_by_key(|port| port.insertions())?;
        port.insert(endpoint);
        Some(Bdf::new(port.secondary().unwrap_or(0), 0))
    }

    /// Ports without a device.
    pub(super) fn free_ports(&mut self) -> usize {
        self.ports()
            .filter(|port| port.endpoint().is_none())
            .count()
    }

    /// Asks the guest to let go of the device with that name; `Err` where no port has it. Returns it if it
    /// was taken out at once.
    pub(super) fn request_removal(&mut self, name: &str) -> Result<Option<Box<Endpoint>>, ()> {
        let is_it = |port: &&mut RootPort| {
            let endpoint = port.endpoint();
            endpoint.is_some_and(|endpoint| endpoint.function.name() == name)
        };
        let effect = self.ports().find(is_it).ok_or(())?.request_removal();
        Ok(self.follow(effect))
    }

    fn ports(&mut self) -> impl Iterator<Item = &mut RootPort> {
        self.slots.iter_mut().filter_map(|slot| match slot {
            Slot::Port(port) => Some(&mut **port),
            _ => None,
        })
    }

    fn follow(&mut self, effect: Effect) -> Option<Box<Endpoint>> {
        let Effect::Ejected(mut endpoint) = effect else {
            return None;
        };
        if let Some(base) = endpoint.mapped.take() {
            endpoint.function.moved(None);
            self.mmio.remove(base);
        }
        endpoint.power_on();
        (self.ejected)(endpoint.function.name());
        Some(endpoint)
    }

    /// Every device that is not a bridge; on bus 0, where nothing is found, below a port that has no bus.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = (Bdf, &Endpoint)> {
        self.slots
            .iter()
            .zip(0..)
            .filter_map(|(slot, device)| match slot {
                Slot::HostBridge(_) => None,
                Slot::Builtin(endpoint) => Some((Bdf::new(0, device), &**endpoint)),
                Slot::Port(port) => {
                    let bus = port.secondary().unwrap_or(0);
                    Some((Bdf::new(bus, 0), port.endpoint()?))
                }
            })
    }

    /// Puts BARs where the headers say they are.
    pub(super) fn place_bars(&mut self) {
        let windows = self.windows.clone();
        let mut moves = Vec::new();
        for slot in &mut self.slots {
            let (endpoint, range) = match slot {
                Slot::HostBridge(_) => continue,
                Slot::Builtin(endpoint) => {
                    let range = endpoint.decoded();
                    (&mut **endpoint, range)
                }
                Slot::Port(port) => {
                    let range = port.decoded();
                    let Some(endpoint) = port.endpoint_mut() else {
                        continue;
                    };
                    (endpoint, range)
                }
            };
            let wanted = range
                .filter(|range| {
                    windows
                        .iter()
                        .any(|w| w.start <= range.start && range.end <= w.end)
                })
                .map(|range| range.start);
            if endpoint.mapped != wanted {
                moves.push((endpoint, wanted));
            }
        }
        for (endpoint, _) in &mut moves {
            if let Some(old) = endpoint.mapped.take() {
                endpoint.function.moved(None);
                self.mmio.remove(old);
            }
        }
        for (endpoint, wanted) in moves {
            if let Some(base) = wanted {
                map(&self.mmio, endpoint, base);
            }
        }
    }

    fn find(&mut self, at: Bdf) -> Option<Found<'_>> {
        let (bus, device) = ((at.0 >> 8) as u8, usize::from(at.0 >> 3 & 0x1f));
        if at.0 & 7 != 0 {
            return None;
        }
        if bus == 0 {
            return self.slots.get_mut(device).map(|slot| match slot {
                Slot::HostBridge(config) => Found::Bridge(config),
                Slot::Builtin(endpoint) => Found::Endpoint(endpoint),
                Slot::Port(port) => Found::Port(port),
            });
        }
        self.slots.iter_mut().find_map(|slot| match slot {
            Slot::Port(port) if device == 0 && port.secondary() == Some(bus) => {
                port.reachable().map(Found::Endpoint)
            }
            _ => None,
        })
    }
}

enum Found<'a> {
    Bridge(&'a mut ConfigSpace),
    Port(&'a mut RootPort),
    Endpoint(&'a mut Endpoint),
}

/// Puts a BAR on the bus. Where something else is already it stays off it, and is tried again when
/// either moves.
fn map(mmio: &Bus, endpoint: &mut Endpoint, base: u64) {
    let function = &endpoint.function;
    match mmio.insert(base, function.bar_size(), on_bus(function)) {
        Ok(()) => {
            function.moved(Some(base));
            endpoint.mapped = Some(base);
        }
        Err(error) => {
            if !std::mem::replace(&mut endpoint.warned, true) {
                tracing::warn!(device = function.name(), %error, "the guest put a BAR on another");
            }
        }
    }
}
