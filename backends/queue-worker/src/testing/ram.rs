//! Guest memory of a test: one memfd, handed out piece by piece.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest_memory::{GuestSlice, Region, RegionInfo};
use crate::sys;

/// One region of guest memory, mapped here and shareable with a backend.
#[derive(Debug)]
pub struct GuestRam {
    file: OwnedFd,
    region: Region,
    next: AtomicU64,
}

impl GuestRam {
    /// `size` bytes at guest physical address `gpa`. The frontend's addresses are made up: they
    /// differ from the guest's, so that mixing them up fails.
    pub fn new(gpa: u64, size: u64) -> GuestRam {
        let file = sys::memfd(c"fake-guest", size).unwrap();
        let info = RegionInfo {
            gpa,
            size,
            uva: gpa + 0x5500_0000_0000,
            file_offset: 0,
        };
        let region = Region::map(info, &file).unwrap();
        GuestRam {
            file,
            region,
            next: AtomicU64::new(0),
        }
    }

    /// What the frontend tells the backend about it.
    pub fn info(&self) -> RegionInfo {
        self.region.info()
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Hands out `len` bytes at an address aligned to `align` (a power of two), never freed.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let mut at = 0;
        let bump = |next: u64| {
            at = next.next_multiple_of(align);
            Some(at + len)
        };
        let _ = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, bump);
        assert!(at + len <= self.info().size, "fake guest is out of memory");
        self.info().gpa + at
    }

    /// The frontend's address of `gpa`.
    pub fn uva(&self, gpa: u64) -> u64 {
        gpa - self.info().gpa + self.info().uva
    }

    /// `len` bytes at `gpa`.
    pub fn slice(&self, gpa: u64, len: usize) -> GuestSlice<'_> {
        let offset = usize::try_from(gpa - self.info().gpa).unwrap();
        self.region.as_slice().sub(offset, len).unwrap()
    }

    /// Copies `data` to `gpa`.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.slice(gpa, data.len()).write(0, data).unwrap();
    }

    /// Copies `len` bytes out.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.slice(gpa, len).read(0, &mut data).unwrap();
        data
    }

    /// Cuts the file behind it to nothing, as a hostile frontend may.
    pub fn truncate(&self) {
        let file = std::fs::File::from(self.file.try_clone().unwrap());
        file.set_len(0).unwrap();
    }

    /// A new place that holds `data`.
    pub fn place(&self, data: &[u8]) -> u64 {
        let gpa = self.alloc(data.len() as u64, 16);
        self.write(gpa, data);
        gpa
    }
}
