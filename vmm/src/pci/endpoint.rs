//! A function with a type 0 header, one 64-bit prefetchable BAR and MSI-X.
//!
//! The header is here; what is behind the BAR is a [`PciFunction`]. The BAR is where the guest put it
//! only while memory decode is on, here and in the bridge above: [`super::tree`] works that out and
//! tells the function with [`PciFunction::moved`].
//!
//! Reference: PCI Local Bus 3.0, 6.2.5.1 (sizing: all ones are written, the size's bits read 0) and
//! 6.8.2 (MSI-X); virtio 1.3, 4.1.4.9 (the window capability).

use std::ops::Range;
use std::sync::Arc;

use super::config_space::{BAR0, COMMAND, COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace, Identity};
use super::express::{self, PortType};
use crate::bus::BusDevice;

/// Low bits of a BAR: memory, 64-bit, prefetchable.
const BAR_KIND: u8 = 0xc;
/// Id of the MSI-X capability.
pub(crate) const CAPABILITY_MSIX: u8 = 0x11;
/// MSI-X message control, from the capability's start.
const MSIX_CONTROL: usize = 2;
/// Message control: MSI-X is on.
const MSIX_ENABLE: u16 = 1 << 15;
/// Message control: every vector is masked.
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// One entry of the capability list.
#[derive(Debug, Clone)]
pub struct Capability {
    /// Capability id.
    pub id: u8,
    /// What follows the id and the next pointer.
    pub body: Vec<u8>,
    /// The bits of `body` that software may write, from its start; may be shorter.
    pub writable: Vec<u8>,
    /// Whether it is a window on the BAR for software that cannot map it: the layout of
    /// `struct virtio_pci_cfg_cap`.
    pub is_window: bool,
}

/// What is behind the header: the BAR's contents (as a [`BusDevice`]) and the function's own state.
///
/// The calls come from vCPU threads with the lock of the topology held, `read` and `write` also without
/// it. None may call back into the topology.
pub trait PciFunction: BusDevice {
    /// Name for messages and `vm.info`.
    fn name(&self) -> &str;
    /// Ids and class.
    fn identity(&self) -> Identity;
    /// Size of BAR 0: a power of two from 4 KiB to 1 MiB.
    fn bar_size(&self) -> u64;
    /// Capabilities besides PCI Express, MSI-X among them.
    fn capabilities(&self) -> Vec<Capability>;
    /// The BAR answers at another address now, or nowhere. It is on the bus already (or off it).
    fn moved(&self, base: Option<u64>);
    /// Message control of MSI-X was written.
    fn set_msix(&self, enabled: bool, masked: bool);
    /// Back to the state after power-on; what takes time goes on in the background.
    fn reset(&self);
}

/// A [`PciFunction`] with its header.
pub(super) struct Endpoint {
    config: ConfigSpace,
    power_on: ConfigSpace,
    msix: Option<usize>,
    window: Option<usize>,
    pub(super) function: Arc<dyn PciFunction>,
    /// Where the BAR is on the bus now.
    pub(super) mapped: Option<u64>,
    /// Whether it was said already that the BAR cannot be where the guest put it.
    pub(super) warned: bool,
}

impl Endpoint {
    pub(super) fn new(function: Arc<dyn PciFunction>, port: PortType) -> Self {
        let mut config = ConfigSpace::new(&function.identity(), 0);
        let mask = (!(function.bar_size() - 1)).to_le_bytes();
        config.allow(BAR0, &mask);
        config.set_u8(BAR0, BAR_KIND);
        express::add_express(&mut config, port);
        let (mut msix, mut window) = (None, None);
        for capability in function.capabilities() {
            let at = config.add_capability(capability.id, &capability.body, &capability.writable);
            if capability.id == CAPABILITY_MSIX {
                msix = Some(at);
            }
            if capability.is_window {
                window = Some(at);
            }
        }
        Self {
            power_on: config.clone(),
            config,
            msix,
            window,
            function,
            mapped: None,
            warned: false,
        }
    }

    /// Leaves the function as firmware does: the BAR at `base`, memory decode and bus master on.
    pub(super) fn assign(&mut self, base: u64) {
        self.config.set_u32(BAR0, base as u32 | u32::from(BAR_KIND));
        self.config.set_u32(BAR0 + 4, (base >> 32) as u32);
        self.config
            .set_u16(COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    }

    /// Where the header says that the BAR answers, if memory decode is on.
    pub(super) fn decoded(&self) -> Option<Range<u64>> {
        if !self.config.command_has(COMMAND_MEMORY) {
            return None;
        }
        let low = u64::from(self.config.u32(BAR0) & !0xf);
        let base = low | u64::from(self.config.u32(BAR0 + 4)) << 32;
        Some(base..base.checked_add(self.function.bar_size())?)
    }

    pub(super) fn read(&mut self, offset: usize, data: &mut [u8]) {
        if let Some((at, bar)) = self.window_access(offset, data.len()) {
            let mut bytes = [0; 4];
            let len = usize::try_from(bar.end - bar.start).unwrap_or(0);
            self.function.read(bar.start, &mut bytes[..len]);
            self.config.set_u32(at, u32::from_le_bytes(bytes));
        }
        self.config.read(offset, data);
    }

    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((at, bar)) = self.window_access(offset, data.len()) {
            let bytes = self.config.u32(at).to_le_bytes();
            let len = usize::try_from(bar.end - bar.start).unwrap_or(0);
            self.function.write(bar.start, &bytes[..len]);
        }
        if let Some(at) = self.msix
            && touches(offset, data.len(), at + MSIX_CONTROL, 2)
        {
            self.sync_msix();
        }
    }

    /// Back to the state after power-on, as a reset of the bus above makes it.
    pub(super) fn power_on(&mut self) {
        self.config = self.power_on.clone();
        self.function.reset();
        self.sync_msix();
    }

    fn sync_msix(&self) {
        if let Some(at) = self.msix {
            let control = self.config.u16(at + MSIX_CONTROL);
            self.function.set_msix(
                control & MSIX_ENABLE != 0,
                control & MSIX_FUNCTION_MASK != 0,
            );
        }
    }

    /// If an access touches the window's data register: its offset, and what of the BAR it stands for.
    fn window_access(&self, offset: usize, len: usize) -> Option<(usize, Range<u64>)> {
        let window = self.window?;
        let data = window + 16;
        if !touches(offset, len, data, 4) || self.config.u16(window + 4) & 0xff != 0 {
            return None;
        }
        let start = u64::from(self.config.u32(window + 8));
        let len = u64::from(self.config.u32(window + 12));
        let end = start + len;
        (matches!(len, 1 | 2 | 4) && start % len == 0 && end <= self.function.bar_size())
            .then_some((data, start..end))
    }
}

/// Whether an access meets a register.
fn touches(offset: usize, len: usize, register: usize, register_len: usize) -> bool {
    offset < register + register_len && register < offset + len
}

/// A function's contents as the bus sees them.
pub(super) fn on_bus(function: &Arc<dyn PciFunction>) -> Arc<dyn BusDevice> {
    Arc::clone(function) as Arc<dyn BusDevice>
}
