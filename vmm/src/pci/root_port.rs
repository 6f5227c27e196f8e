//! A PCI Express root port: the type 1 header, and the slot with at most one device below it.
//!
//! A port forwards what lies in one of its windows while its memory decode is on, and configuration
//! accesses for the bus numbers that it was given, both only while the slot has power. It has no I/O window:
//! no device has ports, and a window in a port for hot-plug would be given 4 KiB of the 64 that there are. Its one interrupt is the slot's, by MSI; there is no INTx.
//!
//! Reference: PCI-to-PCI Bridge 1.2, 3.2; PCI Express 3.0, 7.5.3.

use std::ops::Range;
use std::time::Duration;

use super::config_space::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace, Identity};
use super::endpoint::Endpoint;
use super::express::{self, PortType};
use super::slot::{Change, Slot};
use super::wiring::{Message, Vectors, Wiring, WiringError};
use crate::telemetry::LogLimit;

const SECONDARY: usize = 0x19;
const SUBORDINATE: usize = 0x1a;
const MEMORY_BASE: usize = 0x20;
const PREFETCH_BASE: usize = 0x24;
const PREFETCH_BASE_UPPER: usize = 0x28;
const PREFETCH_LIMIT_UPPER: usize = 0x2c;
const BRIDGE_CONTROL: usize = 0x3e;
/// Bridge control: the secondary bus is held in reset.
const BUS_RESET: u16 = 1 << 6;
/// Windows begin and end at multiples of this.
pub(super) const WINDOW_ALIGN: u64 = 1 << 20;
/// Low bits of a prefetchable window register: 64-bit.
const PREFETCH_64: u16 = 1;
/// A guest can write the capability as often as it likes.
static WIRING: LogLimit = LogLimit::new(Duration::from_secs(10));
/// Device id of a root port, whichever vendor it names. Vendor 0x1106 has no product of this number, which Linux would
/// know quirks for.
const DEVICE_ID: u16 = 0x000c;
/// Vendor of a port below which Linux gives devices 32-bit addresses only (arch/x86/kernel/pci-dma.c, `via_no_dac`: any
/// bridge of the vendor's).
pub const LIMITING_VENDOR: u16 = 0x1106;

/// A port and the device in its slot.
pub(super) struct RootPort {
    config: ConfigSpace,
    endpoint: Option<Box<Endpoint>>,
    slot: Slot,
    /// How many devices have been in it.
    insertions: u32,
    number: u8,
    /// Offset of the MSI capability, and the vector with the message that it has now.
    msi: usize,
    vector: Box<dyn Vectors>,
    message: Message,
}

/// What a write of the guest did to the device below.
pub(super) enum Effect {
    /// Nothing.
    None,
    /// It is there now, or is not any more.
    Power,
    /// It was taken out.
    Ejected(Box<Endpoint>),
}

impl RootPort {
    pub(super) fn new(
        vendor: u16,
        number: u8,
        endpoint: Option<Box<Endpoint>>,
        wiring: &dyn Wiring,
    ) -> Result<Self, WiringError> {
        let identity = Identity {
            vendor,
            device: DEVICE_ID,
            revision: 0,
            class: 0x06_0400,
            subsystem: (0, 0),
        };
        let mut config = ConfigSpace::new(&identity, 1);
        config.allow(0x18, &[0xff; 4]);
        config.allow(
            MEMORY_BASE,
            &[0xf0, 0xff, 0xf0, 0xff, 0xf0, 0xff, 0xf0, 0xff],
        );
        config.allow(PREFETCH_BASE_UPPER, &[0xff; 8]);
        config.allow(BRIDGE_CONTROL, &[0x43, 0]);
        // Both windows closed: base above limit. The I/O window's registers are 0 and stay 0, which is
        // how a port without one looks.
        config.set_u32(MEMORY_BASE, 0x0000_fff0);
        config.set_u32(PREFETCH_BASE, 0x0001_fff1);
        let express = express::add_express(&mut config, PortType::RootPort);
        let msi = express::add_msi(&mut config);
        let slot = Slot::new(&mut config, express, number, endpoint.is_some());
        Ok(Self {
            config,
            insertions: endpoint.is_some().into(),
            endpoint,
            slot,
            number,
            msi,
            vector: wiring.vectors(1)?,
            message: None,
        })
    }

    /// The device, whether the guest can reach it or not.
    pub(super) fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_deref()
    }

    /// The device, for software that leaves it as firmware does.
    pub(super) fn endpoint_mut(&mut self) -> Option<&mut Endpoint> {
        self.endpoint.as_deref_mut()
    }

    /// The device, if it has power.
    pub(super) fn reachable(&mut self) -> Option<&mut Endpoint> {
        let powered = self.slot.powered(&self.config);
        self.endpoint.as_deref_mut().filter(|_| powered)
    }

    /// Where the device's BAR answers, if the port forwards that.
    pub(super) fn decoded(&self) -> Option<Range<u64>> {
        let endpoint = self.endpoint.as_ref()?;
        let range = endpoint.decoded().filter(|range| self.forwards(range))?;
        self.slot.powered(&self.config).then_some(range)
    }

    /// How many devices have been in the slot.
    pub(super) fn insertions(&self) -> u32 {
        self.insertions
    }

    /// Puts a device into the slot, which must be empty, and tells the guest.
    pub(super) fn insert(&mut self, endpoint: Box<Endpoint>) {
        self.endpoint = Some(endpoint);
        self.insertions = self.insertions.saturating_add(1);
        if self.slot.insert(&mut self.config) {
            self.interrupt();
        }
    }

    /// Asks the guest to let go of the device.
    pub(super) fn request_removal(&mut self) -> Effect {
        let (change, interrupt) = self.slot.request_removal(&mut self.config);
        self.follow(change, interrupt)
    }

    /// Leaves the port as firmware does: one bus below, one prefetchable window, decode on.
    pub(super) fn assign(&mut self, bus: u8, window: &Range<u64>) {
        let last = window.end - 1;
        self.config.set_u8(SECONDARY, bus);
        self.config.set_u8(SUBORDINATE, bus);
        let register = |address: u64| (address >> 16) as u16 & 0xfff0 | PREFETCH_64;
        self.config.set_u16(PREFETCH_BASE, register(window.start));
        self.config.set_u16(PREFETCH_BASE + 2, register(last));
        self.config
            .set_u32(PREFETCH_BASE_UPPER, (window.start >> 32) as u32);
        self.config
            .set_u32(PREFETCH_LIMIT_UPPER, (last >> 32) as u32);
        self.config
            .set_u16(COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    }

    /// The bus below, if the port was given one.
    pub(super) fn secondary(&self) -> Option<u8> {
        let [secondary, subordinate] = self.config.u16(SECONDARY).to_le_bytes();
        (secondary != 0 && secondary <= subordinate).then_some(secondary)
    }

    /// Whether the port forwards accesses to all of this range.
    fn forwards(&self, range: &Range<u64>) -> bool {
        let inside =
            |base: u64, limit: u64| base <= limit && base <= range.start && range.end - 1 <= limit;
        self.config.command_has(COMMAND_MEMORY)
            && (inside(self.window_edge(MEMORY_BASE, None), self.memory_limit())
                || inside(
                    self.window_edge(PREFETCH_BASE, Some(PREFETCH_BASE_UPPER)),
                    self.window_edge(PREFETCH_BASE + 2, Some(PREFETCH_LIMIT_UPPER)) | 0xf_ffff,
                ))
    }

    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// Takes a write; the device below is reset when software asks for it.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        let before = self.config.u16(BRIDGE_CONTROL);
        let control = self.slot.control(&self.config);
        self.config.write(offset, data);
        if self.config.u16(BRIDGE_CONTROL) & !before & BUS_RESET != 0
            && let Some(endpoint) = &mut self.endpoint
        {
            endpoint.power_on();
        }
        if express::touches_msi(self.msi, offset, data.len()) {
            self.wire();
        }
        let (change, interrupt) = self.slot.written(&mut self.config, offset, data, control);
        self.follow(change, interrupt)
    }

    fn follow(&mut self, change: Change, interrupt: bool) -> Effect {
        if interrupt {
            self.interrupt();
        }
        match (change, &mut self.endpoint) {
            (Change::PoweredOn | Change::PoweredOff, Some(endpoint)) => {
                endpoint.power_on();
                Effect::Power
            }
            (Change::Ejected, _) => self.endpoint.take().map_or(Effect::None, Effect::Ejected),
            _ => Effect::None,
        }
    }

    /// Has the interrupt go where the MSI capability says.
    fn wire(&mut self) {
        let message = express::msi_message(&self.config, self.msi);
        if message == self.message {
            return;
        }
        self.message = message;
        if let Err(error) = self.vector.set(&[(0, message)])
            && let Some(suppressed) = WIRING.pass()
        {
            let port = self.number;
            tracing::warn!(port, suppressed, %error, "cannot wire a root port's interrupt");
        }
    }

    fn interrupt(&self) {
        if let Some(event) = self.vector.event(0) {
            // Full is as good as raised.
            let _ = event.write(1);
        }
    }

    fn memory_limit(&self) -> u64 {
        self.window_edge(MEMORY_BASE + 2, None) | 0xf_ffff
    }

    fn window_edge(&self, low: usize, upper: Option<usize>) -> u64 {
        let bits = u64::from(self.config.u16(low) & 0xfff0) << 16;
        bits | upper.map_or(0, |upper| u64::from(self.config.u32(upper)) << 32)
    }
}
