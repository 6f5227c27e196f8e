//! The memory map that the guest is given: e820 entries, and the same for PVH.

use crate::memory::GuestRam;
use crate::memory::layout::{
    ACPI_END, EBDA_START, ECAM_LEN, ECAM_START, HIGH_RAM_START, KERNEL_MIN_START,
};

/// Address range types that e820 and the PVH memory map share (ACPI 6.5, 15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical start.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is there.
    pub kind: Kind,
}

/// The map of a guest with this RAM, ascending. From the EBDA to 1 MiB there is RAM too, but it holds the
/// ACPI tables, and kernels take it for ROM anyway.
pub fn build(ram: &GuestRam) -> Vec<Entry> {
    let entry = |start, end, kind| Entry {
        start,
        len: end - start,
        kind,
    };
    let mut map = vec![
        entry(0, EBDA_START, Kind::Ram),
        entry(EBDA_START, ACPI_END, Kind::Reserved),
        entry(KERNEL_MIN_START, ram.low_len(), Kind::Ram),
        entry(ECAM_START, ECAM_START + ECAM_LEN, Kind::Reserved),
    ];
    if ram.high_len() > 0 {
        let end = HIGH_RAM_START + ram.high_len();
        map.push(entry(HIGH_RAM_START, end, Kind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;

    #[test]
    fn all_ram_but_the_legacy_area_is_usable() {
        for size in [2 << 20, 512 << 20, 3 << 30, 5 << 30] {
            let map = build(&testing::ram(size));
            let usable: u64 = map
                .iter()
                .filter(|e| e.kind == Kind::Ram)
                .map(|e| e.len)
                .sum();
            assert_eq!(usable, size - (ACPI_END - EBDA_START));
            assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start));
        }
    }
}
