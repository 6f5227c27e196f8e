//! ELF kernels: headers to a plan, and a stream of the file's bytes to guest memory.
//!
//! The same code loads a vmlinux file and one that comes out of a decompressor, so it reads forward
//! only and holds one chunk: the program headers come first (`e_phoff` must be in the first
//! `MAX_HEAD` bytes), then every chunk goes to the segments that it meets, wherever they are.
//!
//! Invariants: nothing is written outside RAM or below 1 MiB, where the boot structures are; blocks of
//! zeros are never written, so memory that the kernel does not use yet stays with the host.
//!
//! System V ABI, AMD64 supplement; Xen's `XEN_ELFNOTE_PHYS32_ENTRY` (PVH boot ABI).

use std::io::{self, Read};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::layout::KERNEL_MIN_START;
use crate::memory::{self, GuestRam};

/// Program headers end within so many bytes of the file's start.
const MAX_HEAD: u64 = 64 << 10;
/// Most bytes of notes that are looked at.
const MAX_NOTES: u64 = 64 << 10;
/// A kernel image is no longer than this, unpacked.
const MAX_IMAGE: u64 = 2 << 30;
/// Most bytes behind the ELF image that are kept.
const MAX_TAIL: usize = 64 << 20;
/// How much of the stream is held.
const CHUNK: usize = 256 << 10;
/// Granularity in which zeros are left out.
const BLOCK: usize = 4096;

const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Why an ELF file is no kernel for this guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes did not come.
    #[error("cannot read the ELF image at offset {offset:#x}")]
    Read {
        /// Offset in the ELF image.
        offset: u64,
        /// What the file or decompressor said.
        source: io::Error,
    },
    /// The file ends too early.
    #[error("truncated: the ELF image needs {needed} bytes and ends after {got}")]
    Truncated {
        /// Bytes that its headers speak of.
        needed: u64,
        /// Bytes there are.
        got: u64,
    },
    /// Not an ELF file of the kind a kernel is.
    #[error("not a 64-bit ELF kernel for x86-64: {0}")]
    Foreign(String),
    /// Its headers contradict themselves.
    #[error("broken ELF headers: {0}")]
    Headers(String),
    /// A segment that has no place.
    #[error(
        "a segment for {start:#x}-{end:#x} does not fit into guest memory \
         ({low_mib} MiB from address 0, a kernel starts at 0x100000)"
    )]
    DoesNotFit {
        /// First guest physical address of the segment.
        start: u64,
        /// End of the segment.
        end: u64,
        /// RAM below the PCI hole, in MiB.
        low_mib: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write guest memory at {gpa:#x}")]
    Write {
        /// Guest physical address.
        gpa: u64,
        /// What `vm-memory` said.
        source: vm_memory::GuestMemoryError,
    },
    /// Guest memory could not be zeroed.
    #[error(transparent)]
    Zero(#[from] memory::Error),
}

/// What is behind the ELF image in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Nothing of interest, such as symbols: reading stops when all that matters was seen.
    Ignore,
    /// What a kernel's build appends: it is kept, and as the stream is read to its end, a decompressor gets to
    /// check its checksum.
    Keep,
}

/// What became of a kernel in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// By how much it was moved.
    pub bias: u64,
    /// 64-bit entry (`e_entry`).
    pub entry64: GuestAddress,
    /// 32-bit entry of the PVH note, where it is below 4 GiB.
    pub pvh_entry: Option<GuestAddress>,
    /// End of the highest segment.
    pub end: GuestAddress,
    /// What was behind the ELF image, if it was to be kept.
    pub tail: Vec<u8>,
}

/// One PT_LOAD: where its bytes are in the file and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    file: Range<u64>,
    gpa: u64,
    mem_len: u64,
}

/// What the headers say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    bias: u64,
    entry: u64,
    segments: Vec<Segment>,
    notes: Vec<Range<u64>>,
    /// Bytes of the file that matter.
    file_end: u64,
    /// End of the section headers, which are the last of a linker's output.
    image_end: u64,
}

/// Loads the ELF image that `image` yields at its physical addresses plus `bias`, or plus nothing where RAM has no room
/// for it there.
pub fn load(ram: &GuestRam, image: &mut dyn Read, bias: u64, tail: Tail) -> Result<Loaded, Error> {
    let mut chunk = vec![0; CHUNK];
    let mut filled = fill(image, &mut chunk, 0)?;
    let mut plan = Plan::parse(&chunk[..filled], bias)?;
    if bias > 0 && !plan.segments.iter().all(|segment| segment.fits(ram)) {
        plan = Plan::parse(&chunk[..filled], 0)?;
    }
    for segment in &plan.segments {
        segment.check_and_zero(ram)?;
    }
    let mut notes: Vec<Vec<u8>> = vec![Vec::new(); plan.notes.len()];
    let mut kept = Vec::new();
    let mut offset = 0;
    while filled > 0 {
        let bytes = &chunk[..filled];
        for segment in &plan.segments {
            segment.take(ram, offset, bytes)?;
        }
        for (note, range) in notes.iter_mut().zip(&plan.notes) {
            let (piece, _) = overlap(range, offset, bytes);
            note.extend_from_slice(piece);
        }
        if tail == Tail::Keep && kept.len() < MAX_TAIL {
            let behind = plan.image_end.max(plan.file_end)..u64::MAX;
            let (piece, _) = overlap(&behind, offset, bytes);
            kept.extend_from_slice(piece);
        }
        offset += filled as u64;
        if (tail == Tail::Ignore && offset >= plan.file_end) || offset > MAX_IMAGE {
            break;
        }
        filled = fill(image, &mut chunk, offset)?;
    }
    if offset < plan.file_end {
        let needed = plan.file_end;
        return Err(Error::Truncated {
            needed,
            got: offset,
        });
    }
    plan.loaded(&notes, kept)
}

impl Plan {
    /// Reads the file header and program headers from the image's first bytes.
    fn parse(head: &[u8], bias: u64) -> Result<Self, Error> {
        let ehdr = head.get(..EHDR_SIZE).ok_or(Error::Truncated {
            needed: EHDR_SIZE as u64,
            got: head.len() as u64,
        })?;
        check_kind(ehdr)?;
        let phoff = u64_at(ehdr, 32);
        let phentsize = u16_at(ehdr, 54);
        let phnum = u16_at(ehdr, 56);
        if usize::from(phentsize) != PHDR_SIZE || phnum == 0 {
            return Err(Error::Headers(format!(
                "{phnum} program headers of {phentsize} bytes"
            )));
        }
        let table_len = usize::from(phnum) * PHDR_SIZE;
        let end = phoff
            .checked_add(table_len as u64)
            .filter(|&end| end <= MAX_HEAD)
            .ok_or_else(|| Error::Headers(format!("program headers at offset {phoff:#x}")))?;
        let table = head
            .get(phoff as usize..end as usize)
            .ok_or(Error::Truncated {
                needed: end,
                got: head.len() as u64,
            })?;
        let sections_len = u64::from(u16_at(ehdr, 58)) * u64::from(u16_at(ehdr, 60));
        let mut plan = Self {
            image_end: u64_at(ehdr, 40).saturating_add(sections_len),
            bias,
            entry: u64_at(ehdr, 24).wrapping_add(bias),
            segments: Vec::new(),
            notes: Vec::new(),
            file_end: end,
        };
        for phdr in table.chunks_exact(PHDR_SIZE) {
            plan.add(phdr, bias)?;
        }
        if plan.segments.is_empty() {
            return Err(Error::Headers("nothing to load".to_owned()));
        }
        Ok(plan)
    }

    /// Takes one program header.
    fn add(&mut self, phdr: &[u8], bias: u64) -> Result<(), Error> {
        let kind = u32_at(phdr, 0);
        let (offset, paddr) = (u64_at(phdr, 8), u64_at(phdr, 24));
        let (file_len, mem_len) = (u64_at(phdr, 32), u64_at(phdr, 40));
        if kind == PT_INTERP {
            return Err(Error::Foreign("a program, not a kernel".to_owned()));
        }
        if (kind != PT_LOAD && kind != PT_NOTE) || (file_len == 0 && mem_len == 0) {
            return Ok(());
        }
        let broken = || {
            Error::Headers(format!(
                "segment with {file_len:#x} bytes at offset {offset:#x}, {mem_len:#x} in memory"
            ))
        };
        let file_end = offset
            .checked_add(file_len)
            .filter(|&end| end <= MAX_IMAGE)
            .ok_or_else(broken)?;
        if kind == PT_NOTE {
            if file_len <= MAX_NOTES {
                self.notes.push(offset..file_end);
                self.file_end = self.file_end.max(file_end);
            }
            return Ok(());
        }
        if file_len > mem_len {
            return Err(broken());
        }
        self.file_end = self.file_end.max(file_end);
        self.segments.push(Segment {
            file: offset..file_end,
            gpa: paddr.checked_add(bias).ok_or_else(broken)?,
            mem_len,
        });
        Ok(())
    }

    /// The result, once all bytes are in place: entries must be in what was loaded.
    fn loaded(&self, notes: &[Vec<u8>], tail: Vec<u8>) -> Result<Loaded, Error> {
        let inside = |gpa: u64| {
            let in_segment = |s: &Segment| (s.gpa..s.gpa + s.mem_len).contains(&gpa);
            self.segments.iter().any(in_segment)
        };
        if !inside(self.entry) {
            return Err(Error::Headers(format!(
                "entry {:#x} is in no segment",
                self.entry
            )));
        }
        // A 32-bit entry that the bias takes out of 32 bits is none.
        let pvh_entry = notes
            .iter()
            .find_map(|note| pvh_entry(note))
            .map(|entry| entry.wrapping_add(self.bias))
            .filter(|&entry| entry <= u64::from(u32::MAX));
        if let Some(entry) = pvh_entry
            && !inside(entry)
        {
            return Err(Error::Headers(format!(
                "PVH entry {entry:#x} is in no segment"
            )));
        }
        let end = self.segments.iter().map(|s| s.gpa + s.mem_len).max();
        Ok(Loaded {
            bias: self.bias,
            entry64: GuestAddress(self.entry),
            pvh_entry: pvh_entry.map(GuestAddress),
            end: GuestAddress(end.unwrap_or(0)),
            tail,
        })
    }
}

impl Segment {
    /// Whether the segment is RAM for a kernel.
    fn fits(&self, ram: &GuestRam) -> bool {
        self.gpa >= KERNEL_MIN_START && ram.contains(self.gpa, self.mem_len)
    }

    /// Checks that the segment fits and makes it zero.
    fn check_and_zero(&self, ram: &GuestRam) -> Result<(), Error> {
        if !self.fits(ram) {
            return Err(Error::DoesNotFit {
                start: self.gpa,
                end: self.gpa.saturating_add(self.mem_len),
                low_mib: ram.low_len() >> 20,
            });
        }
        Ok(ram.zero(self.gpa, self.mem_len)?)
    }

    /// Writes what of `bytes`, which are at `offset` of the image, belongs to the segment.
    fn take(&self, ram: &GuestRam, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let (piece, skipped) = overlap(&self.file, offset, bytes);
        let mut gpa = self.gpa + skipped;
        for block in piece.chunks(BLOCK) {
            if block != &[0; BLOCK][..block.len()] {
                ram.memory()
                    .write_slice(block, GuestAddress(gpa))
                    .map_err(|source| Error::Write { gpa, source })?;
            }
            gpa += block.len() as u64;
        }
        Ok(())
    }
}

/// The part of `bytes`, which are at `offset` of the image, that is in `range`, and how far into the
/// range it starts.
fn overlap<'a>(range: &Range<u64>, offset: u64, bytes: &'a [u8]) -> (&'a [u8], u64) {
    let start = range.start.max(offset);
    let end = range.end.min(offset + bytes.len() as u64);
    if start >= end {
        return (&[], 0);
    }
    let piece = &bytes[(start - offset) as usize..(end - offset) as usize];
    (piece, start - range.start)
}

/// Fills `chunk` from `image` as far as it goes.
fn fill(image: &mut dyn Read, chunk: &mut [u8], offset: u64) -> Result<usize, Error> {
    let mut filled = 0;
    while filled < chunk.len() {
        match image.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                let offset = offset + filled as u64;
                return Err(Error::Read { offset, source });
            }
        }
    }
    Ok(filled)
}

/// Says what an ELF file is that is no x86-64 executable.
fn check_kind(ehdr: &[u8]) -> Result<(), Error> {
    let foreign = |what: String| Err(Error::Foreign(what));
    if !ehdr.starts_with(b"\x7fELF") {
        return foreign(format!("starts with {:02x?}", &ehdr[..4]));
    }
    match (ehdr[4], ehdr[5]) {
        (2, 1) => {}
        (1, 1) => return foreign("a 32-bit file".to_owned()),
        (_, 2) => return foreign("a big-endian file".to_owned()),
        (class, data) => return foreign(format!("class {class}, data encoding {data}")),
    }
    match (u16_at(ehdr, 16), u16_at(ehdr, 18)) {
        (ET_EXEC | ET_DYN, EM_X86_64) => Ok(()),
        (_, EM_X86_64) => foreign(format!("file type {}", u16_at(ehdr, 16))),
        (_, 183) => foreign("made for arm64".to_owned()),
        (_, 243) => foreign("made for riscv".to_owned()),
        (_, machine) => foreign(format!("made for machine {machine}")),
    }
}

/// Finds the PVH entry in a segment of notes. Notes that make no sense end the search.
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while notes.len() >= 12 {
        let (name_len, desc_len) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize);
        let desc_start = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc_end = desc_start.checked_add(desc_len)?;
        let name = notes.get(12..12usize.checked_add(name_len)?)?;
        let desc = notes.get(desc_start..desc_end)?;
        if name == b"Xen\0" && u32_at(notes, 8) == XEN_ELFNOTE_PHYS32_ENTRY {
            return match desc_len {
                4 => Some(u64::from(u32_at(desc, 0))),
                8 => Some(u64_at(desc, 0)),
                _ => None,
            };
        }
        notes = notes.get(desc_end.checked_next_multiple_of(4)?..)?;
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
#[path = "elf_tests.rs"]
mod tests;
