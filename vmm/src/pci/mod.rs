//! The PCI Express topology of a guest, and the way to its configuration space.
//!
//! ```text
//!  bus 0 ─┬─ 00:00.0 host bridge
//!         ├─ 00:01.0 virtio-rng …            small devices of this process
//!         ├─ 00:02.0 root port ── 01:00.0    a vhost-user device, alone on its bus
//!         ├─ 00:03.0 root port ── 02:00.0    the next one
//!         └─ 00:04.0 root port ── empty      for one that is added later (slot)
//!
//!  ECAM, 0xcf8/0xcfc ─▶ access ─▶ tree ─▶ config_space of a bridge, root_port or endpoint
//!                                  └─ a BAR moved: off the bus, doorbells taken; on it again, placed
//!  MMIO in a BAR ─▶ bus ─▶ PciFunction (the virtio transport)
//! ```
//!
//! There is no firmware in the guest, so [`PciHost::finish`] does its work: bus numbers, bridge windows,
//! BARs, decode and bus master on. A guest may change all of it, or keep it.
//!
//! Threads: vCPU threads come in by `access` and by BARs. Lock order: topology, then a function's,
//! then its MSI-X table's; an access to a BAR takes the latter two alone, and an interrupt the last.
//!
//! Reference: PCI Local Bus 3.0, PCI-to-PCI Bridge 1.2, PCI Express 3.0. docs/devices/pci.md has the ids.

mod access;
mod config_space;
mod endpoint;
mod express;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod hotplug_tests;
pub(crate) mod msix;
#[cfg(test)]
mod random_tests;
mod root_port;
mod slot;
#[cfg(test)]
mod tests;
mod tree;
pub(crate) mod wiring;

use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;

use self::access::{ADDRESS_PORT, AddressPort, DATA_PORT, DataPort, Ecam, lock};
pub use self::config_space::Identity;
pub(crate) use self::endpoint::CAPABILITY_MSIX;
use self::endpoint::Endpoint;
pub use self::endpoint::{Capability, PciFunction};
use self::express::PortType;
pub use self::root_port::LIMITING_VENDOR;
use self::root_port::{RootPort, WINDOW_ALIGN};
use self::tree::{Slot, Tree};
pub use self::wiring::{DoorbellAt, Message, Vectors, Wiring, WiringError};
use crate::bus::{self, Bus};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::transport_pci::VirtioPci;
use crate::memory::layout::{ECAM_LEN, ECAM_START, MMIO32_LEN, MMIO32_START, MMIO64_LEN};

/// Device numbers of bus 0, the host bridge's included.
const MAX_DEVICES: usize = 32;

/// What the topology is built on.
pub struct PciContext {
    /// Vectors and doorbells; an `Arc<Chip>` is one.
    pub wiring: Arc<dyn Wiring>,
    /// Guest memory, for rings.
    pub memory: GuestMemoryMmap,
    /// Where BARs and ECAM go.
    pub mmio: Arc<Bus>,
    /// Where 0xcf8 and 0xcfc go.
    pub ports: Arc<Bus>,
    /// Start of the 64-bit MMIO window ([`crate::memory::layout::mmio64_start`]).
    pub mmio64_start: u64,
}

/// Why the topology could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bus 0 is full.
    #[error("cannot add {device}: bus 0 holds {} devices", MAX_DEVICES - 1)]
    Full {
        /// The device's name.
        device: String,
    },
    /// An interrupt or a doorbell could not be made.
    #[error("cannot wire {device}")]
    Wiring {
        /// The device's name.
        device: String,
        /// Why.
        #[source]
        source: WiringError,
    },
    /// No port without a device.
    #[error("cannot add {device}: no root port is free (--platform hotplug_ports=)")]
    NoFreePort {
        /// The device's name.
        device: String,
    },
    /// An address is taken.
    #[error("cannot put PCI configuration space on the bus")]
    Bus(#[from] bus::Error),
}

/// A topology under construction.
pub struct PciHost {
    context: PciContext,
    tree: Tree,
}

impl PciHost {
    /// A topology with nothing but the host bridge.
    pub fn new(context: PciContext) -> Self {
        let windows = [
            MMIO32_START..MMIO32_START + MMIO32_LEN,
            context.mmio64_start..context.mmio64_start + MMIO64_LEN,
        ];
        let tree = Tree::new(windows, Arc::clone(&context.mmio));
        Self { context, tree }
    }

    /// Adds a device to bus 0.
    pub fn add_builtin(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        self.check_room(name)?;
        let function = self.context.function(name, device)?;
        let endpoint = Endpoint::new(function, PortType::IntegratedEndpoint);
        self.tree.slots.push(Slot::Builtin(Box::new(endpoint)));
        Ok(())
    }

    /// Adds a root port of this vendor to bus 0, and the device below it.
    pub fn add_below_root_port(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        port_vendor: u16,
    ) -> Result<(), Error> {
        self.check_room(name)?;
        let function = self.context.function(name, device)?;
        let endpoint = Box::new(Endpoint::new(function, PortType::Endpoint));
        self.add_port(name, Some(endpoint), port_vendor)
    }

    /// Adds a root port of this vendor to bus 0, for a device that comes later.
    pub fn add_empty_root_port(&mut self, port_vendor: u16) -> Result<(), Error> {
        self.check_room("a root port")?;
        self.add_port("a root port", None, port_vendor)
    }

    /// Has `ejected` told the name of each device that the guest lets go of, on a vCPU thread. It must not
    /// block, nor call back.
    pub fn on_ejection(&mut self, ejected: impl Fn(&str) + Send + 'static) {
        self.tree.ejected = Box::new(ejected);
    }

    /// Assigns bus numbers, windows and BARs, and claims configuration space on the buses.
    pub fn finish(mut self) -> Result<Pci, Error> {
        self.assign();
        self.tree.place_bars();
        let tree = Arc::new(Mutex::new(self.tree));
        let address = Arc::new(AddressPort::default());
        let (mmio, ports) = (&self.context.mmio, &self.context.ports);
        mmio.insert(ECAM_START, ECAM_LEN, Arc::new(Ecam(Arc::clone(&tree))))?;
        ports.insert(ADDRESS_PORT, 1, Arc::clone(&address) as _)?;
        let data = DataPort {
            address,
            tree: Arc::clone(&tree),
        };
        ports.insert(DATA_PORT, 4, Arc::new(data))?;
        Ok(Pci {
            tree,
            context: Arc::new(self.context),
        })
    }

    fn check_room(&self, name: &str) -> Result<(), Error> {
        if self.tree.slots.len() >= MAX_DEVICES {
            return Err(Error::Full {
                device: name.to_owned(),
            });
        }
        Ok(())
    }

    fn add_port(
        &mut self,
        name: &str,
        endpoint: Option<Box<Endpoint>>,
        vendor: u16,
    ) -> Result<(), Error> {
        let number = self.tree.slots.len() as u8;
        let port = RootPort::new(vendor, number, endpoint, &*self.context.wiring);
        let port = port.map_err(|source| Error::Wiring {
            device: name.to_owned(),
            source,
        })?;
        self.tree.slots.push(Slot::Port(Box::new(port)));
        Ok(())
    }

    /// What firmware would do: devices of bus 0 from the start of the 64-bit window, each port's window
    /// after them, one bus below each port.
    fn assign(&mut self) {
        let mut next = self.context.mmio64_start;
        let mut bus = 0;
        for slot in &mut self.tree.slots {
            if let Slot::Builtin(endpoint) = slot {
                let size = endpoint.function.bar_size();
                let base = next.next_multiple_of(size);
                endpoint.assign(base);
                next = base + size;
            }
        }
        for slot in &mut self.tree.slots {
            if let Slot::Port(port) = slot {
                let base = next.next_multiple_of(WINDOW_ALIGN);
                bus += 1;
                if let Some(endpoint) = port.endpoint_mut() {
                    endpoint.assign(base);
                }
                port.assign(bus, &(base..base + WINDOW_ALIGN));
                next = base + WINDOW_ALIGN;
            }
        }
    }
}

impl PciContext {
    fn function(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<dyn PciFunction>, Error> {
        let memory = self.memory.clone();
        let function = VirtioPci::new(name, device, &*self.wiring, memory);
        Ok(function.map_err(|source| Error::Wiring {
            device: name.to_owned(),
            source,
        })?)
    }
}

/// Where a device is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device's name, such as `_disk0`.
    pub id: String,
    /// Segment, bus, device and function, such as `0000:01:00.0`.
    pub bdf: String,
}

/// A topology in use. The buses hold it too; this is the VM's own handle.
#[derive(Clone)]
pub struct Pci {
    tree: Arc<Mutex<Tree>>,
    context: Arc<PciContext>,
}

impl Pci {
    /// Every device, in the order of bus 0, with the bus number that the guest gave it.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let tree = lock(&self.tree);
        tree.endpoints()
            .map(|(bdf, endpoint)| DeviceInfo {
                id: endpoint.function.name().to_owned(),
                bdf: bdf.to_string(),
            })
            .collect()
    }
    /// Root ports without a device.
    pub fn free_ports(&self) -> usize {
        lock(&self.tree).free_ports()
    }

    /// Puts a device below a free root port, and tells the guest. Returns where the guest will find it.
    pub fn plug(&self, name: &str, device: Box<dyn VirtioDevice>) -> Result<DeviceInfo, Error> {
        let function = self.context.function(name, device)?;
        let endpoint = Box::new(Endpoint::new(function, PortType::Endpoint));
        let bdf = lock(&self.tree).insert(endpoint);
        let bdf = bdf.ok_or_else(|| Error::NoFreePort {
            device: name.to_owned(),
        })?;
        Ok(DeviceInfo {
            id: name.to_owned(),
            bdf: bdf.to_string(),
        })
    }

    /// Asks the guest to let go of a device; what was given to [`PciHost::on_ejection`] is told when it has.
    /// Returns whether there is such a device below a root port.
    pub fn request_removal(&self, name: &str) -> bool {
        // A device that was taken out at once ends after the lock, which the statement holds.
        let removed = lock(&self.tree).request_removal(name);
        removed.is_ok()
    }
}
