//! FADT: ACPI's fixed hardware (ACPI 6.5, 5.2.9).
//!
//! No SMI command port, so ACPI mode is always on and PM1a control's SCI_EN always reads 1. The power button
//! is the fixed one (PM1a status bit 8). No sleep button, no GPE block, no C2 or C3. The PM timer counts 24
//! bits, which is what kernels use of it.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::memory::layout::{
    PM_TIMER_PORT, PM1A_CNT_PORT, PM1A_EVT_PORT, RESET_PORT, RESET_VALUE, SCI_PIN,
};

const PM1_EVT_LEN: u8 = 4;
const PM1_CNT_LEN: u8 = 2;
const PM_TIMER_LEN: u8 = 4;
/// Latencies beyond which a C state does not exist.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// Where the CMOS clock has the century.
const CMOS_CENTURY: u8 = 0x32;
/// IAPC_BOOT_ARCH: user-visible legacy devices (the serial port); no VGA. No 8042 by bit 1 being clear.
const LEGACY_DEVICES_NO_VGA: u16 = 1 | 1 << 2;

/// The table, given where FACS and DSDT are (below 4 GiB).
pub(super) fn build(facs: u64, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32);
    for flag in [
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::ResetRegSup,
    ] {
        fadt = fadt.flag(flag);
    }
    fadt.sci_int = (SCI_PIN as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(PM1A_CNT_PORT).into();
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm1_evt_len = PM1_EVT_LEN;
    fadt.pm1_cnt_len = PM1_CNT_LEN;
    fadt.pm_tmr_len = PM_TIMER_LEN;
    fadt.x_pm1a_evt_blk = port(PM1A_EVT_PORT, PM1_EVT_LEN, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1A_CNT_PORT, PM1_CNT_LEN, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(PM_TIMER_PORT, PM_TIMER_LEN, AccessSize::DwordAccess);
    fadt.reset_reg = port(RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CMOS_CENTURY;
    fadt.iapc_boot_arch = LEGACY_DEVICES_NO_VGA.into();
    fadt.finalize()
}

/// A register block of `len` bytes at a port.
fn port(port: u16, len: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, len * 8, 0, access, port.into())
}
