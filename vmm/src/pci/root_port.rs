//! A PCI Express root port: the type 1 header, and the one device below it.
//!
//! A port forwards what lies in one of its windows while its memory decode is on, and configuration
//! accesses for the bus numbers that it was given. Its I/O window leads nowhere: no device has ports.
//!
//! Reference: PCI-to-PCI Bridge 1.2, 3.2; PCI Express 3.0, 7.5.3.

use std::ops::Range;

use super::config_space::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace, Identity};
use super::endpoint::Endpoint;
use super::express::{self, PortType};

const SECONDARY: usize = 0x19;
const SUBORDINATE: usize = 0x1a;
const IO_BASE: usize = 0x1c;
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
/// Device id of a root port, with the vendor ids that are settings.
const DEVICE_ID: u16 = 0x000c;

/// A port and the device in its slot.
pub(super) struct RootPort {
    config: ConfigSpace,
    pub(super) endpoint: Endpoint,
}

impl RootPort {
    pub(super) fn new(vendor: u16, slot: u8, endpoint: Endpoint) -> Self {
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
        // All windows closed: base above limit. Without the I/O window's registers, which would read
        // 0, Linux takes it for open, and gives it ports when it scans the bus again.
        config.allow(IO_BASE, &[0xf0, 0xf0]);
        config.set_u16(IO_BASE, 0x00f0);
        config.set_u32(MEMORY_BASE, 0x0000_fff0);
        config.set_u32(PREFETCH_BASE, 0x0001_fff1);
        express::add_express(&mut config, PortType::RootPort { slot });
        express::add_msi(&mut config);
        Self { config, endpoint }
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
    pub(super) fn forwards(&self, range: &Range<u64>) -> bool {
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
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        let before = self.config.u16(BRIDGE_CONTROL);
        self.config.write(offset, data);
        if self.config.u16(BRIDGE_CONTROL) & !before & BUS_RESET != 0 {
            self.endpoint.power_on();
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
