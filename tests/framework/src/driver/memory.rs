//! Guest memory of a driver: one memfd, handed out piece by piece.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::sys;

/// Where it begins in the guest. The frontend's addresses differ, so that mixing them up fails.
const GPA: u64 = 0x1_0000_0000;
const UVA: u64 = 0x5500_0000_0000;

/// One region of guest memory.
#[derive(Debug)]
pub struct Memory {
    map: GuestMemoryMmap,
    file: Arc<File>,
    size_bytes: u64,
    next: AtomicU64,
}

impl Memory {
    /// `size_bytes` of zeroes.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(size_bytes: u64) -> Result<Arc<Self>> {
        let file = File::from(sys::memfd(c"test-guest").context("memfd_create")?);
        file.set_len(size_bytes)?;
        let offset = FileOffset::new(file.try_clone()?, 0);
        let file = Arc::new(file);
        let length = usize::try_from(size_bytes)?;
        let ranges = [(GuestAddress(GPA), length, Some(offset))];
        Ok(Arc::new(Self {
            map: GuestMemoryMmap::from_ranges_with_files(ranges).context("map guest memory")?,
            file,
            size_bytes,
            next: AtomicU64::new(0),
        }))
    }

    /// Hands out `length` bytes at a multiple of `align`, a power of two; never freed.
    ///
    /// # Errors
    /// All is handed out.
    pub fn allocate(&self, length: u64, align: u64) -> Result<u64> {
        let at = self.next.load(Ordering::Relaxed).next_multiple_of(align);
        anyhow::ensure!(
            at + length <= self.size_bytes,
            "the driver's memory is too small"
        );
        self.next.store(at + length, Ordering::Relaxed);
        Ok(GPA + at)
    }

    /// The frontend's address of `gpa`.
    pub(super) fn uva(gpa: u64) -> u64 {
        gpa - GPA + UVA
    }

    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: self.size_bytes,
            userspace_addr: UVA,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Copies `data` to `gpa`.
    ///
    /// # Panics
    /// Outside of it: a mistake of the test.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.map
            .write_slice(data, GuestAddress(gpa))
            .expect("the test's own address");
    }

    /// Fills `data` from `gpa`.
    ///
    /// # Panics
    /// Outside of it: a mistake of the test.
    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        self.map
            .read_slice(data, GuestAddress(gpa))
            .expect("the test's own address");
    }

    /// Reads a little-endian number that the device writes; orders what is read after it.
    pub(super) fn load_u16(&self, gpa: u64) -> u16 {
        let value: u16 = self
            .map
            .load(GuestAddress(gpa), Ordering::Acquire)
            .expect("an address of a ring");
        u16::from_le(value)
    }

    /// Writes a little-endian number for the device; ordered after all that was written before.
    pub(super) fn store_u16(&self, gpa: u64, value: u16) {
        self.map
            .store(value.to_le(), GuestAddress(gpa), Ordering::Release)
            .expect("an address of a ring");
    }
}
