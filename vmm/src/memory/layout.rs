//! The guest's physical address map.
//!
//! ```text
//!  0x0000_0000 ┬ RAM below the hole (zero page, GDT, PVH start info, command line low; ACPI at 0xe0000)
//!  0xc000_0000 ┼ 32-bit MMIO window of the PCI host bridge
//!  0xe000_0000 ┼ ECAM, 64 buses of 1 MiB
//!  0xe400_0000 ┼ unused
//!  0xfec0_0000 ┼ IOAPIC, LAPIC (0xfee0_0000), KVM's TSS and identity page (0xfffb_c000)
//! 0x1_0000_0000┼ RAM above the hole
//!  mmio64      ┴ 64-bit MMIO window, from the first 1 GiB boundary above both RAM and 16 GiB
//! ```

/// End of RAM below the hole, at most.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of RAM above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// 32-bit MMIO window of the PCI host bridge.
pub const MMIO32_START: u64 = 0xc000_0000;
/// Length of the 32-bit MMIO window.
pub const MMIO32_LEN: u64 = 0x2000_0000;
/// PCIe configuration space (MCFG).
pub const ECAM_START: u64 = 0xe000_0000;
/// Length of configuration space: twice the buses that there can be. Linux looks for peer bridges at 32
/// places of every bus below MCFG's last, two exits each: 256 buses cost it 16 000 exits at boot.
pub const ECAM_LEN: u64 = 0x400_0000;
/// Last bus that configuration space has room for.
pub const LAST_BUS: u8 = ((ECAM_LEN >> 20) - 1) as u8;
/// The IOAPIC's page.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The local APICs' page.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// KVM's identity-map page; its TSS follows in the next three pages.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's TSS, three pages.
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;
/// Least start of the 64-bit MMIO window.
pub const MMIO64_MIN_START: u64 = 16 << 30;
/// Length of the 64-bit MMIO window.
pub const MMIO64_LEN: u64 = 16 << 30;

/// Global descriptor table of the boot processor's first instructions.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info; its module list and memory map follow in the same page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Multiboot information with its memory map, one page; no guest has both this and a PVH start info.
pub const MULTIBOOT_INFO: u64 = PVH_START_INFO;
/// Linux zero page (struct boot_params), 4 KiB.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit entry: PML4, page directory pointers, then five page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, at most 64 KiB.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Extended BIOS data area: where conventional memory ends.
pub const EBDA_START: u64 = 0x9_fc00;
/// First address of a kernel: below it is what the kernel is told with.
pub const KERNEL_MIN_START: u64 = 0x10_0000;

/// Where the ACPI tables start: in the BIOS read-only area, where any kernel looks.
pub const ACPI_START: u64 = 0x000e_0000;
/// End of the area for ACPI tables.
pub const ACPI_END: u64 = 0x0010_0000;

/// Ports of the ACPI power-management block (FADT): PM1a event, 4 bytes.
pub const PM1A_EVT_PORT: u16 = 0x600;
/// PM1a control, 2 bytes. The sleep type of S5 is 5.
pub const PM1A_CNT_PORT: u16 = 0x604;
/// ACPI PM timer, 4 bytes, 3.579545 MHz.
pub const PM_TIMER_PORT: u16 = 0x608;
/// FADT reset register: a byte port; writing [`RESET_VALUE`] resets the machine.
pub const RESET_PORT: u16 = 0xcf9;
/// Value that resets at [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x06;
/// The ACPI SCI, a level-triggered, active-high IOAPIC pin.
pub const SCI_PIN: u32 = 9;
/// SLP_TYP of S5 in `\_S5`.
pub const S5_SLEEP_TYPE: u8 = 5;

/// Sizes of the RAM pieces below and above the hole, in bytes; the second may be 0. Not of a guest with a DMA window, which
/// is all of its RAM below ([`super::Mode::split`]).
pub const fn ram_split(size_bytes: u64) -> (u64, u64) {
    if size_bytes <= LOW_RAM_END {
        (size_bytes, 0)
    } else {
        (LOW_RAM_END, size_bytes - LOW_RAM_END)
    }
}

/// Start of the 64-bit MMIO window of a guest with so much RAM from 4 GiB on.
pub const fn mmio64_start(high: u64) -> u64 {
    let end = (HIGH_RAM_START + high).next_multiple_of(1 << 30);
    if end > MMIO64_MIN_START {
        end
    } else {
        MMIO64_MIN_START
    }
}
