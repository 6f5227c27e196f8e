//! MCFG: where PCIe configuration space is (PCI Firmware 3.3, 4.1.2).

use acpi_tables::mcfg::MCFG;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::memory::layout::{ECAM_START, LAST_BUS};

/// One segment.
pub(super) fn build() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, LAST_BUS);
    mcfg
}
