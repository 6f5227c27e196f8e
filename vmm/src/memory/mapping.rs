//! One piece of guest RAM: a part of the memfd mapped shared, or anonymous memory; and what the host is told of it.
//!
//! Invariant: the memfd is sealed (`F_SEAL_SHRINK`, `F_SEAL_GROW`, `F_SEAL_SEAL`) before anybody else sees it, so no
//! access of ours can meet SIGBUS for a short file.
#![expect(
    unsafe_code,
    reason = "memfd_create, fcntl, madvise and mincore have no safe wrapper"
)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use super::Error;
use crate::config::{HugePages, MemoryConfig};

/// Names of memfds in `/proc/<pid>/maps` and `/proc/<pid>/fd`.
pub(super) const GUEST_RAM: &CStr = c"berth-guest-ram";
pub(super) const BOUNCE: &CStr = c"berth-bounce";

/// A memfd of `len` bytes that can change its size no more.
pub(super) fn sealed_memfd(name: &CStr, config: &MemoryConfig, len: u64) -> Result<File, Error> {
    let create_error = |source| Error::Create {
        size_bytes: len,
        source,
    };
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    flags |= match config.huge_pages {
        None => 0,
        Some(HugePages::Mib2) => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        Some(HugePages::Gib1) => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    // SAFETY: the name is a NUL-terminated string that lives through the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        // The host's processor or kernel knows no pages of this size.
        return Err(match (config.huge_pages, error.raw_os_error()) {
            (Some(pages), Some(libc::ENODEV | libc::EINVAL)) => too_few(len, pages),
            _ => create_error(error),
        });
    }
    // SAFETY: the fd was just made and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(create_error)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an int and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(Error::Seal(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Maps a piece: `len` bytes of guest memory at `gpa`, those of a file at an offset or anonymous ones. Pages come when
/// they are first touched, except huge pages, which the host sets aside here.
pub(super) fn map(
    config: &MemoryConfig,
    file: Option<FileOffset>,
    gpa: u64,
    len: u64,
) -> Result<GuestRegionMmap, Error> {
    let size_bytes = config.size_bytes;
    let is_private = file.is_none();
    // Without MAP_NORESERVE the host sets huge pages aside now, and says so now if it has too few; a memfd of small
    // pages reserves nothing either way. Anonymous memory would be counted against overcommit at once.
    let flags = match (is_private, config.huge_pages) {
        (false, _) => libc::MAP_SHARED,
        (true, None) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        (true, Some(pages)) => {
            let size = match pages {
                HugePages::Mib2 => libc::MAP_HUGE_2MB,
                HugePages::Gib1 => libc::MAP_HUGE_1GB,
            };
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size
        }
    };
    let bytes = usize::try_from(len).map_err(|_| Error::Size(size_bytes))?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let mapping = MmapRegion::build(file, bytes, protection, flags).map_err(|source| {
        match (source, config.huge_pages) {
            (MmapRegionError::Mmap(_), Some(pages)) => too_few(size_bytes, pages),
            (source, _) if is_private => Error::MapPrivate { size_bytes, source },
            (source, _) => Error::Map { size_bytes, source },
        }
    })?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or(Error::Size(size_bytes))?;
    if let Err(error) = advise(&region, 0, len, libc::MADV_DONTDUMP) {
        tracing::debug!(%error, "guest memory stays in core dumps");
    }
    let advice = match (config.huge_pages, config.thp) {
        (Some(_), _) => None,
        (None, false) => Some(libc::MADV_NOHUGEPAGE),
        // What becomes of a file's pages is for the host's shmem_enabled to say.
        (None, true) => is_private.then_some(libc::MADV_HUGEPAGE),
    };
    if let Some(advice) = advice
        && let Err(error) = advise(&region, 0, len, advice)
    {
        tracing::debug!(%error, "the host has no transparent huge pages");
    }
    Ok(region)
}

fn too_few(size_bytes: u64, pages: HugePages) -> Error {
    Error::HugePages {
        size_bytes,
        page: pages.bytes(),
    }
}

/// Makes all pages of a piece present and writable.
pub(super) fn prefault(region: &GuestRegionMmap) -> io::Result<()> {
    advise(region, 0, region.len(), libc::MADV_POPULATE_WRITE)
}

/// What whole pages of the host can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// KSM may merge them.
    Mergeable,
    /// It may not, and what it has merged is taken apart.
    Unmergeable,
    /// They may become parts of transparent huge pages.
    Thp,
    /// They may not.
    NoThp,
}

/// Tells the host about a part of a piece.
pub(super) fn take_advice(
    region: &GuestRegionMmap,
    offset: u64,
    len: u64,
    advice: Advice,
) -> io::Result<()> {
    let advice = match advice {
        Advice::Mergeable => libc::MADV_MERGEABLE,
        Advice::Unmergeable => libc::MADV_UNMERGEABLE,
        Advice::Thp => libc::MADV_HUGEPAGE,
        Advice::NoThp => libc::MADV_NOHUGEPAGE,
    };
    advise(region, offset, len, advice)
}

/// Takes pages out of this process's page tables. Of a file they stay what they are; anonymous ones are given back and
/// read as zeros from then on.
pub(super) fn drop_pages(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
    advise(region, offset, len, libc::MADV_DONTNEED)
}

/// Which pages of a part of a piece are in memory.
pub(super) fn present(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<Vec<bool>> {
    let start = inside(region, offset, len)?;
    let mut pages = vec![0; (len as usize).div_ceil(4096)];
    // SAFETY: the range is inside a mapping that lives as long as `region`, and `pages` has a byte for each of its pages.
    if unsafe { libc::mincore(start.cast(), len as usize, pages.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pages.into_iter().map(|page| page & 1 != 0).collect())
}

/// Where a part of a piece begins, if the piece has all of it.
fn inside(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<*mut u8> {
    match offset.checked_add(len) {
        Some(end) if end <= region.len() => Ok(region.as_ptr().wrapping_add(offset as usize)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// `madvise` on a part of a piece.
fn advise(region: &GuestRegionMmap, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    let start = inside(region, offset, len)?;
    // SAFETY: the range is inside a mapping that lives as long as `region`. What the advices of this file do to its
    // contents is at most to make them zeros, and guest memory changes at any time: nobody holds references to it.
    if unsafe { libc::madvise(start.cast(), len as usize, advice) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
