use super::*;
use crate::boot::testing::{self, Phdr};

fn load_bytes(ram: &GuestRam, image: &[u8], bias: u64) -> Result<Loaded, Error> {
    load(ram, &mut &image[..], bias, Tail::Ignore)
}

fn bytes_at(ram: &GuestRam, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(gpa))
        .unwrap();
    bytes
}

#[test]
fn segments_go_to_their_physical_addresses_and_bss_is_zero() {
    let ram = testing::ram(4 << 20);
    ram.memory()
        .write_slice(&[0xaa; 0x10_0000], GuestAddress(0x20_0000))
        .unwrap();
    let loaded = load_bytes(&ram, &testing::small_kernel(), 0).unwrap();
    assert_eq!(
        loaded,
        Loaded {
            bias: 0,
            entry64: GuestAddress(0x10_0010),
            pvh_entry: Some(GuestAddress(0x10_0020)),
            end: GuestAddress(0x28_0000),
            tail: vec![],
        }
    );
    assert_eq!(
        bytes_at(&ram, 0x10_0000, 0x3000),
        testing::x86_like_bytes(0x3000)
    );
    assert_eq!(bytes_at(&ram, 0x20_1233, 2), [0xdd, 0]);
    assert_eq!(bytes_at(&ram, 0x27_ffff, 2), [0, 0xaa]);
}

#[test]
fn a_bias_moves_segments_and_entries_even_above_4_gib() {
    let ram = testing::ram(4 << 30);
    let bias = 1 << 32;
    let loaded = load_bytes(&ram, &testing::small_kernel(), bias).unwrap();
    assert_eq!(loaded.entry64, GuestAddress(bias + 0x10_0010));
    assert_eq!(loaded.pvh_entry, None);
    assert_eq!(bytes_at(&ram, bias + 0x20_0000, 1), [0xdd]);
    assert_eq!(loaded.bias, bias);
}

#[test]
fn without_room_for_its_bias_an_image_stays_where_it_was_linked() {
    let ram = testing::ram(8 << 20);
    let loaded = load_bytes(&ram, &testing::small_kernel(), 1 << 32).unwrap();
    assert_eq!((loaded.bias, loaded.entry64), (0, GuestAddress(0x10_0010)));
}

#[test]
fn an_image_longer_than_a_chunk_arrives_whole() {
    let ram = testing::ram(8 << 20);
    let text = testing::x86_like_bytes(3 * CHUNK + 777);
    let image = testing::elf(
        0x10_0000,
        &[Phdr {
            kind: PT_LOAD,
            paddr: 0x10_0000,
            mem_len: text.len() as u64,
            bytes: text.clone(),
        }],
    );
    load_bytes(&ram, &image, 0).unwrap();
    assert!(bytes_at(&ram, 0x10_0000, text.len()) == text);
}

#[test]
fn what_is_behind_the_image_is_kept_if_asked() {
    let ram = testing::ram(4 << 20);
    let mut image = testing::small_kernel();
    image.extend(b"behind");
    let kept = |tail| load(&ram, &mut &image[..], 0, tail).unwrap().tail;
    assert_eq!(kept(Tail::Ignore), b"");
    assert_eq!(kept(Tail::Keep), b"behind");
}

#[test]
fn truncation_at_every_offset_is_said_and_never_panics() {
    let ram = testing::ram(4 << 20);
    let image = testing::small_kernel();
    for len in 0..image.len() {
        let error = load_bytes(&ram, &image[..len], 0).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { got, .. } if got == len as u64),
            "{len}: {error}"
        );
    }
}

#[test]
fn any_byte_of_the_headers_may_be_wrong() {
    let ram = testing::ram(4 << 20);
    let image = testing::small_kernel();
    for at in 0..64 + 3 * 56 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = image.clone();
            image[at] = value;
            // Some still load; none may panic or leave the guest's RAM.
            let _ = load_bytes(&ram, &image, 0);
        }
    }
}

#[test]
fn foreign_elf_files_are_named() {
    let ram = testing::ram(4 << 20);
    for (at, value, what) in [
        (4, 1, "32-bit"),
        (5, 2, "big-endian"),
        (18, 183, "arm64"),
        (18, 243, "riscv"),
        (16, 1, "file type 1"),
        (0, 0, "starts with"),
        (64 + 56, 3, "a program"),
    ] {
        let mut image = testing::small_kernel();
        image[at] = value;
        let error = load_bytes(&ram, &image, 0).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn segments_outside_ram_or_below_1_mib_are_refused() {
    let ram = testing::ram(4 << 20);
    for (paddr, mem_len) in [
        (0x9_0000, 0x1000),
        (0x3f_0000, 0x1_0001),
        (u64::MAX - 1, 1),
        (0xc000_0000, 1),
    ] {
        let image = testing::elf(
            paddr,
            &[Phdr {
                kind: PT_LOAD,
                paddr,
                bytes: vec![],
                mem_len,
            }],
        );
        let error = load_bytes(&ram, &image, 0).unwrap_err();
        assert!(matches!(error, Error::DoesNotFit { .. }), "{error}");
    }
}

#[test]
fn entries_outside_the_image_are_refused() {
    let ram = testing::ram(4 << 20);
    let mut image = testing::small_kernel();
    image[24..32].copy_from_slice(&0x30_0000u64.to_le_bytes());
    let error = load_bytes(&ram, &image, 0).unwrap_err().to_string();
    assert!(error.contains("entry 0x300000"), "{error}");
}

#[test]
fn notes_that_make_no_sense_are_no_entry() {
    let note = testing::pvh_note(0x1234);
    assert_eq!(pvh_entry(&note), Some(0x1234));
    for len in 0..note.len() {
        assert_eq!(pvh_entry(&note[..len]), None);
    }
    assert_eq!(pvh_entry(&[0xff; 64]), None);
}
