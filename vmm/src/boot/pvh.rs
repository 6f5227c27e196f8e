//! PVH start info: what a kernel entered at its 32-bit PVH entry is told.
//!
//! Xen's public/arch-x86/hvm/start_info.h, version 1. Module list and memory map lie behind the start
//! info in the same page.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::Handover;
use super::memmap;
use crate::memory::GuestRam;
use crate::memory::layout::PVH_START_INFO;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODLIST: u64 = PVH_START_INFO + 64;
const MEMMAP: u64 = PVH_START_INFO + 128;

/// Writes the start info; returns its address, which the boot processor finds in `ebx`.
pub fn write(ram: &GuestRam, handover: &Handover) -> Result<GuestAddress, GuestMemoryError> {
    let memory = ram.memory();
    let map = memmap::build(ram);
    let mut info = Vec::with_capacity(56);
    info.extend(MAGIC.to_le_bytes());
    info.extend(VERSION.to_le_bytes());
    info.extend(0u32.to_le_bytes());
    info.extend(u32::from(handover.initramfs.is_some()).to_le_bytes());
    info.extend(handover.initramfs.map_or(0, |_| MODLIST).to_le_bytes());
    info.extend(handover.cmdline.0.to_le_bytes());
    info.extend(handover.rsdp.0.to_le_bytes());
    info.extend(MEMMAP.to_le_bytes());
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    memory.write_slice(&info, GuestAddress(PVH_START_INFO))?;

    if let Some(initramfs) = handover.initramfs {
        let module = [initramfs.start.0, initramfs.len, 0, 0];
        memory.write_slice(
            &module.map(u64::to_le_bytes).concat(),
            GuestAddress(MODLIST),
        )?;
    }
    let mut table = Vec::new();
    for entry in map {
        table.extend(entry.start.to_le_bytes());
        table.extend(entry.len.to_le_bytes());
        table.extend((entry.kind as u32).to_le_bytes());
        table.extend(0u32.to_le_bytes());
    }
    memory.write_slice(&table, GuestAddress(MEMMAP))?;
    Ok(GuestAddress(PVH_START_INFO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::initramfs::Initramfs;
    use crate::boot::testing;

    #[test]
    fn the_start_info_leads_to_everything_else() {
        let ram = testing::ram(5 << 30);
        let handover = Handover {
            cmdline: GuestAddress(0x2_0000),
            initramfs: Some(Initramfs {
                start: GuestAddress(0x700_0000),
                len: 77,
            }),
            rsdp: GuestAddress(0xe_0000),
        };
        let at = write(&ram, &handover).unwrap();
        let read = |offset| {
            ram.memory()
                .read_obj::<u64>(at.checked_add(offset).unwrap())
        };
        use vm_memory::Address;
        assert_eq!(read(0).unwrap(), 0x1_336e_c578);
        assert_eq!(read(8).unwrap() >> 32, 1, "one module");
        assert_eq!(read(24).unwrap(), 0x2_0000);
        assert_eq!(read(32).unwrap(), 0xe_0000);
        let modules = GuestAddress(read(16).unwrap());
        assert_eq!(
            ram.memory().read_obj::<[u64; 2]>(modules).unwrap(),
            [0x700_0000, 77]
        );
        let count = read(48).unwrap();
        let last = GuestAddress(read(40).unwrap() + (count - 1) * 24);
        assert_eq!(
            ram.memory().read_obj::<[u64; 3]>(last).unwrap(),
            [1 << 32, 2 << 30, 1]
        );
    }
}
