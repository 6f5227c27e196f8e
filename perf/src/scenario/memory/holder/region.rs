//! Memory as a VMM has it for its guest: private, anonymous, huge pages allowed.
//!
//! `unsafe` because of mmap, madvise, an ioctl and raw pointers. Two threads use the memory at the same time, as vCPUs and
//! VMM do; so nothing here is a reference into it: words are read and written volatile, as a device's would be.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Error};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use anyhow::{Context as _, Result};

use crate::scenario::memory::dumps::store::PAGE;

/// A huge page.
pub(crate) const HUGE: usize = 2 << 20;
/// Words of a page.
const WORDS: usize = PAGE / 8;

/// What the kernel is told of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    /// Merge it.
    Mergeable,
    /// Do not.
    Unmergeable,
    /// Huge pages.
    Thp,
    /// None.
    NoThp,
}

/// The memory.
#[derive(Debug)]
pub(super) struct Region {
    start: *mut u64,
    bytes: usize,
    pagemap: File,
}

// SAFETY: the mapping lives until the value is dropped, whoever has it, and is used by volatile accesses alone.
unsafe impl Send for Region {}
// SAFETY: as above; what two threads write at the same time is some mixture of words, as with a guest's own vCPUs.
unsafe impl Sync for Region {}

impl Region {
    /// Whole huge pages of memory.
    pub(super) fn new(bytes: u64) -> Result<Self> {
        let bytes = usize::try_from(bytes)?.next_multiple_of(HUGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let wide = unsafe { libc::mmap(ptr::null_mut(), bytes + HUGE, access, flags, -1, 0) };
        if wide == libc::MAP_FAILED {
            return Err(Error::last_os_error()).context("cannot map memory");
        }
        let skip = wide.addr().next_multiple_of(HUGE) - wide.addr();
        for (at, len) in [(0, skip), (skip + bytes, HUGE - skip)] {
            if len > 0 {
                // SAFETY: a part of the mapping just made, which nobody knows of yet.
                unsafe { libc::munmap(wide.byte_add(at), len) };
            }
        }
        Ok(Self {
            // SAFETY: inside of the mapping, which is a huge page longer than what is used of it.
            start: unsafe { wide.byte_add(skip) }.cast(),
            bytes,
            pagemap: File::open("/proc/self/pagemap").context("/proc/self/pagemap")?,
        })
    }

    /// Its size.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Tells the kernel what to do with a part that is inside of it.
    pub(super) fn advise(&self, start: u64, len: u64, advice: Advice) -> io::Result<()> {
        let end = start.checked_add(len);
        if end.is_none_or(|end| end > self.bytes()) || !start.is_multiple_of(PAGE as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let advice = match advice {
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::Unmergeable => libc::MADV_UNMERGEABLE,
            Advice::Thp => libc::MADV_HUGEPAGE,
            Advice::NoThp => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: the range is inside of the mapping, as was checked, and these kinds of advice keep its contents.
        let done = unsafe {
            let at = self.start.byte_add(start as usize);
            libc::madvise(at.cast(), len as usize, advice)
        };
        match done {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }

    fn word(&self, index: usize) -> *mut u64 {
        assert!(index < self.bytes / 8, "word {index} is outside");
        // SAFETY: inside of the mapping, as was checked.
        unsafe { self.start.add(index) }
    }

    /// A word, by its index.
    pub(super) fn read(&self, index: usize) -> u64 {
        // SAFETY: `word` gives an address inside of the mapping, aligned, and mapped for as long as `self` lives.
        unsafe { self.word(index).read_volatile() }
    }

    /// Writes a word.
    pub(super) fn write(&self, index: usize, value: u64) {
        // SAFETY: as in `read`; the mapping is writable and nobody has a reference into it.
        unsafe { self.word(index).write_volatile(value) }
    }

    /// Writes a page.
    pub(super) fn write_page(&self, page: usize, contents: &[u8; PAGE]) {
        for (at, bytes) in contents.as_chunks::<8>().0.iter().enumerate() {
            self.write(page * WORDS + at, u64::from_ne_bytes(*bytes));
        }
    }

    /// Reads words from one on.
    pub(super) fn copy(&self, first: usize, words: &mut [u8]) {
        for (at, bytes) in words.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *bytes = self.read(first + at).to_ne_bytes();
        }
    }

    /// Which pages of a part are in memory; those that are not read as zeros and must not be looked at.
    pub(super) fn present(&self, start: u64, len: u64) -> io::Result<Vec<bool>> {
        let first = (self.start.addr() as u64 + start) / PAGE as u64;
        let mut entries = vec![0; 8 * (len as usize / PAGE)];
        self.pagemap.read_exact_at(&mut entries, first * 8)?;
        let is_present = |entry: &[u8]| entry[7] & 0xc0 != 0;
        Ok(entries.chunks_exact(8).map(is_present).collect())
    }

    /// Which huge pages are mapped as such; `None` where the kernel (before 6.7) does not say.
    pub(super) fn huge(&self) -> Option<Vec<bool>> {
        let mut huge = vec![false; self.bytes / HUGE];
        let begin = self.start.addr() as u64;
        let mut from = begin;
        let end = begin + self.bytes();
        while from < end {
            let mut found = [PageRegion::default(); 256];
            let mut scan = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: from,
                end,
                vec: found.as_mut_ptr().addr() as u64,
                vec_len: found.len() as u64,
                category_mask: PAGE_IS_HUGE,
                return_mask: PAGE_IS_HUGE,
                ..ScanArg::default()
            };
            let file = self.pagemap.as_raw_fd();
            // SAFETY: the kernel reads and writes `scan`, which has the size it says, and writes at most `vec_len`
            // entries of `found`; both live until the call returns.
            let count = unsafe { libc::ioctl(file, PAGEMAP_SCAN, &raw mut scan) };
            for region in found.iter().take(usize::try_from(count).ok()?) {
                for at in (region.start..region.end).step_by(HUGE) {
                    huge[(at - begin) as usize / HUGE] = true;
                }
            }
            if scan.walk_end <= from {
                break;
            }
            from = scan.walk_end;
        }
        Some(huge)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a pointer into it who outlives `self`.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

/// linux/fs.h, `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// linux/fs.h, `struct page_region`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// linux/fs.h: mapped as a huge page.
const PAGE_IS_HUGE: u64 = 1 << 6;
/// linux/fs.h: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_the_rest_is_not_there() {
        let region = Region::new(4 << 20).unwrap();
        region.advise(0, region.bytes(), Advice::NoThp).unwrap();
        let page = [7; PAGE];
        region.write_page(3, &page);
        let mut copy = [0; PAGE];
        region.copy(3 * WORDS, &mut copy);
        assert_eq!(copy, page);
        let present = region.present(0, 8 * PAGE as u64).unwrap();
        assert_eq!(present.iter().filter(|there| **there).count(), 1);
        assert!(present[3]);
        let huge = region.huge().expect("a kernel of at least 6.7");
        assert_eq!(huge, [false, false]);
        assert!(region.advise(4 << 20, 4096, Advice::Thp).is_err());
        assert!(region.advise(u64::MAX - 4095, 4096, Advice::Thp).is_err());
    }
}
