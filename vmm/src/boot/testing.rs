//! Small kernels and packed payloads for the tests of this module.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::decompress::Compression;
use crate::config::MemoryConfig;
use crate::memory::GuestRam;

/// Formats that are unpacked here and really pack.
pub(super) const FORMATS: [Compression; 4] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Zstd,
    Compression::Lz4,
];

/// Guest RAM of that size.
pub(super) fn ram(size_bytes: u64) -> GuestRam {
    GuestRam::new(&MemoryConfig::of(size_bytes)).unwrap()
}

/// Bytes in which the x86 branch filter finds calls to change: `e8` and a displacement.
pub(super) fn x86_like_bytes(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len as u32 / 8)
        .flat_map(|i| {
            [
                0xe8,
                i as u8,
                (i >> 8) as u8,
                (i >> 16) as u8,
                0,
                0x90,
                0x0f,
                0x1f,
            ]
        })
        .collect();
    bytes.resize(len, 0);
    bytes
}

/// Packs as the kernel's build does, appended length included.
pub(super) fn pack(format: Compression, plain: &[u8]) -> Vec<u8> {
    let mut packed = match format {
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(plain).unwrap();
            return encoder.finish().unwrap();
        }
        Compression::Xz => {
            let mut options = lzma_rust2::XzOptions::with_preset(1);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            writer.write_all(plain).unwrap();
            writer.finish().unwrap()
        }
        Compression::Zstd => {
            ruzstd::encoding::compress_to_vec(plain, ruzstd::encoding::CompressionLevel::Fastest)
        }
        Compression::Lz4 => {
            let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
            for block in plain.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
            packed
        }
        Compression::None => plain.to_vec(),
        other => panic!("cannot pack {}", other.name()),
    };
    packed.extend((plain.len() as u32).to_le_bytes());
    packed
}

/// A file that is gone when the test is.
pub(super) struct TempFile(PathBuf);

impl TempFile {
    /// Makes a file with these bytes.
    pub(super) fn new(bytes: &[u8]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "berth-boot-test-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// One program header of [`elf`].
pub(super) struct Phdr {
    /// `p_type`.
    pub(super) kind: u32,
    /// `p_paddr`.
    pub(super) paddr: u64,
    /// Bytes in the file.
    pub(super) bytes: Vec<u8>,
    /// `p_memsz`.
    pub(super) mem_len: u64,
}

/// An ELF executable with these program headers, its bytes in the order given.
pub(super) fn elf(entry: u64, phdrs: &[Phdr]) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes());
    image.extend(62u16.to_le_bytes());
    image.extend(1u32.to_le_bytes());
    image.extend(entry.to_le_bytes());
    image.extend(64u64.to_le_bytes());
    // No section headers, but where they would be: at the image's end.
    let len = 64 + phdrs.iter().map(|p| 56 + p.bytes.len()).sum::<usize>();
    image.extend((len as u64).to_le_bytes());
    image.extend([0; 6]);
    image.extend(56u16.to_le_bytes());
    image.extend((phdrs.len() as u16).to_le_bytes());
    image.extend([0; 6]);
    let mut offset = 64 + 56 * phdrs.len() as u64;
    for phdr in phdrs {
        image.extend(phdr.kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for field in [
            offset,
            phdr.paddr | 0xffff_ffff_8000_0000,
            phdr.paddr,
            phdr.bytes.len() as u64,
            phdr.mem_len,
            4096,
        ] {
            image.extend(field.to_le_bytes());
        }
        offset += phdr.bytes.len() as u64;
    }
    for phdr in phdrs {
        image.extend(&phdr.bytes);
    }
    image
}

/// A note segment with the PVH entry.
pub(super) fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for (name, kind, desc) in [
        (&b"GNU\0"[..], 3u32, &[1u8, 2, 3][..]),
        (b"Xen\0", 18, &entry.to_le_bytes()),
    ] {
        note.extend((name.len() as u32).to_le_bytes());
        note.extend((desc.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        note.extend(name);
        note.extend(desc);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// A small kernel: text at 1 MiB with a PVH note, data with a bss at 2 MiB.
pub(super) fn small_kernel() -> Vec<u8> {
    elf(
        0x10_0010,
        &[
            Phdr {
                kind: 1,
                paddr: 0x10_0000,
                bytes: x86_like_bytes(0x3000),
                mem_len: 0x3000,
            },
            Phdr {
                kind: 4,
                paddr: 0x10_0000,
                bytes: pvh_note(0x10_0020),
                mem_len: 0x28,
            },
            Phdr {
                kind: 1,
                paddr: 0x20_0000,
                bytes: vec![0xdd; 0x1234],
                mem_len: 0x8_0000,
            },
        ],
    )
}

/// A bzImage around a payload, which prefers 1 MiB and asks for `init_size` bytes.
pub(super) fn bzimage(payload: &[u8], init_size: u32) -> Vec<u8> {
    let payload_offset = 0x300u32;
    let mut image = vec![0; 512 * 2];
    image.extend(vec![0xcc; payload_offset as usize]);
    image.extend(payload);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &payload_offset.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &init_size.to_le_bytes());
    image
}

/// A directory that is gone, with all in it, when the test is.
pub(super) struct TempDir(PathBuf);

impl TempDir {
    /// Makes an empty directory.
    pub(super) fn new() -> Self {
        let file = TempFile::new(b"");
        let path = file.path().with_extension("d");
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
