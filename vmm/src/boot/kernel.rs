//! From a kernel file to a kernel in guest memory: what the file is, and which loader takes it.
//!
//! ```text
//!   file ─┬─ ELF ──────────────────────────── elf::load ─┬─ pvh ────── PVH note's entry
//!         └─ bzImage ─┬─ decompress ── elf::load ────────┴─ linux64 ── e_entry
//!                     └─ entry=bzimage, or not unpackable ─ its own 64-bit entry
//! ```

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use vm_memory::{GuestAddress, ReadVolatile};

use super::bzimage::{self, HEAD_LEN, SetupHeader};
use super::decompress::Compression;
use super::{cmdline, elf};
use crate::config::KernelEntry;
use crate::memory::GuestRam;

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is missing or not ours to read.
    #[error("cannot open the kernel {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A directory, a device, a file of something else.
    #[error("{} is no kernel but {what}", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        what: String,
    },
    /// An ELF kernel, or the one in a bzImage, is not as it should be.
    #[error("cannot load the kernel {}", .path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: elf::Error,
    },
    /// A bzImage is not as it should be.
    #[error("cannot load the kernel {}", .path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: bzimage::Error,
    },
    /// The compressed kernel cannot be unpacked here.
    #[error(
        "the kernel in {} is packed with {format}, which cannot be unpacked here; entry=bzimage lets \
         it unpack itself",
        .path.display()
    )]
    Packed {
        /// The file.
        path: PathBuf,
        /// Name of the compressor, or that it is unknown.
        format: &'static str,
    },
    /// The kernel has no such entry.
    #[error("the kernel {} has no entry for entry={entry}: {reason}", .path.display())]
    NoEntry {
        /// The file.
        path: PathBuf,
        /// The entry asked for.
        entry: &'static str,
        /// What it lacks.
        reason: &'static str,
    },
}

/// How the boot processor gets into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit, PVH.
    Pvh(GuestAddress),
    /// 64-bit, with a zero page.
    Linux64(GuestAddress),
}

/// A kernel in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Where it starts.
    pub entry: EntryPoint,
    /// End of the memory that it takes.
    pub end: GuestAddress,
    /// Setup header of the bzImage that it came from.
    pub header: Option<SetupHeader>,
    /// Whether a bzImage's own code unpacks the kernel, and so randomises it.
    pub unpacks_itself: bool,
}

impl Kernel {
    /// Highest address that an initramfs may take.
    pub fn initrd_addr_max(&self) -> u64 {
        self.header.as_ref().map_or(u64::MAX, |h| h.initrd_addr_max)
    }

    /// Longest command line that the kernel reads.
    pub fn cmdline_max(&self) -> usize {
        self.header
            .as_ref()
            .map_or(cmdline::DEFAULT_MAX, |h| h.cmdline_max)
    }
}

/// Loads the kernel at `path`.
pub fn load(ram: &GuestRam, path: &Path, entry: KernelEntry) -> Result<Kernel, Error> {
    let open_error = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(open_error)?;
    let metadata = file.metadata().map_err(open_error)?;
    if !metadata.is_file() {
        return Err(Loader { ram, path }.foreign("not a regular file"));
    }
    load_from(ram, path, &mut file, metadata.len(), entry)
}

/// Loads the kernel that the first `len` bytes of `file` are; `path` is for messages.
pub fn load_from<F: Read + Seek + ReadVolatile>(
    ram: &GuestRam,
    path: &Path,
    file: &mut F,
    len: u64,
    entry: KernelEntry,
) -> Result<Kernel, Error> {
    let loader = Loader { ram, path };
    let open_error = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    let mut head = Vec::with_capacity(HEAD_LEN);
    file.by_ref()
        .take(HEAD_LEN as u64)
        .read_to_end(&mut head)
        .map_err(open_error)?;
    if bzimage::is_bzimage(&head) {
        loader.bzimage(file, &head, len, entry)
    } else if head.starts_with(b"\x7fELF") {
        if entry == KernelEntry::BzImage {
            return Err(loader.no_entry(entry, "it is an ELF file"));
        }
        file.rewind().map_err(open_error)?;
        loader.elf(file, 0, false, entry)
    } else {
        Err(loader.foreign(foreign_kind(&head)))
    }
}

struct Loader<'a> {
    ram: &'a GuestRam,
    path: &'a Path,
}

impl Loader<'_> {
    /// Loads an ELF image and picks its entry.
    fn elf(
        &self,
        image: &mut dyn Read,
        bias: u64,
        drain: bool,
        entry: KernelEntry,
    ) -> Result<Kernel, Error> {
        let loaded = elf::load(self.ram, image, bias, drain).map_err(|source| Error::Elf {
            path: self.path.to_owned(),
            source,
        })?;
        let point = match (entry, loaded.pvh_entry) {
            (KernelEntry::Auto | KernelEntry::Pvh, Some(gpa)) => EntryPoint::Pvh(gpa),
            (KernelEntry::Pvh, None) => {
                return Err(self.no_entry(entry, "it has no PVH note (CONFIG_PVH)"));
            }
            _ => EntryPoint::Linux64(loaded.entry64),
        };
        Ok(Kernel {
            entry: point,
            end: loaded.end,
            header: None,
            unpacks_itself: false,
        })
    }

    /// Unpacks a bzImage, or leaves that to itself.
    fn bzimage<F: Read + Seek + ReadVolatile>(
        &self,
        file: &mut F,
        head: &[u8],
        file_len: u64,
        entry: KernelEntry,
    ) -> Result<Kernel, Error> {
        let error = |source| Error::BzImage {
            path: self.path.to_owned(),
            source,
        };
        let header = SetupHeader::parse(head, file_len).map_err(error)?;
        let format = self.payload_format(file, &header).map_err(error)?;
        let unpackable = format.is_some_and(Compression::is_supported);
        if entry == KernelEntry::BzImage || (entry == KernelEntry::Auto && !unpackable) {
            tracing::info!(
                format = format.map_or("unknown", Compression::name),
                "the kernel unpacks itself"
            );
            let (entry, end) = header.load(self.ram, file, file_len).map_err(error)?;
            return Ok(Kernel {
                entry: EntryPoint::Linux64(entry),
                end,
                header: Some(header),
                unpacks_itself: true,
            });
        }
        let Some(format) = format.filter(|_| unpackable) else {
            return Err(Error::Packed {
                path: self.path.to_owned(),
                format: format.map_or("an unknown compressor", Compression::name),
            });
        };
        let payload = header.payload(file).map_err(error)?;
        let mut image = format.reader(payload).map_err(|source| Error::Elf {
            path: self.path.to_owned(),
            source: elf::Error::Read { offset: 0, source },
        })?;
        let kernel = self.elf(&mut image, 0, true, entry)?;
        drop(image);
        Ok(Kernel {
            header: Some(header),
            ..kernel
        })
    }

    /// The compressor by the payload's first bytes.
    fn payload_format<F: Read + Seek>(
        &self,
        file: &mut F,
        header: &SetupHeader,
    ) -> Result<Option<Compression>, bzimage::Error> {
        let mut magic = Vec::new();
        header
            .payload(file)?
            .take(16)
            .read_to_end(&mut magic)
            .map_err(|error| bzimage::Error::Read(0, error))?;
        Ok(Compression::detect(&magic))
    }

    fn foreign(&self, what: &str) -> Error {
        Error::Foreign {
            path: self.path.to_owned(),
            what: what.to_owned(),
        }
    }

    fn no_entry(&self, entry: KernelEntry, reason: &'static str) -> Error {
        Error::NoEntry {
            path: self.path.to_owned(),
            entry: match entry {
                KernelEntry::Auto => "auto",
                KernelEntry::Pvh => "pvh",
                KernelEntry::Linux64 => "linux64",
                KernelEntry::BzImage => "bzimage",
            },
            reason,
        }
    }
}

/// Says what a file is that is no kernel for us.
fn foreign_kind(head: &[u8]) -> &'static str {
    const KINDS: [(usize, &[u8], &str); 14] = [
        (0, b"#!", "a script"),
        (0, b"\x89PNG", "a PNG picture"),
        (0x38, b"ARM\x64", "a kernel for arm64"),
        (0x38, b"RSC\x05", "a kernel for riscv"),
        (0, b"MZ", "an EFI program without a Linux kernel's header"),
        (0, b"\x1f\x8b", "a gzip file; unpack it first"),
        (0, b"\xfd7zXZ", "an xz file; unpack it first"),
        (0, b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
        (0, b"0707", "a cpio archive, as an initramfs is"),
        (0, b"\x27\x05\x19\x56", "a U-Boot image"),
        (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
        (0, b"PK\x03\x04", "a zip archive"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0, b"!<arch>", "an archive, such as a Debian package"),
    ];
    if head.is_empty() {
        return "an empty file";
    }
    KINDS
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map_or("neither an ELF file nor a bzImage", |&(_, _, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{self, TempFile};
    use vm_memory::Bytes;

    fn load_bytes(bytes: &[u8], entry: KernelEntry) -> Result<Kernel, Error> {
        let file = TempFile::new(bytes);
        load(&testing::ram(4 << 20), file.path(), entry)
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
            let kernel = load(&ram, file.path(), KernelEntry::Auto).unwrap();
            assert_eq!(kernel.entry, EntryPoint::Pvh(GuestAddress(0x10_0020)));
            assert_eq!(kernel.initrd_addr_max(), 0x7fff_ffff);
            let mut text = vec![0; 0x3000];
            ram.memory()
                .read_slice(&mut text, GuestAddress(0x10_0000))
                .unwrap();
            assert!(text == plain[64 + 3 * 56..][..0x3000], "{}", format.name());
        }
    }

    #[test]
    fn a_bzimage_may_unpack_itself() {
        let kernel = load_bytes(&packed_kernel(Compression::Zstd), KernelEntry::BzImage).unwrap();
        assert_eq!(kernel.entry, EntryPoint::Linux64(GuestAddress(0x10_0200)));
        assert!(kernel.header.is_some() && kernel.unpacks_itself);
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
            let mut file = io::Cursor::new(&image[..len]);
            let path = Path::new("kernel");
            for entry in [KernelEntry::Auto, KernelEntry::BzImage] {
                assert!(load_from(&ram, path, &mut file, len as u64, entry).is_err());
                file.set_position(0);
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
            (b"hello", "neither an ELF file nor a bzImage"),
        ] {
            let error = load_bytes(bytes, KernelEntry::Auto)
                .unwrap_err()
                .to_string();
            assert!(error.contains(what) && !error.contains('\n'), "{error}");
        }
        let ram = testing::ram(4 << 20);
        let error = load(&ram, Path::new("/"), KernelEntry::Auto).unwrap_err();
        assert!(error.to_string().contains("not a regular file"));
        let error = load(&ram, Path::new("/nonexistent"), KernelEntry::Auto).unwrap_err();
        assert!(matches!(error, Error::Open { .. }));
    }
}
