use super::*;
use crate::boot::testing::{self, TempFile};
use std::path::Path;
use vm_memory::Bytes;

fn payload(kernel: &Path, entry: KernelEntry) -> PayloadConfig {
    PayloadConfig {
        kernel: kernel.to_owned(),
        entry,
        initramfs: None,
        cmdline: "quiet".to_owned(),
    }
}

fn load_bytes(bytes: &[u8], entry: KernelEntry) -> Result<Kernel, Error> {
    let file = TempFile::new(bytes);
    load(&testing::ram(4 << 20), &payload(file.path(), entry))
}

fn packed_kernel(format: Compression) -> Vec<u8> {
    testing::bzimage(&testing::pack(format, &testing::small_kernel()), 0)
}

#[test]
fn a_vmlinux_is_entered_by_its_note_unless_asked_otherwise() {
    let image = testing::small_kernel();
    let entry = |how| load_bytes(&image, how).unwrap().entry;
    let pvh = EntryPoint::Pvh(GuestAddress(0x10_0020));
    assert_eq!(entry(KernelEntry::Auto), pvh);
    assert_eq!(entry(KernelEntry::Pvh), pvh);
    assert_eq!(
        entry(KernelEntry::Linux64),
        EntryPoint::Linux64(GuestAddress(0x10_0010))
    );
    assert!(matches!(
        load_bytes(&image, KernelEntry::BzImage),
        Err(Error::NoEntry {
            entry: "bzimage",
            ..
        })
    ));
}

#[test]
fn a_bzimage_of_any_supported_compressor_is_unpacked() {
    let plain = testing::small_kernel();
    for format in testing::FORMATS.into_iter().chain([Compression::None]) {
        let file = TempFile::new(&packed_kernel(format));
        let ram = testing::ram(4 << 20);
        let kernel = load(&ram, &payload(file.path(), KernelEntry::Auto)).unwrap();
        assert_eq!(kernel.entry, EntryPoint::Linux64(GuestAddress(0x10_0010)));
        assert_eq!(kernel.initrd_addr_max(), 0x7fff_ffff);
        let mut text = vec![0; 0x3000];
        ram.memory()
            .read_slice(&mut text, GuestAddress(0x10_0000))
            .unwrap();
        assert!(text == plain[64 + 3 * 56..][..0x3000], "{}", format.name());
    }
}

#[test]
fn a_kernel_with_relocations_moves_unless_that_is_forbidden() {
    // One 64-bit place at the start of the text.
    let mut plain = testing::small_kernel();
    for word in [0u32, 0x8010_0000, 0, 0] {
        plain.extend(word.to_le_bytes());
    }
    let image = testing::bzimage(&testing::pack(Compression::Lz4, &plain), 0);
    let first = u64::from_le_bytes(testing::x86_like_bytes(8).try_into().unwrap());
    let mut deltas = std::collections::BTreeSet::new();
    for (entry, cmdline, may_move) in [
        (KernelEntry::Auto, "quiet", true),
        (KernelEntry::Linux64, "quiet", true),
        (KernelEntry::Auto, "quiet", true),
        (KernelEntry::Linux64, "nokaslr", false),
        (KernelEntry::Pvh, "quiet", false),
    ] {
        let ram = testing::ram(4 << 20);
        let payload = PayloadConfig {
            cmdline: cmdline.to_owned(),
            ..payload(Path::new("kernel"), entry)
        };
        let mut file = io::Cursor::new(&image);
        let kernel = load_from(&ram, &payload, &mut file, image.len() as u64).unwrap();
        assert_eq!(kernel.kaslr, cmdline != "nokaslr");
        let value: u64 = ram.memory().read_obj(GuestAddress(0x10_0000)).unwrap();
        let delta = value.wrapping_sub(first);
        assert!(
            delta.is_multiple_of(0x20_0000) && delta < 1 << 30,
            "{delta:#x}"
        );
        assert!(may_move || delta == 0, "{entry:?} {cmdline}");
        deltas.insert(delta);
    }
    assert!(
        deltas.len() > 1,
        "three of about 500 places are the same as linked"
    );
}

#[test]
fn a_bzimage_may_unpack_itself() {
    let kernel = load_bytes(&packed_kernel(Compression::Zstd), KernelEntry::BzImage).unwrap();
    assert_eq!(kernel.entry, EntryPoint::Linux64(GuestAddress(0x10_0200)));
    assert!(kernel.header.is_some() && !kernel.kaslr);
}

#[test]
fn what_cannot_be_unpacked_unpacks_itself_or_is_named() {
    let image = testing::bzimage(b"BZh91AY&SY", 0);
    let kernel = load_bytes(&image, KernelEntry::Auto).unwrap();
    assert_eq!(kernel.entry, EntryPoint::Linux64(GuestAddress(0x10_0200)));
    let error = load_bytes(&image, KernelEntry::Pvh)
        .unwrap_err()
        .to_string();
    assert!(error.contains("packed with bzip2"), "{error}");
}

#[test]
fn a_damaged_payload_is_an_error() {
    for format in testing::FORMATS {
        let mut image = packed_kernel(format);
        let middle = image.len() - 600;
        image[middle..middle + 64].fill(0x55);
        assert!(
            load_bytes(&image, KernelEntry::Auto).is_err(),
            "{}",
            format.name()
        );
    }
}

#[test]
fn a_bzimage_cut_anywhere_is_an_error_and_no_panic() {
    let ram = testing::ram(4 << 20);
    let image = packed_kernel(Compression::Zstd);
    for len in 0..image.len() {
        for entry in [KernelEntry::Auto, KernelEntry::BzImage] {
            let payload = payload(Path::new("kernel"), entry);
            let mut file = io::Cursor::new(&image[..len]);
            assert!(load_from(&ram, &payload, &mut file, len as u64).is_err());
        }
    }
}

#[test]
fn truncated_bzimages_say_what_is_missing() {
    let image = packed_kernel(Compression::Gzip);
    let error = load_bytes(&image[..image.len() - 1], KernelEntry::Auto).unwrap_err();
    assert!(matches!(
        error,
        Error::BzImage {
            source: bzimage::Error::Truncated { .. },
            ..
        }
    ));
}

#[test]
fn files_of_other_kinds_are_named() {
    let mut arm = vec![0; 64];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    for (bytes, what) in [
        (&b""[..], "an empty file"),
        (b"#!/bin/sh\n", "a script"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (&arm, "a kernel for arm64"),
        (b"070701", "a cpio archive"),
        (
            b"hello",
            "neither an ELF file nor a bzImage nor a multiboot image",
        ),
    ] {
        let error = load_bytes(bytes, KernelEntry::Auto)
            .unwrap_err()
            .to_string();
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
    }
    let ram = testing::ram(4 << 20);
    let error = load(&ram, &payload(Path::new("/"), KernelEntry::Auto)).unwrap_err();
    assert_eq!(error.to_string(), "/ is no kernel but a directory");
    let error = load(&ram, &payload(Path::new("/dev/null"), KernelEntry::Auto)).unwrap_err();
    assert!(error.to_string().contains("not a regular file"));
    let missing = payload(Path::new("/nonexistent"), KernelEntry::Auto);
    let error = load(&ram, &missing).unwrap_err();
    assert!(matches!(error, Error::Open { .. }));
}
