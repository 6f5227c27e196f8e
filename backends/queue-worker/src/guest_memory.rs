//! Guest memory as a vhost-user backend sees it: regions the frontend gave us as file descriptors.
//!
//! ```text
//!   frontend                           this process
//!   SET_MEM_TABLE / ADD_MEM_REG  ──▶   Region = one mmap of the frontend's fd
//!   {gpa, size, uva, offset} + fd        gpa ─┐
//!                                             ├─▶ host address, for the life of the Region
//!                                        uva ─┘
//! ```
//!
//! Descriptors in a ring name *guest physical* addresses (gpa), SET_VRING_ADDR names *frontend
//! user* addresses (uva); both are translated here and nowhere else.
//!
//! A [`GuestMemory`] is an immutable list of shared regions: a change of the table makes a new
//! list, and a region is unmapped when the last list, ring or chain that uses it has gone.
//!
//! Invariants: guest memory is never a Rust reference. The guest may write to it at any time, so
//! it is copied out (a field is fetched once and then checked), copied in, or accessed through
//! atomics. All unsafe access to it is in this file. Spec: vhost-user, "Memory region description".
#![expect(
    unsafe_code,
    reason = "maps the frontend's memory and copies from and to it"
)]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16};

use vm_memory::ByteValued;

use crate::sigbus::Guarded;

/// Why guest memory could not be mapped or accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region of no bytes, or whose end does not fit in 64 bits.
    #[error("memory region at gpa {gpa:#x}, size {size:#x} is empty or overflows")]
    BadRegion {
        /// Guest physical address of the region.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The file behind the region is shorter than the region.
    #[error("memory region at gpa {gpa:#x} ends at {end:#x} of a file of {file_size:#x} bytes")]
    FileTooShort {
        /// Guest physical address of the region.
        gpa: u64,
        /// Where the region ends in the file.
        end: u64,
        /// The file's size in bytes.
        file_size: u64,
    },
    /// `mmap` or `fstat` failed.
    #[error("cannot map memory region at gpa {gpa:#x}, size {size:#x}")]
    Map {
        /// Guest physical address of the region.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// Two regions share guest or frontend addresses.
    #[error("memory region at gpa {gpa:#x}, size {size:#x} overlaps another one")]
    Overlap {
        /// Guest physical address of the new region.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// REM_MEM_REG of a region that is not there.
    #[error("no memory region at gpa {gpa:#x}, uva {uva:#x}, size {size:#x}")]
    NoSuchRegion {
        /// Guest physical address asked for.
        gpa: u64,
        /// Frontend address asked for.
        uva: u64,
        /// Size asked for.
        size: u64,
    },
    /// An address range that no region holds.
    #[error("{space} {addr:#x}+{len:#x} is outside guest memory")]
    OutOfRange {
        /// Which address space: `gpa`, `uva` or `offset`.
        space: &'static str,
        /// First address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// An atomic access to an address that is not aligned.
    #[error("guest address at offset {offset:#x} is not aligned for an atomic access")]
    Misaligned {
        /// Offset within the slice.
        offset: usize,
    },
}

/// How the frontend describes a region. All values are the frontend's, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address.
    pub gpa: u64,
    /// Size in bytes; need not be a multiple of the page size.
    pub size: u64,
    /// The frontend's own virtual address.
    pub uva: u64,
    /// Where the region begins in its file.
    pub file_offset: u64,
}

/// One mapped region.
#[derive(Debug)]
pub struct Region {
    /// Dropped by hand, before the mapping goes.
    guard: ManuallyDrop<Guarded>,
    info: RegionInfo,
    map: NonNull<u8>,
    map_len: usize,
    /// Where the region begins in the mapping (the file offset need not be page-aligned).
    delta: usize,
}

// SAFETY: a Region is an address range that stays mapped until drop; access to the bytes is by
// copy or atomics through GuestSlice, from any thread.
unsafe impl Send for Region {}
// SAFETY: as above; no method takes a reference to the bytes.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `info.size` bytes of `file`, shared, readable and writable.
    ///
    /// A regular file (a memfd is one) shorter than the region is refused: touching the missing
    /// pages would raise SIGBUS.
    pub fn map(info: RegionInfo, file: &OwnedFd) -> Result<Region, MemoryError> {
        let RegionInfo { gpa, size, .. } = info;
        let bad = || MemoryError::BadRegion { gpa, size };
        if size == 0 || gpa.checked_add(size).is_none() || info.uva.checked_add(size).is_none() {
            return Err(bad());
        }
        let end = info.file_offset.checked_add(size).ok_or_else(bad)?;
        let map_error = |source| MemoryError::Map { gpa, size, source };
        let file = File::from(file.try_clone().map_err(map_error)?);
        let meta = file.metadata().map_err(map_error)?;
        if meta.is_file() && end > meta.len() {
            return Err(MemoryError::FileTooShort {
                gpa,
                end,
                file_size: meta.len(),
            });
        }
        let align = mapping_alignment(&file).map_err(map_error)?;
        let delta = info.file_offset % align;
        let map_len = (size + delta)
            .checked_next_multiple_of(align)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(bad)?;
        let offset = libc::off_t::try_from(info.file_offset - delta).map_err(|_| bad())?;
        // Less than a page, so it fits.
        let delta = usize::try_from(delta).map_err(|_| bad())?;
        // SAFETY: a fresh shared mapping at an address the kernel chooses; arguments were checked.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        let map = match NonNull::new(map.cast::<u8>()) {
            Some(map) if map.as_ptr().cast() != libc::MAP_FAILED => map,
            _ => return Err(map_error(io::Error::last_os_error())),
        };
        let guard = Guarded::new(map.as_ptr() as usize, map_len).map_err(|source| {
            // SAFETY: just mapped, and nobody knows of it.
            unsafe { libc::munmap(map.as_ptr().cast(), map_len) };
            map_error(source)
        })?;
        Ok(Region {
            guard: ManuallyDrop::new(guard),
            info,
            map,
            map_len,
            delta,
        })
    }

    /// Whether the file was truncated under us: what was in the region is gone.
    pub fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }

    /// What the frontend said about this region.
    pub fn info(&self) -> RegionInfo {
        self.info
    }

    /// The whole region.
    pub fn as_slice(&self) -> GuestSlice<'_> {
        // SAFETY: delta + size is within the mapping (see `map`).
        let ptr = unsafe { self.map.as_ptr().add(self.delta) };
        RawSlice {
            ptr,
            len: self.info.size as usize,
        }
        .bind(self)
    }

    fn raw(&self, offset: u64, len: usize) -> Option<RawSlice> {
        let end = offset.checked_add(len as u64)?;
        if end > self.info.size {
            return None;
        }
        // SAFETY: offset + len is within the region, which is within the mapping.
        let ptr = unsafe { self.map.as_ptr().add(self.delta + offset as usize) };
        Some(RawSlice { ptr, len })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the guard is dropped once, here, so that the table never names what is not mapped.
        // map and map_len are what mmap returned; nothing that borrows the region lives.
        unsafe {
            ManuallyDrop::drop(&mut self.guard);
            libc::munmap(self.map.as_ptr().cast(), self.map_len);
        }
    }
}

/// The page size of the file's mapping: hugetlbfs takes offsets in its own page size only.
fn mapping_alignment(file: &File) -> io::Result<u64> {
    // SAFETY: statfs is plain data, filled by the call; sysconf has no preconditions.
    let (stat, page) = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        (stat, libc::sysconf(libc::_SC_PAGESIZE))
    };
    // Signed with glibc, unsigned with musl.
    let huge = stat.f_type.to_ne_bytes() == libc::HUGETLBFS_MAGIC.to_ne_bytes();
    let align = if huge {
        u64::from_ne_bytes(stat.f_bsize.to_ne_bytes())
    } else {
        u64::try_from(page).unwrap_or(4096)
    };
    Ok(align.max(1))
}

/// An address range of a region, without the borrow: for structures that keep the region alive
/// themselves (a ring, a chain).
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawSlice {
    ptr: *mut u8,
    len: usize,
}

impl RawSlice {
    /// Gives the slice the lifetime of a borrow of its keeper: the memory that it came from (or
    /// one of its regions), which holds the mapping.
    pub(crate) fn bind<K>(self, _keeper: &K) -> GuestSlice<'_> {
        GuestSlice {
            raw: self,
            _memory: std::marker::PhantomData,
        }
    }

    pub(crate) fn len(self) -> usize {
        self.len
    }
}

/// A range of guest memory. Reads and writes copy; the guest may change the bytes at any time.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'a> {
    raw: RawSlice,
    _memory: std::marker::PhantomData<&'a Region>,
}

impl<'a> GuestSlice<'a> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.raw.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.raw.len == 0
    }

    /// The host address, for alignment checks and system calls.
    pub fn host_addr(&self) -> usize {
        self.raw.ptr as usize
    }

    /// For `readv`, `writev` and io_uring. The holder of the iovec must keep the chain or memory
    /// that this slice came from until the kernel is done with it.
    pub fn as_iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.raw.ptr.cast(),
            iov_len: self.raw.len,
        }
    }

    /// The part from `offset`, at most `len` bytes long.
    pub fn sub(&self, offset: usize, len: usize) -> Result<GuestSlice<'a>, MemoryError> {
        self.check(offset, len)?;
        // SAFETY: offset <= self.len, checked above.
        let ptr = unsafe { self.raw.ptr.add(offset) };
        Ok(GuestSlice {
            raw: RawSlice { ptr, len },
            _memory: std::marker::PhantomData,
        })
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.raw.len => Ok(()),
            _ => Err(MemoryError::OutOfRange {
                space: "offset",
                addr: offset as u64,
                len: len as u64,
            }),
        }
    }

    /// Copies `buf.len()` bytes at `offset` out of the guest.
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.check(offset, buf.len())?;
        // SAFETY: the source is mapped for 'a and in bounds; buf is ours and cannot overlap a
        // mapping that no Rust reference points into.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.raw.ptr.add(offset).cast_const(),
                buf.as_mut_ptr(),
                buf.len(),
            );
        }
        Ok(())
    }

    /// Copies `buf` into the guest at `offset`.
    pub fn write(&self, offset: usize, buf: &[u8]) -> Result<(), MemoryError> {
        self.check(offset, buf.len())?;
        // SAFETY: as in `read`, the other way.
        unsafe {
            std::ptr::copy_nonoverlapping(buf.as_ptr(), self.raw.ptr.add(offset), buf.len());
        }
        Ok(())
    }

    /// Sets `len` bytes at `offset` to `value`.
    pub fn fill(&self, offset: usize, len: usize, value: u8) -> Result<(), MemoryError> {
        self.check(offset, len)?;
        // SAFETY: in bounds of the mapping, as above.
        unsafe { std::ptr::write_bytes(self.raw.ptr.add(offset), value, len) };
        Ok(())
    }

    /// Fetches one object, once, at any alignment.
    pub fn load<T: ByteValued>(&self, offset: usize) -> Result<T, MemoryError> {
        self.check(offset, size_of::<T>())?;
        // SAFETY: in bounds; ByteValued types are valid for any bytes. The aligned case is one
        // volatile read, so that the compiler does not fetch a field twice.
        unsafe {
            let ptr = self.raw.ptr.add(offset).cast::<T>();
            if ptr.is_aligned() {
                Ok(ptr.read_volatile())
            } else {
                Ok(ptr.read_unaligned())
            }
        }
    }

    /// Stores one object, at any alignment.
    pub fn store<T: ByteValued>(&self, offset: usize, value: T) -> Result<(), MemoryError> {
        self.check(offset, size_of::<T>())?;
        // SAFETY: in bounds; T is plain data without a destructor.
        unsafe {
            let ptr = self.raw.ptr.add(offset).cast::<T>();
            if ptr.is_aligned() {
                ptr.write_volatile(value);
            } else {
                ptr.write_unaligned(value);
            }
        }
        Ok(())
    }

    /// A 16-bit field that the guest accesses at the same time: the indices and flags of a ring.
    pub fn atomic_u16(&self, offset: usize) -> Result<&'a AtomicU16, MemoryError> {
        self.check(offset, size_of::<u16>())?;
        // SAFETY: in bounds, mapped for 'a, aligned (checked here), and an atomic may be shared
        // with a writer elsewhere.
        unsafe {
            let ptr = self.raw.ptr.add(offset).cast::<u16>();
            if !ptr.is_aligned() {
                return Err(MemoryError::Misaligned { offset });
            }
            Ok(AtomicU16::from_ptr(ptr))
        }
    }

    /// A byte that the other side changes at the same time: the dirty log's.
    pub fn atomic_u8(&self, offset: usize) -> Result<&'a AtomicU8, MemoryError> {
        self.check(offset, 1)?;
        // SAFETY: in bounds, mapped for 'a; a byte is always aligned, and an atomic may be shared
        // with a writer elsewhere.
        unsafe { Ok(AtomicU8::from_ptr(self.raw.ptr.add(offset))) }
    }

    pub(crate) fn raw(&self) -> RawSlice {
        self.raw
    }
}

/// All regions of one session, sorted by guest physical address. Cheap to clone and to extend.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// The table with `region` added.
    pub fn with(&self, region: Region) -> Result<GuestMemory, MemoryError> {
        let new = region.info;
        let clash = |a: u64, b: u64, old: &RegionInfo| a < b + old.size && b < a + new.size;
        for old in &self.regions {
            let old = &old.info;
            if clash(new.gpa, old.gpa, old) || clash(new.uva, old.uva, old) {
                return Err(MemoryError::Overlap {
                    gpa: new.gpa,
                    size: new.size,
                });
            }
        }
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|r| r.info.gpa < new.gpa);
        regions.insert(at, Arc::new(region));
        Ok(GuestMemory { regions })
    }

    /// The table without the region of these addresses; the file offset is not compared.
    pub fn without(&self, info: RegionInfo) -> Result<GuestMemory, MemoryError> {
        let same = |r: &RegionInfo| (r.gpa, r.uva, r.size) == (info.gpa, info.uva, info.size);
        let mut regions = self.regions.clone();
        let at = regions.iter().position(|r| same(&r.info));
        let at = at.ok_or(MemoryError::NoSuchRegion {
            gpa: info.gpa,
            uva: info.uva,
            size: info.size,
        })?;
        regions.remove(at);
        Ok(GuestMemory { regions })
    }

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether the frontend has given no memory yet.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether the file of a region was truncated under us.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.is_lost())
    }

    /// The guest physical address of what lies at a host address: of a slice, where only its place
    /// in this process is left. A search over the regions.
    pub(crate) fn gpa_of(&self, slice: &GuestSlice<'_>) -> Option<u64> {
        let addr = slice.host_addr() as u64;
        self.regions.iter().find_map(|region| {
            let offset = addr.checked_sub(region.as_slice().host_addr() as u64)?;
            (offset < region.info.size).then(|| region.info.gpa + offset)
        })
    }

    /// Where the last region ends; 0 where there is none.
    pub(crate) fn end(&self) -> u64 {
        // Sorted, and `map` has checked that it does not overflow.
        self.regions
            .last()
            .map_or(0, |region| region.info.gpa + region.info.size)
    }

    /// The regions, by ascending guest physical address.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().map(AsRef::as_ref)
    }

    fn region_at(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.info.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (gpa - region.info.gpa < region.info.size).then_some(region)
    }

    /// `len` bytes at `gpa`, where one region holds them all.
    pub fn slice(&self, gpa: u64, len: usize) -> Result<GuestSlice<'_>, MemoryError> {
        self.region_at(gpa)
            .and_then(|r| r.raw(gpa - r.info.gpa, len))
            .map(|raw| raw.bind(self))
            .ok_or(MemoryError::OutOfRange {
                space: "gpa",
                addr: gpa,
                len: len as u64,
            })
    }

    /// `len` bytes at the frontend's address `uva`, where one region holds them all.
    pub fn slice_uva(&self, uva: u64, len: usize) -> Result<GuestSlice<'_>, MemoryError> {
        self.regions
            .iter()
            .find(|r| uva >= r.info.uva && uva - r.info.uva < r.info.size)
            .and_then(|r| r.raw(uva - r.info.uva, len))
            .map(|raw| raw.bind(self))
            .ok_or(MemoryError::OutOfRange {
                space: "uva",
                addr: uva,
                len: len as u64,
            })
    }

    /// Calls `each` for every contiguous piece of `len` bytes at `gpa`; a buffer may cross from
    /// one region into the next.
    pub(crate) fn pieces(
        &self,
        gpa: u64,
        len: usize,
        mut each: impl FnMut(RawSlice),
    ) -> Result<(), MemoryError> {
        let outside = MemoryError::OutOfRange {
            space: "gpa",
            addr: gpa,
            len: len as u64,
        };
        let (mut at, mut left) = (gpa, len);
        while left > 0 {
            let Some(region) = self.region_at(at) else {
                return Err(outside);
            };
            let offset = at - region.info.gpa;
            let here = left.min(usize::try_from(region.info.size - offset).unwrap_or(usize::MAX));
            let Some(piece) = region.raw(offset, here) else {
                return Err(outside);
            };
            each(piece);
            left -= here;
            at = match at.checked_add(here as u64) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(outside),
            };
        }
        Ok(())
    }
}
