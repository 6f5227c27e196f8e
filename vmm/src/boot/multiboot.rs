//! Multiboot images, version 1: the header, a loader, and what the image is told.
//!
//! ```text
//!   file ─ header in the first 8 KiB ─┬─ bit 16: the header's own addresses ─┐
//!                                     └─ ELF32 program headers ──────────────┴─▶ guest memory
//!   boot processor: 32-bit protected mode, eax = 0x2badb002, ebx ─▶ information (one page)
//!                                                 ├─ memory sizes and map
//!                                                 ├─ command line, the image's name first
//!                                                 └─ one module: the initramfs
//! ```
//!
//! Small test programs are linked below 1 MiB, so an image may lie there, out of the way of what it is
//! told: [`TAKEN`] names the ranges that are not for it. Everything else is the image's; the page tables
//! of the 64-bit entry are not written for it.
//!
//! Multiboot Specification 0.6.96, 3.1 (header), 3.2 (machine state), 3.3 (boot information).

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, ReadVolatile};

use super::Handover;
use super::memmap;
use crate::memory::layout::{
    ACPI_END, BOOT_GDT, CMDLINE_START, EBDA_START, KERNEL_MIN_START, MULTIBOOT_INFO,
};
use crate::memory::{self, GuestRam};

/// What a boot loader leaves in `eax` (3.2).
pub const BOOTLOADER_MAGIC: u32 = 0x2bad_b002;
/// Longest command line that an image is given.
pub const CMDLINE_MAX: usize = 4095;
/// The header is in so many bytes of the file's start, on a 4-byte boundary.
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
const MULTIBOOT2_MAGIC: u32 = 0xe852_50d6;

/// Flags of the header: requests 0 to 15 must be met or the image refused, 16 is the address fields.
const PAGE_ALIGN: u32 = 1;
const MEMORY_INFO: u32 = 1 << 1;
const REQUIRED: u32 = 0xffff;
const ADDRESSES: u32 = 1 << 16;

/// Flags of the information, in the order of its fields.
const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// Where things are in the information's page.
const MODULE_AT: u64 = MULTIBOOT_INFO + 0x80;
const NAME_AT: u64 = MULTIBOOT_INFO + 0xc0;
const MODULE_NAME_AT: u64 = MULTIBOOT_INFO + 0xe0;
const MAP_AT: u64 = MULTIBOOT_INFO + 0x100;
const NAME: &[u8] = b"berth-vmm\0";
const MODULE_NAME: &[u8] = b"initramfs\0";

/// What an image must leave alone below 1 MiB, and what is there.
const TAKEN: [(Range<u64>, &str); 3] = [
    (
        BOOT_GDT..MULTIBOOT_INFO + 0x1000,
        "what the image is told with",
    ),
    (CMDLINE_START..CMDLINE_START + 0x1_0000, "the command line"),
    (EBDA_START..ACPI_END, "the ACPI tables' area"),
];

const EHDR_SIZE: usize = 52;
const PHDR_SIZE: usize = 32;
const EM_386: u16 = 3;
const PT_LOAD: u32 = 1;

/// Why a multiboot image cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no header, or it is of the other version.
    #[error("{0}")]
    NoHeader(&'static str),
    /// The header asks for what is not there.
    #[error("the multiboot header asks for what this machine has not: flags {flags:#x}")]
    Unmet {
        /// The requests that are not met.
        flags: u32,
    },
    /// The addresses of the header, or the ELF headers, contradict themselves.
    #[error("broken multiboot image: {0}")]
    Broken(String),
    /// It needs bytes that the file has not.
    #[error("truncated: the image needs {needed} bytes and the file has {got}")]
    Truncated {
        /// Bytes that its headers speak of.
        needed: u64,
        /// Bytes there are.
        got: u64,
    },
    /// A part of the image has no place.
    #[error(
        "a part of the image at {start:#x}-{end:#x} does not fit into guest memory ({low_mib} MiB \
         from address 0)"
    )]
    DoesNotFit {
        /// First guest physical address.
        start: u64,
        /// Its end.
        end: u64,
        /// RAM below the PCI hole, in MiB.
        low_mib: u64,
    },
    /// A part of the image lies where something else has to.
    #[error(
        "a part of the image at {start:#x}-{end:#x} lies on {what} ({:#x}-{:#x})",
        taken.start, taken.end
    )]
    InTheWay {
        /// First guest physical address.
        start: u64,
        /// Its end.
        end: u64,
        /// What is there.
        what: &'static str,
        /// Where that is.
        taken: Range<u64>,
    },
    /// The file could not be read.
    #[error("cannot read the image at offset {offset:#x}")]
    Seek {
        /// Offset in the file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The file could not be read into guest memory.
    #[error("cannot read {len:#x} bytes of the image to {gpa:#x}")]
    Read {
        /// Guest physical address.
        gpa: u64,
        /// How many.
        len: u64,
        /// What `vm-memory` said.
        source: GuestMemoryError,
    },
    /// Guest memory could not be zeroed.
    #[error(transparent)]
    Zero(#[from] memory::Error),
}

/// A multiboot header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    offset: usize,
    flags: u32,
    addresses: Option<Addresses>,
}

/// The address fields of a header, for images that are no ELF files ("a.out kludge").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// An image in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction.
    pub entry: GuestAddress,
    /// End of its memory, at least 1 MiB.
    pub end: GuestAddress,
}

/// A piece of the file and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    offset: u64,
    file_len: u64,
    gpa: u64,
    mem_len: u64,
}

impl Header {
    /// The header in the file's first bytes, if there is one.
    pub fn find(head: &[u8]) -> Option<Self> {
        let searched = &head[..head.len().min(SEARCH)];
        (0..searched.len())
            .step_by(4)
            .find_map(|at| Self::parse(searched, at))
    }

    fn parse(head: &[u8], at: usize) -> Option<Self> {
        let word = |index: usize| u32_at(head, at + index * 4);
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let addresses = if flags & ADDRESSES == 0 {
            None
        } else {
            Some(Addresses {
                header: word(3)?,
                load: word(4)?,
                load_end: word(5)?,
                bss_end: word(6)?,
                entry: word(7)?,
            })
        };
        Some(Self {
            offset: at,
            flags,
            addresses,
        })
    }

    /// Whether the file is to be taken for a multiboot image where nobody has said what it is: 64-bit
    /// ELF kernels have ways of their own.
    pub fn is_first_choice(&self, head: &[u8]) -> bool {
        self.addresses.is_some() || head.starts_with(b"\x7fELF\x01")
    }

    /// Loads the image that the first `file_len` bytes of `file` are; `head` is its start.
    pub fn load<F: Read + Seek + ReadVolatile>(
        &self,
        ram: &GuestRam,
        file: &mut F,
        head: &[u8],
        file_len: u64,
    ) -> Result<Loaded, Error> {
        let unmet = self.flags & REQUIRED & !(PAGE_ALIGN | MEMORY_INFO);
        if unmet != 0 {
            return Err(Error::Unmet { flags: unmet });
        }
        let (segments, entry) = match self.addresses {
            Some(addresses) => addresses.segments(self.offset, file_len)?,
            None => elf_segments(head)?,
        };
        let inside = |s: &Segment| (s.gpa..s.gpa + s.mem_len).contains(&entry);
        if !segments.iter().any(inside) {
            let what = format!("entry {entry:#x} is in no part of it");
            return Err(Error::Broken(what));
        }
        for segment in &segments {
            segment.check(ram, file_len)?;
        }
        for segment in &segments {
            segment.load(ram, file)?;
        }
        let end = segments.iter().map(|s| s.gpa + s.mem_len).max();
        Ok(Loaded {
            entry: GuestAddress(entry),
            end: GuestAddress(end.unwrap_or(0).max(KERNEL_MIN_START)),
        })
    }
}

/// Says why there is no header to go by.
pub fn no_header(head: &[u8]) -> Error {
    let searched = &head[..head.len().min(SEARCH)];
    let version2 = (0..searched.len())
        .step_by(8)
        .any(|at| u32_at(searched, at) == Some(MULTIBOOT2_MAGIC));
    Error::NoHeader(if version2 {
        "a multiboot 2 image; only version 1 can be loaded"
    } else {
        "no multiboot header in its first 8 KiB"
    })
}

impl Addresses {
    fn segments(&self, header_offset: usize, file_len: u64) -> Result<(Vec<Segment>, u64), Error> {
        let broken = |what: &str| Error::Broken(format!("{what} in the header: {self:x?}"));
        let [header, load, load_end, bss_end] =
            [self.header, self.load, self.load_end, self.bss_end].map(u64::from);
        // The file's byte that comes first in memory.
        let offset = header
            .checked_sub(load)
            .and_then(|before| (header_offset as u64).checked_sub(before))
            .ok_or_else(|| broken("load address"))?;
        let file_len = match load_end {
            0 => file_len.saturating_sub(offset),
            end => end
                .checked_sub(load)
                .ok_or_else(|| broken("end of the load"))?,
        };
        let mem_len = match bss_end {
            0 => file_len,
            end => end
                .checked_sub(load)
                .filter(|&len| len >= file_len)
                .ok_or_else(|| broken("end of the bss"))?,
        };
        let segment = Segment {
            offset,
            file_len,
            gpa: load,
            mem_len,
        };
        Ok((vec![segment], self.entry.into()))
    }
}

/// The PT_LOAD entries and the entry point of an ELF32 file.
fn elf_segments(head: &[u8]) -> Result<(Vec<Segment>, u64), Error> {
    let broken = |what: String| Error::Broken(what);
    let ehdr = head
        .get(..EHDR_SIZE)
        .ok_or_else(|| broken("no ELF header".to_owned()))?;
    if !ehdr.starts_with(b"\x7fELF\x01\x01") || u16_at(ehdr, 18) != Some(EM_386) {
        let what = "neither addresses in the multiboot header nor a 32-bit ELF file for x86";
        return Err(broken(what.to_owned()));
    }
    let field = |at| u32_at(ehdr, at).unwrap_or(0);
    let half = |at| usize::from(u16_at(ehdr, at).unwrap_or(0));
    let (entry, table) = (field(24), field(28) as usize);
    let (size, count) = (half(42), half(44));
    let phdrs = table
        .checked_add(count * PHDR_SIZE)
        .and_then(|end| head.get(table..end))
        .filter(|_| size == PHDR_SIZE)
        .ok_or_else(|| {
            broken(format!(
                "{count} program headers of {size} bytes at offset {table:#x}"
            ))
        })?;
    let mut segments = Vec::new();
    for phdr in phdrs.chunks_exact(PHDR_SIZE) {
        let field = |at| u64::from(u32_at(phdr, at).unwrap_or(0));
        let (file_len, mem_len) = (field(16), field(20));
        if field(0) != u64::from(PT_LOAD) || mem_len == 0 {
            continue;
        }
        if file_len > mem_len {
            return Err(broken(format!(
                "{file_len:#x} bytes of a segment of {mem_len:#x}"
            )));
        }
        segments.push(Segment {
            offset: field(4),
            file_len,
            gpa: field(12),
            mem_len,
        });
    }
    Ok((segments, entry.into()))
}

impl Segment {
    /// Checks that its bytes are in the file and that its place is RAM which is free for it.
    fn check(&self, ram: &GuestRam, file_len: u64) -> Result<(), Error> {
        let (start, end) = (self.gpa, self.gpa + self.mem_len);
        if end > ram.low_len() {
            return Err(Error::DoesNotFit {
                start,
                end,
                low_mib: ram.low_len() >> 20,
            });
        }
        let met = |taken: &Range<u64>| start < taken.end && taken.start < end;
        if let Some((taken, what)) = TAKEN.into_iter().find(|(taken, _)| met(taken)) {
            return Err(Error::InTheWay {
                start,
                end,
                what,
                taken,
            });
        }
        let needed = self.offset + self.file_len;
        if needed > file_len {
            return Err(Error::Truncated {
                needed,
                got: file_len,
            });
        }
        Ok(())
    }

    fn load<F: Read + Seek + ReadVolatile>(
        &self,
        ram: &GuestRam,
        file: &mut F,
    ) -> Result<(), Error> {
        ram.zero(self.gpa, self.mem_len)?;
        let offset = self.offset;
        file.seek(SeekFrom::Start(offset))
            .map_err(|source| Error::Seek { offset, source })?;
        let (gpa, len) = (self.gpa, self.file_len);
        ram.memory()
            .read_exact_volatile_from(GuestAddress(gpa), file, len as usize)
            .map_err(|source| Error::Read { gpa, len, source })
    }
}

/// Writes the boot information; returns its address, which the boot processor finds in `ebx`.
pub fn write(ram: &GuestRam, handover: &Handover) -> Result<GuestAddress, GuestMemoryError> {
    let memory = ram.memory();
    let mut map = Vec::new();
    for entry in memmap::build(ram) {
        map.extend(20u32.to_le_bytes());
        map.extend(entry.start.to_le_bytes());
        map.extend(entry.len.to_le_bytes());
        map.extend((entry.kind as u32).to_le_bytes());
    }
    let mut info = [0u32; 18];
    info[0] = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    info[1] = (EBDA_START >> 10) as u32;
    info[2] = ((ram.low_len() - KERNEL_MIN_START) >> 10) as u32;
    info[4] = handover.cmdline.0 as u32;
    info[5] = u32::from(handover.initramfs.is_some());
    info[6] = MODULE_AT as u32;
    info[11] = map.len() as u32;
    info[12] = MAP_AT as u32;
    info[16] = NAME_AT as u32;
    memory.write_slice(&words(&info), GuestAddress(MULTIBOOT_INFO))?;
    memory.write_slice(&map, GuestAddress(MAP_AT))?;
    memory.write_slice(NAME, GuestAddress(NAME_AT))?;
    if let Some(initramfs) = handover.initramfs {
        // Below the PCI hole, so both ends have 32 bits.
        let (start, end) = (initramfs.start.0, initramfs.start.0 + initramfs.len);
        let module = [start as u32, end as u32, MODULE_NAME_AT as u32, 0];
        memory.write_slice(&words(&module), GuestAddress(MODULE_AT))?;
        memory.write_slice(MODULE_NAME, GuestAddress(MODULE_NAME_AT))?;
    }
    Ok(GuestAddress(MULTIBOOT_INFO))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
#[path = "multiboot_tests.rs"]
mod tests;
