//! The memfd behind guest RAM, its mappings and KVM's memory slots.
//!
//! Invariants: the file has exactly the guest's size and is sealed (`F_SEAL_SHRINK`, `F_SEAL_GROW`,
//! `F_SEAL_SEAL`), so no access of ours can meet SIGBUS for a short file; RAM below the hole is at file
//! offset 0 and RAM above it follows; slot numbers are the order of the pieces (KVM api.rst,
//! `KVM_SET_USER_MEMORY_REGION`).
#![expect(
    unsafe_code,
    reason = "memfd_create, fcntl, madvise and KVM's memory slots have no safe wrapper"
)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::layout;
use crate::config::MemoryConfig;

/// Name of the memfd in `/proc/<pid>/maps` and `/proc/<pid>/fd`.
const NAME: &CStr = c"berth-guest-ram";
/// A page of the host.
const PAGE: u64 = 4096;
/// Unit of the size, and of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Size 0 or not a whole number of 2 MiB pages.
    #[error("memory size {0:#x} is not a multiple of 2 MiB above 0")]
    Size(u64),
    /// The kernel made no memfd.
    #[error("cannot create a memfd for {} MiB of guest memory", .size_bytes >> 20)]
    Create {
        /// What was asked for.
        size_bytes: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The memfd could not be sealed.
    #[error("cannot seal the memfd of guest memory")]
    Seal(#[source] io::Error),
    /// No address space, or more than the host allows.
    #[error(
        "cannot map {} MiB of guest memory: more than this host's address space or limits allow",
        .size_bytes >> 20
    )]
    Map {
        /// What was asked for.
        size_bytes: u64,
        /// The system's answer.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Not enough huge pages are reserved on the host.
    #[error(
        "the host has too few free 2 MiB huge pages for {} MiB of guest memory ({} needed); \
         reserve them with 'sysctl vm.nr_hugepages={}' or more, or use hugepages=off",
        .size_bytes >> 20, .size_bytes / HUGE_PAGE, .size_bytes / HUGE_PAGE
    )]
    HugePages {
        /// What was asked for.
        size_bytes: u64,
    },
    /// The pieces do not make a guest memory; cannot happen with the layout of this crate.
    #[error("guest memory pieces do not fit together")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// A range to be zeroed is not RAM, or the host could not drop its pages.
    #[error("cannot zero guest memory at {gpa:#x}, {len:#x} bytes")]
    Zero {
        /// Guest physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The system's answer, where it was asked.
        source: io::Error,
    },
    /// KVM refused a memory slot.
    #[error("KVM refused memory slot {slot} at {gpa:#x}, {len:#x} bytes")]
    Register {
        /// Slot number.
        slot: u32,
        /// Guest physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
}

/// All RAM of a guest.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    size_bytes: u64,
}

impl GuestRam {
    /// Makes, seals and maps the memory. Pages come when they are first touched, except huge pages,
    /// which the host sets aside here.
    pub fn new(config: &MemoryConfig) -> Result<Self, Error> {
        let size_bytes = config.size_bytes;
        if size_bytes == 0 || !size_bytes.is_multiple_of(HUGE_PAGE) {
            return Err(Error::Size(size_bytes));
        }
        let file = sealed_memfd(config)?;
        let (low, high) = layout::ram_split(size_bytes);
        let mut regions = vec![map(config, &file, 0, low, 0)?];
        if high > 0 {
            regions.push(map(config, &file, low, high, layout::HIGH_RAM_START)?);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(Error::Regions)?;
        Ok(Self { memory, size_bytes })
    }

    /// Guest memory; every region has its file and offset.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// All RAM, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of RAM below the PCI hole, from address 0.
    pub fn low_len(&self) -> u64 {
        layout::ram_split(self.size_bytes).0
    }

    /// Bytes of RAM from 4 GiB on; may be 0.
    pub fn high_len(&self) -> u64 {
        layout::ram_split(self.size_bytes).1
    }

    /// Whether `[gpa, gpa + len)` is RAM, whole and in one piece.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_add(len).is_some_and(|end| {
            end <= self.low_len()
                || (gpa >= layout::HIGH_RAM_START
                    && end - layout::HIGH_RAM_START <= self.high_len())
        })
    }

    /// Makes `[gpa, gpa + len)` read as zeros by giving its pages back to the host: memory that was
    /// never touched stays untouched.
    pub fn zero(&self, gpa: u64, len: u64) -> Result<(), Error> {
        let error = |source| Error::Zero { gpa, len, source };
        if len == 0 {
            return Ok(());
        }
        let region = self
            .memory
            .find_region(GuestAddress(gpa))
            .filter(|_| self.contains(gpa, len))
            .and_then(|region| Some((region.file_offset()?, region.start_addr())));
        let (file, start) = region.ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?;
        fallocate(
            file.file(),
            FallocateMode::PunchHole,
            true,
            file.start() + (gpa - start.raw_value()),
            len,
        )
        .map_err(|errno| error(errno.into()))
    }

    /// Takes the page at `gpa` out of this process's page tables and so out of KVM's; what is in it stays
    /// in the memfd. Where there is no RAM, nothing happens.
    pub fn unmap_page(&self, gpa: u64) -> Result<(), io::Error> {
        let page = gpa & !(PAGE - 1);
        let Ok(start) = self.memory.get_host_address(GuestAddress(page)) else {
            return Ok(());
        };
        // SAFETY: the page is in a mapping of ours, which lives as long as `self`, and regions are whole
        // pages. The mapping is MAP_SHARED of a file, so MADV_DONTNEED loses nothing: the next access, by
        // whichever thread or KVM, finds the same bytes.
        if unsafe { libc::madvise(start.cast(), PAGE as usize, libc::MADV_DONTNEED) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Gives the memory to a VM, one slot a piece, until the returned value is dropped.
    pub fn register(&self, vm: &Arc<VmFd>) -> Result<RamSlots, Error> {
        let mut slots = RamSlots {
            vm: Arc::clone(vm),
            registered: 0,
            memory: ManuallyDrop::new(self.memory.clone()),
        };
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let slot_region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a live mapping of exactly this length, and `slots` keeps it mapped
            // until KVM has let go of it. Nothing in this process makes references to it.
            unsafe { vm.set_user_memory_region(slot_region) }.map_err(|source| {
                Error::Register {
                    slot,
                    gpa: slot_region.guest_phys_addr,
                    len: slot_region.memory_size,
                    source,
                }
            })?;
            slots.registered += 1;
        }
        Ok(slots)
    }
}

/// KVM's use of guest RAM. Dropped, it takes the slots back and then unmaps; where KVM does not let go,
/// the memory stays mapped to the end of the process.
#[derive(Debug)]
pub struct RamSlots {
    vm: Arc<VmFd>,
    registered: u32,
    memory: ManuallyDrop<GuestMemoryMmap>,
}

impl Drop for RamSlots {
    fn drop(&mut self) {
        for slot in 0..self.registered {
            let empty = kvm_userspace_memory_region {
                slot,
                ..Default::default()
            };
            // SAFETY: a slot of size 0 is removed; it refers to no memory.
            if let Err(error) = unsafe { self.vm.set_user_memory_region(empty) } {
                tracing::warn!(slot, %error, "KVM keeps a memory slot; its memory stays mapped");
                return;
            }
        }
        // SAFETY: dropped here only, and not used after.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}

/// A memfd of the guest's size that can change its size no more.
fn sealed_memfd(config: &MemoryConfig) -> Result<File, Error> {
    let size_bytes = config.size_bytes;
    let create_error = |source| Error::Create { size_bytes, source };
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if config.hugepages {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    // SAFETY: the name is a NUL-terminated string that lives through the call.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(create_error(io::Error::last_os_error()));
    }
    // SAFETY: the fd was just made and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size_bytes).map_err(create_error)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an int and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(Error::Seal(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Maps `len` bytes of the memfd from `offset` as guest memory at `gpa`.
fn map(
    config: &MemoryConfig,
    file: &File,
    offset: u64,
    len: u64,
    gpa: u64,
) -> Result<GuestRegionMmap, Error> {
    let size_bytes = config.size_bytes;
    let file = file
        .try_clone()
        .map_err(|source| Error::Create { size_bytes, source })?;
    // Without MAP_NORESERVE the host sets huge pages aside now, and says so now if it has too few;
    // a memfd of small pages reserves nothing either way.
    let mapping = usize::try_from(len)
        .map_err(|_| Error::Size(size_bytes))
        .and_then(|len| {
            MmapRegion::build(
                Some(FileOffset::new(file, offset)),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
            )
            .map_err(|source| match source {
                vm_memory::mmap::MmapRegionError::Mmap(_) if config.hugepages => {
                    Error::HugePages { size_bytes }
                }
                source => Error::Map { size_bytes, source },
            })
        })?;
    // SAFETY: the range is exactly the mapping made above; the advice changes core dumps, not contents.
    let advised =
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTDUMP) };
    if advised < 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "guest memory stays in core dumps");
    }
    GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or(Error::Size(size_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;

    fn ram(size_bytes: u64) -> Result<GuestRam, Error> {
        GuestRam::new(&MemoryConfig {
            size_bytes,
            hugepages: false,
        })
    }

    #[test]
    fn small_memory_is_one_region_from_address_zero() {
        let ram = ram(64 * MIB).unwrap();
        let regions: Vec<_> = ram.memory().iter().collect();
        assert_eq!(regions.len(), 1);
        assert_eq!(regions[0].start_addr(), GuestAddress(0));
        assert_eq!((ram.low_len(), ram.high_len()), (64 * MIB, 0));
    }

    #[test]
    fn big_memory_lies_on_both_sides_of_the_hole_in_one_file() {
        let ram = ram(5 << 30).unwrap();
        let regions: Vec<_> = ram.memory().iter().collect();
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[1].start_addr(), GuestAddress(1 << 32));
        assert_eq!(regions[1].len(), 2 << 30);
        let file = regions[1].file_offset().unwrap();
        assert_eq!(file.start(), 3 << 30);

        // A byte written through the mapping is in the file where a backend will look for it.
        ram.memory()
            .write_obj(0x5au8, GuestAddress((1 << 32) + 7))
            .unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut byte, (3 << 30) + 7).unwrap();
        assert_eq!(byte, [0x5a]);
    }

    #[test]
    fn the_file_can_neither_shrink_nor_grow() {
        let ram = ram(2 * MIB).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(MIB).is_err());
        assert!(file.set_len(4 * MIB).is_err());
    }

    #[test]
    fn zeroed_bytes_read_as_zero_and_their_neighbours_stay() {
        let ram = ram(2 * MIB).unwrap();
        let (start, end) = (0x1003, 0x3005);
        ram.memory()
            .write_slice(&[0xff; 0x4000], GuestAddress(0x1000))
            .unwrap();
        ram.zero(start, end - start).unwrap();
        let mut bytes = [0; 0x4000];
        ram.memory()
            .read_slice(&mut bytes, GuestAddress(0x1000))
            .unwrap();
        for (i, byte) in (0x1000..).zip(bytes) {
            let zeroed = (start..end).contains(&i);
            assert_eq!(byte, if zeroed { 0 } else { 0xff }, "{i:#x}");
        }
    }

    #[test]
    fn an_unmapped_page_keeps_its_bytes() {
        let ram = ram(2 * MIB).unwrap();
        let at = GuestAddress(0x5000);
        ram.memory().write_slice(&[0x5a; 0x1000], at).unwrap();
        ram.unmap_page(0x5123).unwrap();
        let mut bytes = [0; 0x1000];
        ram.memory().read_slice(&mut bytes, at).unwrap();
        assert_eq!(bytes, [0x5a; 0x1000]);
        ram.unmap_page(2 * MIB).expect("no RAM, nothing to do");
        ram.unmap_page(u64::MAX).expect("no RAM, nothing to do");
    }

    #[test]
    fn ranges_outside_ram_are_not_contained() {
        let ram = ram(5 << 30).unwrap();
        assert!(ram.contains(0, 3 << 30));
        assert!(ram.contains(1 << 32, 2 << 30));
        for (gpa, len) in [
            (0, (3 << 30) + 1),
            (3 << 30, 1),
            ((1 << 32) + 1, 2 << 30),
            (u64::MAX, 2),
        ] {
            assert!(!ram.contains(gpa, len), "{gpa:#x}+{len:#x}");
            assert!(ram.zero(gpa, len).is_err());
        }
    }

    #[test]
    fn sizes_that_no_host_can_give_are_refused_in_one_line() {
        for size in [0, MIB, 3 * MIB + 1] {
            assert!(matches!(ram(size), Err(Error::Size(s)) if s == size));
        }
        let error = ram(1 << 56).unwrap_err().to_string();
        assert!(error.contains("68719476736 MiB"), "{error}");
        assert!(!error.contains('\n'));
    }

    /// Skipped where the host has reserved no huge pages.
    #[test]
    fn huge_pages_are_guest_memory_like_any_other() {
        let ram = match GuestRam::new(&MemoryConfig {
            size_bytes: 4 * MIB,
            hugepages: true,
        }) {
            Ok(ram) => ram,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let at = GuestAddress(2 * MIB - 1);
        ram.memory().write_slice(&[0xff; 4], at).unwrap();
        ram.zero(2 * MIB, 2).unwrap();
        let mut bytes = [0; 4];
        ram.memory().read_slice(&mut bytes, at).unwrap();
        assert_eq!(bytes, [0xff, 0, 0, 0xff]);
    }

    #[test]
    fn missing_huge_pages_say_how_to_reserve_them() {
        let error = GuestRam::new(&MemoryConfig {
            size_bytes: 1 << 42,
            hugepages: true,
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains("vm.nr_hugepages=2097152"), "{error}");
    }
}
