//! All RAM of a guest: its pieces, and what can be done to them.
//!
//! ```text
//!             shared             private            window
//!  0        ┬ memfd, offset 0    anonymous          memfd, [0, W): backends map this
//!           │                                       ─ W: no RAM up to 4 GiB
//!  ≤ 3 GiB  ┴
//!  4 GiB    ┬ memfd, behind      anonymous          anonymous: mergeable
//!           ┴
//! ```

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::mapping::{self, Advice};
use super::mode::Mode;
use super::{Error, layout};
use crate::config::{HugePages, MemoryConfig, Mergeable};

/// A page of the host.
const PAGE: u64 = 4096;
/// What `st_blocks` counts.
const BLOCK: u64 = 512;
/// Unit of the size.
const UNIT: u64 = 2 << 20;
/// How much is zeroed at once where it has to be written.
const ZEROS: [u8; 4096] = [0; 4096];

/// What a piece of guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A memfd, mapped shared.
    Shared,
    /// Anonymous memory of this process.
    Private,
}

/// A piece of guest RAM as it is mapped here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRange {
    /// Guest physical start.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Its address in this process.
    pub host: u64,
    /// What it is made of.
    pub kind: Kind,
}

/// All RAM of a guest. A clone is another handle on the same memory.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    window: Option<GuestMemoryMmap>,
    config: MemoryConfig,
    mode: Mode,
}

impl GuestRam {
    /// Makes shared memory, whatever the configuration says of sharing: for tests and tools without devices.
    pub fn new(config: &MemoryConfig) -> Result<Self, Error> {
        Self::with_mode(config, Mode::Shared)
    }

    /// Makes and maps the memory.
    pub fn with_mode(config: &MemoryConfig, mode: Mode) -> Result<Self, Error> {
        let size_bytes = config.size_bytes;
        if size_bytes == 0 || !size_bytes.is_multiple_of(UNIT) {
            return Err(Error::Size(size_bytes));
        }
        let (low, high) = mode.split(size_bytes);
        let file = match mode {
            Mode::Shared => Some(mapping::sealed_memfd(
                mapping::GUEST_RAM,
                config,
                size_bytes,
            )?),
            Mode::Window { .. } => Some(mapping::sealed_memfd(mapping::GUEST_RAM, config, low)?),
            Mode::Private => None,
        };
        let part = |offset| match &file {
            Some(file) => file
                .try_clone()
                .map(|file| Some(FileOffset::new(file, offset)))
                .map_err(|source| Error::Create { size_bytes, source }),
            None => Ok(None),
        };
        let mut regions = vec![Arc::new(mapping::map(config, part(0)?, 0, low)?)];
        let window = matches!(mode, Mode::Window { .. }).then(|| regions.clone());
        if high > 0 {
            let file = match mode {
                Mode::Shared => part(low)?,
                Mode::Private | Mode::Window { .. } => None,
            };
            let start = layout::HIGH_RAM_START;
            regions.push(Arc::new(mapping::map(config, file, start, high)?));
        }
        let joined = |regions| GuestMemoryMmap::from_arc_regions(regions).map_err(Error::Regions);
        let ram = Self {
            memory: joined(regions)?,
            window: window.map(joined).transpose()?,
            config: *config,
            mode,
        };
        ram.as_configured()?;
        Ok(ram)
    }

    fn as_configured(&self) -> Result<(), Error> {
        if self.config.mergeable == Mergeable::Always {
            for range in self.mergeable_ranges() {
                self.advise(range.gpa, range.len, Advice::Mergeable)?;
            }
        }
        if self.config.prefault {
            for region in self.memory.iter() {
                mapping::prefault(region).map_err(|source| Error::Prefault {
                    gpa: region.start_addr().raw_value(),
                    len: region.len(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Guest memory; a shared region has its file and offset.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The part that other processes map, where that is not all of it: one region from address 0.
    pub fn window(&self) -> Option<&GuestMemoryMmap> {
        self.window.as_ref()
    }

    /// How it was made.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// All RAM, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.config.size_bytes
    }

    /// Bytes of RAM below the PCI hole, from address 0.
    pub fn low_len(&self) -> u64 {
        self.mode.split(self.size_bytes()).0
    }

    /// Bytes of RAM from 4 GiB on; may be 0.
    pub fn high_len(&self) -> u64 {
        self.mode.split(self.size_bytes()).1
    }

    /// Whether `[gpa, gpa + len)` is RAM, whole and in one piece.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_add(len).is_some_and(|end| {
            end <= self.low_len()
                || (gpa >= layout::HIGH_RAM_START
                    && end - layout::HIGH_RAM_START <= self.high_len())
        })
    }

    /// All pieces, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = HostRange> + '_ {
        self.memory.iter().map(|region| HostRange {
            gpa: region.start_addr().raw_value(),
            len: region.len(),
            host: region.as_ptr() as u64,
            kind: kind(region),
        })
    }

    /// The pieces that KSM may merge if it is told to: none where the configuration does not make them eligible.
    pub fn mergeable_ranges(&self) -> impl Iterator<Item = HostRange> + '_ {
        let eligible = self.config.mergeable != Mergeable::Off && self.config.huge_pages.is_none();
        self.ranges()
            .filter(move |range| eligible && range.kind == Kind::Private)
    }

    /// Figures by name: what can be merged, and what of the window the host has pages for. A figure that there is not is
    /// absent.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mergeable = self.mergeable_ranges().map(|range| range.len).sum();
        let mut counters = vec![("mergeable_bytes", mergeable)];
        if let Some(region) = self.window.as_ref().and_then(|window| window.iter().next()) {
            counters.push(("window_bytes", region.len()));
            let file = region.file_offset().map(|file| file.file().metadata());
            if let Some(Ok(metadata)) = file {
                counters.push(("window_used_bytes", metadata.blocks() * BLOCK));
            }
        }
        counters
    }

    /// Tells the host about whole pages of one piece: `gpa` and `len` are multiples of 4 KiB. Merging is for
    /// [`Self::mergeable_ranges`] only.
    ///
    /// # Errors
    /// Where the range is not of that kind, or the host refuses.
    pub fn advise(&self, gpa: u64, len: u64, advice: Advice) -> Result<(), Error> {
        let merging = matches!(advice, Advice::Mergeable | Advice::Unmergeable);
        let inside = |range: HostRange| {
            let end = gpa.checked_add(len);
            range.gpa <= gpa && end.is_some_and(|end| end <= range.gpa + range.len)
        };
        let eligible = !merging || self.mergeable_ranges().any(inside);
        let region = self.region(gpa, len).filter(|_| {
            eligible && len > 0 && gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE)
        });
        let (region, offset) = region.ok_or(Error::NotEligible {
            gpa,
            len,
            what: if merging { "merged" } else { "advised" },
        })?;
        mapping::take_advice(region, offset, len, advice).map_err(|source| Error::Advise {
            gpa,
            len,
            source,
        })
    }

    /// Which pages of `[gpa, gpa + len)` are in memory; both are multiples of 4 KiB.
    ///
    /// # Errors
    /// Where the range is not RAM in one piece.
    pub fn present(&self, gpa: u64, len: u64) -> io::Result<Vec<bool>> {
        let (region, offset) = self.region(gpa, len).ok_or(io::ErrorKind::InvalidInput)?;
        mapping::present(region, offset, len)
    }

    /// Gives the whole pages in `[gpa, gpa + len)` back to the host: they read as zeros from then on, in the guest and
    /// in every backend. A part of a page at either end stays as it is; a page is as big as those that the memory is
    /// made of. Returns how many bytes were given back. From any thread, while the guest runs.
    ///
    /// # Errors
    /// Where the range is not RAM in one piece, or the host refuses.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<u64, Error> {
        let (region, offset) = self.region(gpa, len).ok_or(Error::NotEligible {
            gpa,
            len,
            what: "discarded",
        })?;
        let page = self.page_bytes();
        let (start, end) = (offset.next_multiple_of(page), (offset + len) / page * page);
        if start >= end {
            return Ok(0);
        }
        drop_contents(region, start, end - start).map_err(|source| Error::Zero {
            gpa,
            len,
            source,
        })?;
        Ok(end - start)
    }

    /// Makes `[gpa, gpa + len)` read as zeros by giving its pages back to the host: memory that was
    /// never touched stays untouched. What was prefaulted stays there.
    pub fn zero(&self, gpa: u64, len: u64) -> Result<(), Error> {
        let error = |source| Error::Zero { gpa, len, source };
        if len == 0 {
            return Ok(());
        }
        let (region, offset) = self
            .region(gpa, len)
            .ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?;
        if self.config.prefault {
            return self.write_zeros(gpa, gpa + len);
        }
        if kind(region) == Kind::Shared {
            // Zeroes parts of pages too.
            return drop_contents(region, offset, len).map_err(error);
        }
        let page = self.page_bytes();
        let end = gpa + len;
        let (first, last) = (gpa.next_multiple_of(page).min(end), end / page * page);
        self.write_zeros(gpa, first)?;
        if first < last {
            drop_contents(region, offset + (first - gpa), last - first).map_err(error)?;
        }
        self.write_zeros(last.max(first), end)
    }

    fn write_zeros(&self, mut gpa: u64, end: u64) -> Result<(), Error> {
        while gpa < end {
            let len = (end - gpa).min(ZEROS.len() as u64);
            let zeros = &ZEROS[..len as usize];
            let written = self.memory.write_slice(zeros, GuestAddress(gpa));
            written.map_err(|error| Error::Zero {
                gpa,
                len,
                source: io::Error::other(error),
            })?;
            gpa += len;
        }
        Ok(())
    }

    /// Takes the page at `gpa` out of this process's page tables and so out of KVM's; what is in it stays. Where there
    /// is no RAM, or RAM that nothing but these page tables holds, nothing happens.
    pub fn unmap_page(&self, gpa: u64) -> Result<(), io::Error> {
        match self.region(gpa & !(PAGE - 1), PAGE) {
            Some((region, offset)) if kind(region) == Kind::Shared => {
                mapping::drop_pages(region, offset, PAGE)
            }
            _ => Ok(()),
        }
    }

    /// The piece that all of a range is in, and where in it.
    fn region(&self, gpa: u64, len: u64) -> Option<(&GuestRegionMmap, u64)> {
        let region = self.memory.find_region(GuestAddress(gpa))?;
        let offset = gpa - region.start_addr().raw_value();
        self.contains(gpa, len).then_some((region, offset))
    }

    /// Bytes of the pages that the memory is made of.
    pub fn page_bytes(&self) -> u64 {
        self.config.huge_pages.map_or(PAGE, HugePages::bytes)
    }
}

/// Shared memory that is no guest's, `len` bytes from address 0: what devices see instead of a guest's. Pages come when
/// they are first touched.
///
/// # Errors
/// Where the host has none.
pub fn bounce(len: u64) -> Result<GuestMemoryMmap, Error> {
    let config = MemoryConfig::of(len);
    let file = mapping::sealed_memfd(mapping::BOUNCE, &config, len)?;
    let region = mapping::map(&config, Some(FileOffset::new(file, 0)), 0, len)?;
    GuestMemoryMmap::from_arc_regions(vec![Arc::new(region)]).map_err(Error::Regions)
}

fn kind(region: &GuestRegionMmap) -> Kind {
    match region.file_offset() {
        Some(_) => Kind::Shared,
        None => Kind::Private,
    }
}

/// Gives pages back to the host: out of the file, for everybody who maps it, or out of this process.
fn drop_contents(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
    match region.file_offset() {
        Some(file) => {
            let start = file.start() + offset;
            fallocate(file.file(), FallocateMode::PunchHole, true, start, len)
                .map_err(io::Error::from)
        }
        None => mapping::drop_pages(region, offset, len),
    }
}

#[cfg(test)]
#[path = "ram_tests.rs"]
mod tests;
