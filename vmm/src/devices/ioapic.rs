//! The IOAPIC's page, where this process has the IOAPIC (`--platform irqchip=split`).
//!
//! The registers are `berth-irqchip`'s (`irqchip/src/ioapic.rs` names the datasheet); this puts them on the
//! bus. Called by vCPU threads; a write of an entry costs an ioctl or two.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use berth_irqchip::Chip;

use crate::bus::BusDevice;

/// The page as a bus device.
pub struct IoapicPage {
    chip: Arc<Chip>,
    /// That KVM refused an entry was said once: a guest could make it fill the log.
    warned: AtomicBool,
}

impl IoapicPage {
    /// The page of this chip's IOAPIC.
    pub fn new(chip: Arc<Chip>) -> Self {
        Self {
            chip,
            warned: AtomicBool::new(false),
        }
    }
}

impl BusDevice for IoapicPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.chip.ioapic_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Err(error) = self.chip.ioapic_write(offset, data)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "an IOAPIC entry stays as it was");
        }
    }
}
