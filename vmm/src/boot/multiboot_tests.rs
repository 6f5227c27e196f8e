use std::io::Cursor;

use super::*;
use crate::boot::initramfs::Initramfs;
use crate::boot::testing;

/// Header words with the right checksum.
fn header(flags: u32, rest: &[u32]) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
    let mut all = vec![HEADER_MAGIC, flags, checksum];
    all.extend(rest);
    words(&all)
}

/// An ELF32 image: one segment of text that begins with the header, and eight pages of memory.
fn elf(gpa: u32, flags: u32) -> Vec<u8> {
    let text_at = (EHDR_SIZE + PHDR_SIZE) as u32;
    let mut text = header(flags, &[]);
    text.extend([0xf4; 100]);
    let mut image = b"\x7fELF\x01\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 3, 0]); // ET_EXEC, EM_386
    image.extend(words(&[1, gpa + 12, EHDR_SIZE as u32, 0, 0]));
    for half in [EHDR_SIZE as u16, PHDR_SIZE as u16, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let len = text.len() as u32;
    image.extend(words(&[PT_LOAD, text_at, gpa, gpa, len, 0x8000, 7, 4]));
    image.extend(text);
    image
}

/// A flat image whose header, at offset 0x40, says that it is at 1 MiB + 0x40.
fn flat(load_end: u32, bss_end: u32) -> Vec<u8> {
    let mut image = vec![0x90; 0x40];
    let addresses = [0x10_0040, 0x10_0000, load_end, bss_end, 0x10_0080];
    image.extend(header(ADDRESSES, &addresses));
    image.resize(0x200, 0xcc);
    image
}

fn load(ram: &GuestRam, image: &[u8]) -> Result<Loaded, Error> {
    let head = &image[..image.len().min(SEARCH)];
    let header = Header::find(head).ok_or_else(|| no_header(head))?;
    header.load(ram, &mut Cursor::new(image), head, image.len() as u64)
}

fn message(image: &[u8]) -> String {
    let error = load(&testing::ram(4 << 20), image).unwrap_err();
    error.to_string()
}

#[test]
fn a_32_bit_elf_image_lands_at_its_physical_addresses() {
    let ram = testing::ram(4 << 20);
    let dirty = [0xaa; 0x8000];
    ram.memory()
        .write_slice(&dirty, GuestAddress(0x20_0000))
        .unwrap();
    let loaded = load(&ram, &elf(0x20_0000, 0)).unwrap();
    assert_eq!(loaded.entry, GuestAddress(0x20_000c));
    assert_eq!(loaded.end, GuestAddress(0x20_8000));
    let byte = |gpa| ram.memory().read_obj::<u8>(GuestAddress(gpa)).unwrap();
    assert_eq!((byte(0x20_000c), byte(0x20_7fff)), (0xf4, 0));
}

#[test]
fn a_flat_image_is_loaded_by_the_addresses_in_its_header() {
    for (load_end, bss_end, end) in [
        (0, 0, 0x10_0200),
        (0x10_0100, 0, 0x10_0100),
        (0x10_0100, 0x10_3000, 0x10_3000),
    ] {
        let ram = testing::ram(4 << 20);
        let loaded = load(&ram, &flat(load_end, bss_end)).unwrap();
        assert_eq!(loaded.entry, GuestAddress(0x10_0080));
        assert_eq!(loaded.end, GuestAddress(end));
        let magic = ram.memory().read_obj::<u32>(GuestAddress(0x10_0040));
        assert_eq!(magic.unwrap(), HEADER_MAGIC);
        let behind: u8 = ram.memory().read_obj(GuestAddress(0x10_0100)).unwrap();
        assert_eq!(behind, if load_end == 0 { 0xcc } else { 0 });
    }
}

#[test]
fn images_below_1_mib_load_where_nothing_else_is() {
    let ram = testing::ram(4 << 20);
    let loaded = load(&ram, &elf(0x8000, 0)).unwrap();
    assert_eq!(loaded.entry, GuestAddress(0x800c));
    assert_eq!(loaded.end, GuestAddress(KERNEL_MIN_START), "for a module");
    for (gpa, what) in [
        (0, "told with"),
        (0x1_c000, "command line"),
        (0x9_f000, "ACPI"),
        (0xf_ff00, "ACPI"),
    ] {
        assert!(message(&elf(gpa, 0)).contains(what), "{gpa:#x}");
    }
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    assert!(message(b"no kernel at all").contains("no multiboot header"));
    let mut version2 = vec![0; 64];
    version2[8..12].copy_from_slice(&MULTIBOOT2_MAGIC.to_le_bytes());
    assert!(message(&version2).contains("only version 1"));
    assert!(message(&elf(0x20_0000, 1 << 2)).contains("flags 0x4"));
    load(&testing::ram(4 << 20), &elf(0x20_0000, 3)).expect("page alignment and memory are met");
    assert!(message(&elf(0x3f_9000, 0)).contains("0x401000"));
    assert!(message(&elf(u32::MAX - 0x100, 0)).contains("does not fit"));
    let image = elf(0x20_0000, 0);
    assert!(message(&image[..image.len() - 1]).contains("truncated"));
    let mut wide = image.clone();
    wide[4] = 2;
    assert!(message(&wide).contains("32-bit ELF"));
    let mut entry = image;
    entry[24] = 0;
    entry[26] = 0x21;
    assert!(message(&entry).contains("entry 0x210000"));
    assert!(message(&flat(0xf_0000, 0)).contains("end of the load"));
    assert!(message(&flat(0, 0x10_0100)).contains("end of the bss"));
    assert!(message(&flat(0x10_0400, 0)).contains("truncated"));
}

#[test]
fn any_byte_of_the_headers_may_be_wrong_and_any_length() {
    let ram = testing::ram(4 << 20);
    for image in [elf(0x20_0000, 0), flat(0, 0x10_3000)] {
        for at in 0..image.len().min(160) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                if let Ok(loaded) = load(&ram, &image) {
                    assert!(loaded.end.0 <= ram.low_len());
                }
            }
        }
        for len in 0..image.len() {
            // Some still load; none may panic.
            let _ = load(&ram, &image[..len]);
        }
    }
}

#[test]
fn a_header_with_a_wrong_checksum_or_too_far_in_is_none() {
    let mut image = header(0, &[]);
    assert!(Header::find(&image).is_some());
    image[8] ^= 1;
    assert!(Header::find(&image).is_none());
    let mut far = vec![0; SEARCH - 8];
    far.extend(header(0, &[]));
    assert!(Header::find(&far).is_none());
    let mut odd = vec![0; 2];
    odd.extend(header(0, &[]));
    assert!(Header::find(&odd).is_none());
}

#[test]
fn only_files_without_a_way_of_their_own_are_multiboot_unasked() {
    let image = elf(0x20_0000, 0);
    let found = Header::find(&image).unwrap();
    assert!(found.is_first_choice(&image));
    let mut wide = image;
    wide[4] = 2;
    assert!(!found.is_first_choice(&wide));
    let image = flat(0, 0);
    assert!(Header::find(&image).unwrap().is_first_choice(&image));
}

#[test]
fn the_information_leads_to_everything_else() {
    let ram = testing::ram(5 << 30);
    let handover = Handover {
        cmdline: GuestAddress(CMDLINE_START),
        initramfs: Some(Initramfs {
            start: GuestAddress(0x700_0000),
            len: 77,
        }),
        rsdp: GuestAddress(0xe_0000),
    };
    let at = write(&ram, &handover).unwrap().0;
    let word = |gpa| ram.memory().read_obj::<u32>(GuestAddress(gpa)).unwrap();
    assert_eq!(word(at), 0b10_0100_1101);
    assert_eq!(word(at + 4), 639);
    assert_eq!(word(at + 8), ((3 << 30) - (1 << 20)) >> 10);
    assert_eq!(word(at + 16), CMDLINE_START as u32);
    assert_eq!(word(at + 20), 1, "one module");
    let module = u64::from(word(at + 24));
    assert_eq!((word(module), word(module + 4)), (0x700_0000, 0x700_004d));
    let (len, map) = (word(at + 44), u64::from(word(at + 48)));
    assert_eq!(len % 24, 0);
    let last = map + u64::from(len) - 24;
    assert_eq!(word(last), 20);
    let range: [u64; 2] = ram.memory().read_obj(GuestAddress(last + 4)).unwrap();
    assert_eq!((range, word(last + 20)), ([1 << 32, 2 << 30], 1));
}
