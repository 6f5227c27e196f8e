//! The Linux zero page (`struct boot_params`): what a kernel entered at a 64-bit entry is told.
//!
//! Linux Documentation/arch/x86/boot.rst and zero-page.rst. It is made as bytes at the documented
//! offsets. A bzImage's own setup header is the start where there is one, else a minimal header as
//! boot loaders of an ELF kernel make it.
//!
//! A kernel that was not unpacked by its own code is told with `KASLR_FLAG` to randomise what it still
//! can: where direct map, vmalloc area and modules are. The flag is what the kernel's own unpacker, in whose
//! place the VMM is, would have set; `nokaslr` takes it away as there.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::Handover;
use super::bzimage::{SETUP_HEADER, SetupHeader};
use super::kernel::Kernel;
use super::memmap;
use crate::memory::GuestRam;
use crate::memory::layout::ZERO_PAGE;

const SIZE: usize = 4096;
const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_SIZE: usize = 20;
/// `loadflags`: the protected-mode code is at 1 MiB or above; memory layout is to be randomised.
const LOADED_HIGH: u8 = 1;
const KASLR_FLAG: u8 = 1 << 1;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page; returns its address, which the boot processor finds in `rsi`.
pub fn write(
    ram: &GuestRam,
    handover: &Handover,
    kernel: &Kernel,
) -> Result<GuestAddress, GuestMemoryError> {
    let loadflags = if kernel.kaslr {
        LOADED_HIGH | KASLR_FLAG
    } else {
        LOADED_HIGH
    };
    let page = build(ram, handover, kernel.header.as_ref(), loadflags);
    ram.memory().write_slice(&page, GuestAddress(ZERO_PAGE))?;
    Ok(GuestAddress(ZERO_PAGE))
}

fn build(
    ram: &GuestRam,
    handover: &Handover,
    header: Option<&SetupHeader>,
    loadflags: u8,
) -> Vec<u8> {
    let mut page = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    match header {
        Some(header) => put(SETUP_HEADER, &header.raw),
        None => {
            put(BOOT_FLAG, &[0x55, 0xaa]);
            put(HEADER, b"HdrS");
            put(VERSION, &0x020fu16.to_le_bytes());
            put(KERNEL_ALIGNMENT, &0x0100_0000u32.to_le_bytes());
        }
    }
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(LOADFLAGS, &[loadflags]);
    put(CMD_LINE_PTR, &(handover.cmdline.0 as u32).to_le_bytes());
    put(ACPI_RSDP_ADDR, &handover.rsdp.0.to_le_bytes());
    if let Some(initramfs) = handover.initramfs {
        let (start, len) = (initramfs.start.0, initramfs.len);
        put(RAMDISK_IMAGE, &(start as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(len as u32).to_le_bytes());
        put(EXT_RAMDISK_IMAGE, &((start >> 32) as u32).to_le_bytes());
        put(EXT_RAMDISK_SIZE, &((len >> 32) as u32).to_le_bytes());
    }
    let map = memmap::build(ram);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (i, entry) in map.iter().enumerate() {
        let at = E820_TABLE + i * E820_ENTRY_SIZE;
        put(at, &entry.start.to_le_bytes());
        put(at + 8, &entry.len.to_le_bytes());
        put(at + 16, &(entry.kind as u32).to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::initramfs::Initramfs;
    use crate::boot::kernel::EntryPoint;
    use crate::boot::testing;

    fn handover() -> Handover {
        Handover {
            cmdline: GuestAddress(0x2_0000),
            initramfs: Some(Initramfs {
                start: GuestAddress(0x1234_5000),
                len: 0x678,
            }),
            rsdp: GuestAddress(0xe_0000),
        }
    }

    #[test]
    fn an_elf_kernel_gets_a_minimal_header() {
        let page = build(&testing::ram(5 << 30), &handover(), None, LOADED_HIGH);
        assert_eq!(&page[0x1fe..0x200], &[0x55, 0xaa]);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(page[0x210], 0xff);
        assert_eq!(&page[0x218..0x220], &[0, 0x50, 0x34, 0x12, 0x78, 6, 0, 0]);
        assert_eq!(&page[0x228..0x22c], &[0, 0, 2, 0]);
        assert_eq!(&page[0x070..0x078], &[0, 0, 0xe, 0, 0, 0, 0, 0]);
        assert_eq!(page[0x1e8], 5);
        // The fifth entry: 2 GiB of RAM at 4 GiB.
        let entry = &page[0x2d0 + 4 * 20..][..20];
        assert_eq!(
            entry,
            [
                &[0, 0, 0, 0, 1, 0, 0, 0][..],
                &[0, 0, 0, 0x80, 0, 0, 0, 0],
                &[1, 0, 0, 0]
            ]
            .concat()
        );
    }

    #[test]
    fn a_bzimage_keeps_its_header_but_for_the_loaders_fields() {
        let image = testing::bzimage(b"payload", 0);
        let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
        let page = build(
            &testing::ram(64 << 20),
            &handover(),
            Some(&header),
            LOADED_HIGH,
        );
        assert_eq!(&page[0x236..0x238], &image[0x236..0x238]);
        assert_eq!(page[0x1f1], image[0x1f1]);
        assert_eq!(page[0x210], 0xff);
    }

    #[test]
    fn a_kernel_is_told_whether_to_randomise() {
        let ram = testing::ram(2 << 20);
        let loadflags = |kaslr| {
            let kernel = Kernel {
                entry: EntryPoint::Linux64(GuestAddress(0x10_0000)),
                end: GuestAddress(0x20_0000),
                header: None,
                kaslr,
            };
            let at = write(&ram, &handover(), &kernel).unwrap();
            ram.memory()
                .read_obj::<u8>(GuestAddress(at.0 + LOADFLAGS as u64))
                .unwrap()
        };
        assert_eq!(loadflags(true), LOADED_HIGH | KASLR_FLAG);
        assert_eq!(loadflags(false), LOADED_HIGH);
    }
}
