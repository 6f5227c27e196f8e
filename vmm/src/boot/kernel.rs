//! From a kernel file to a kernel in guest memory: what the file is, and which loader takes it.
//!
//! ```text
//!   file ─┬─ multiboot header ──────── multiboot::load ──── the image's own entry
//!         ├─ ELF ───────────────────── elf::load ─┬─ pvh ─────────── PVH note's entry
//!         └─ bzImage ─┬─ decompress ── elf::load ─┴─ linux64, kaslr ── e_entry
//!                     └─ entry=bzimage, or not unpackable ────────────── its own 64-bit entry
//! ```

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;

use vm_memory::{GuestAddress, ReadVolatile};

use super::bzimage::{self, HEAD_LEN, SetupHeader};
use super::cmdline;
use super::decompress::Compression;
use super::elf::{self, Loaded, Tail};
use super::kaslr::{self, Relocations};
use super::multiboot;
use crate::config::{KernelEntry, PayloadConfig};
use crate::memory::GuestRam;
use crate::memory::layout::HIGH_RAM_START;

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
    /// A multiboot image is not as it should be.
    #[error("cannot load the multiboot image {}", .path.display())]
    Multiboot {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: multiboot::Error,
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
    /// The kernel could not be randomised.
    #[error("cannot randomise the kernel {}", .path.display())]
    Kaslr {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: kaslr::Error,
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
    /// 32-bit, multiboot.
    Multiboot(GuestAddress),
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
    /// Whether the kernel is to be told that it may randomise its memory areas: where its own code does
    /// not unpack it and the command line does not forbid it.
    pub kaslr: bool,
}

impl Kernel {
    /// Highest address that an initramfs may take: what the header says is for boot loaders that load low.
    pub fn initrd_addr_max(&self) -> u64 {
        self.header
            .as_ref()
            .filter(|_| self.end.0 <= HIGH_RAM_START)
            .map_or(u64::MAX, |h| h.initrd_addr_max)
    }

    /// The command line that it gets: a multiboot image's begins with the image's name.
    pub fn cmdline<'a>(&self, payload: &'a PayloadConfig) -> Cow<'a, str> {
        match self.entry {
            EntryPoint::Multiboot(_) => {
                let name = payload.kernel.file_name().unwrap_or_default();
                format!("{} {}", name.to_string_lossy(), payload.cmdline).into()
            }
            _ => Cow::Borrowed(&payload.cmdline),
        }
    }

    /// Longest command line that the kernel reads.
    pub fn cmdline_max(&self) -> usize {
        if matches!(self.entry, EntryPoint::Multiboot(_)) {
            return multiboot::CMDLINE_MAX;
        }
        self.header
            .as_ref()
            .map_or(cmdline::DEFAULT_MAX, |h| h.cmdline_max)
    }
}

/// Loads the payload's kernel.
pub fn load(ram: &GuestRam, payload: &PayloadConfig) -> Result<Kernel, Error> {
    let loader = Loader { ram, payload };
    if let Some(what) = super::instead_of_a_file(&payload.kernel) {
        return Err(loader.foreign(what));
    }
    let mut file = File::open(&payload.kernel).map_err(|error| loader.open_error(error))?;
    let metadata = file.metadata().map_err(|error| loader.open_error(error))?;
    if !metadata.is_file() {
        return Err(loader.foreign("not a regular file"));
    }
    load_from(ram, payload, &mut file, metadata.len())
}

/// Loads the kernel that the first `len` bytes of `file` are, as the payload says; its path is for
/// messages only.
pub fn load_from<F: Read + Seek + ReadVolatile>(
    ram: &GuestRam,
    payload: &PayloadConfig,
    file: &mut F,
    len: u64,
) -> Result<Kernel, Error> {
    let loader = Loader { ram, payload };
    let mut head = Vec::with_capacity(HEAD_LEN);
    file.by_ref()
        .take(HEAD_LEN as u64)
        .read_to_end(&mut head)
        .map_err(|error| loader.open_error(error))?;
    let header = multiboot::Header::find(&head);
    let is_bzimage = bzimage::is_bzimage(&head);
    if payload.entry == KernelEntry::Multiboot {
        let header = header.ok_or_else(|| loader.multiboot_error(multiboot::no_header(&head)))?;
        loader.multiboot(&header, file, &head, len)
    } else if let Some(header) = header.filter(|header| {
        payload.entry == KernelEntry::Auto && !is_bzimage && header.is_first_choice(&head)
    }) {
        loader.multiboot(&header, file, &head, len)
    } else if is_bzimage {
        loader.bzimage(file, &head, len)
    } else if head.starts_with(b"\x7fELF") {
        file.rewind().map_err(|error| loader.open_error(error))?;
        loader.vmlinux(file)
    } else {
        Err(loader.foreign(foreign_kind(&head)))
    }
}

struct Loader<'a> {
    ram: &'a GuestRam,
    payload: &'a PayloadConfig,
}

impl Loader<'_> {
    /// Loads a multiboot image.
    fn multiboot<F: Read + Seek + ReadVolatile>(
        &self,
        header: &multiboot::Header,
        file: &mut F,
        head: &[u8],
        len: u64,
    ) -> Result<Kernel, Error> {
        let loaded = header
            .load(self.ram, file, head, len)
            .map_err(|source| self.multiboot_error(source))?;
        Ok(Kernel {
            entry: EntryPoint::Multiboot(loaded.entry),
            end: loaded.end,
            header: None,
            kaslr: false,
        })
    }

    /// Loads an ELF file.
    fn vmlinux(&self, file: &mut dyn Read) -> Result<Kernel, Error> {
        if self.payload.entry == KernelEntry::BzImage {
            return Err(self.no_entry("it is an ELF file"));
        }
        let loaded = self.elf(file, self.bias(None), Tail::Ignore)?;
        let entry = match (self.payload.entry, loaded.pvh_entry) {
            (KernelEntry::Auto, Some(gpa)) => EntryPoint::Pvh(gpa),
            _ => self.entry_as_asked(&loaded)?,
        };
        Ok(self.kernel(&loaded, entry, None))
    }

    /// Unpacks a bzImage, or leaves that to itself.
    fn bzimage<F: Read + Seek + ReadVolatile>(
        &self,
        file: &mut F,
        head: &[u8],
        file_len: u64,
    ) -> Result<Kernel, Error> {
        let error = |source| Error::BzImage {
            path: self.payload.kernel.clone(),
            source,
        };
        let header = SetupHeader::parse(head, file_len).map_err(error)?;
        let format = payload_format(file, &header).map_err(error)?;
        let unpackable = format.filter(|format| format.is_supported());
        match (self.payload.entry, unpackable) {
            (KernelEntry::BzImage, _) | (KernelEntry::Auto, None) => {
                let format = format.map_or("unknown", Compression::name);
                tracing::info!(format, "the kernel unpacks itself");
                let (entry, end) = header.load(self.ram, file, file_len).map_err(error)?;
                Ok(Kernel {
                    entry: EntryPoint::Linux64(entry),
                    end,
                    header: Some(header),
                    kaslr: false,
                })
            }
            (_, Some(format)) => {
                let packed = header.payload(file).map_err(error)?;
                self.packed(format, packed, header)
            }
            (_, None) => Err(Error::Packed {
                path: self.payload.kernel.clone(),
                format: format.map_or("an unknown compressor", Compression::name),
            }),
        }
    }

    /// Unpacks the kernel of a bzImage, and moves it unless that is forbidden.
    fn packed(
        &self,
        format: Compression,
        packed: impl Read,
        header: SetupHeader,
    ) -> Result<Kernel, Error> {
        let mut image = format
            .reader(packed)
            .map_err(|source| self.elf_error(elf::Error::Read { offset: 0, source }))?;
        let loaded = self.elf(&mut image, self.bias(Some(&header)), Tail::Keep)?;
        drop(image);
        let entry = self.entry_as_asked(&loaded)?;
        if matches!(entry, EntryPoint::Linux64(_)) && !kaslr::is_forbidden(&self.payload.cmdline) {
            self.randomise(&loaded, &header)?;
        }
        Ok(self.kernel(&loaded, entry, Some(header)))
    }

    /// Moves the kernel in virtual memory, where it comes with its relocations.
    fn randomise(&self, loaded: &Loaded, header: &SetupHeader) -> Result<(), Error> {
        let error = |source| Error::Kaslr {
            path: self.payload.kernel.clone(),
            source,
        };
        let Some(relocations) = Relocations::parse(&loaded.tail) else {
            tracing::debug!("the kernel has no relocations, its image stays where it was linked");
            return Ok(());
        };
        let (start, size, alignment) = header.span();
        let delta = kaslr::delta(kaslr::random().map_err(error)?, start, size, alignment);
        relocations
            .apply(self.ram, loaded.bias, loaded.end, delta)
            .map_err(error)
    }

    /// The entry that was asked for; without a wish, the 64-bit one.
    fn entry_as_asked(&self, loaded: &Loaded) -> Result<EntryPoint, Error> {
        match (self.payload.entry, loaded.pvh_entry) {
            (KernelEntry::Pvh, Some(gpa)) => Ok(EntryPoint::Pvh(gpa)),
            (KernelEntry::Pvh, None) => Err(self.no_entry("it has no PVH note (CONFIG_PVH)")),
            _ => Ok(EntryPoint::Linux64(loaded.entry64)),
        }
    }

    /// How far above the addresses that it is linked for an ELF kernel is to be: where there is a DMA window, above that,
    /// as what lies in the window is never merged. Only by its 64-bit entry can it be entered there.
    fn bias(&self, header: Option<&SetupHeader>) -> u64 {
        let may = matches!(self.payload.entry, KernelEntry::Auto | KernelEntry::Linux64)
            && header.is_none_or(|header| header.above_4_gib);
        match self.ram.window() {
            Some(_) if may => HIGH_RAM_START,
            _ => 0,
        }
    }

    fn elf(&self, image: &mut dyn Read, bias: u64, tail: Tail) -> Result<Loaded, Error> {
        elf::load(self.ram, image, bias, tail).map_err(|source| self.elf_error(source))
    }

    fn kernel(&self, loaded: &Loaded, entry: EntryPoint, header: Option<SetupHeader>) -> Kernel {
        Kernel {
            entry,
            end: loaded.end,
            header,
            kaslr: !kaslr::is_forbidden(&self.payload.cmdline),
        }
    }

    fn open_error(&self, source: io::Error) -> Error {
        Error::Open {
            path: self.payload.kernel.clone(),
            source,
        }
    }

    fn elf_error(&self, source: elf::Error) -> Error {
        Error::Elf {
            path: self.payload.kernel.clone(),
            source,
        }
    }

    fn multiboot_error(&self, source: multiboot::Error) -> Error {
        Error::Multiboot {
            path: self.payload.kernel.clone(),
            source,
        }
    }

    fn foreign(&self, what: &str) -> Error {
        Error::Foreign {
            path: self.payload.kernel.clone(),
            what: what.to_owned(),
        }
    }

    fn no_entry(&self, reason: &'static str) -> Error {
        Error::NoEntry {
            path: self.payload.kernel.clone(),
            entry: match self.payload.entry {
                KernelEntry::Auto => "auto",
                KernelEntry::Pvh => "pvh",
                KernelEntry::Linux64 => "linux64",
                KernelEntry::BzImage => "bzimage",
                KernelEntry::Multiboot => "multiboot",
            },
            reason,
        }
    }
}

/// The compressor by the payload's first bytes.
fn payload_format<F: Read + Seek>(
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
        .map_or(
            "neither an ELF file nor a bzImage nor a multiboot image",
            |&(_, _, kind)| kind,
        )
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
