//! Why there is no guest RAM, or not what was asked of it.

#![forbid(unsafe_code)]

use std::io;

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
    /// Anonymous memory that the host does not give.
    #[error("cannot map {} MiB of private guest memory", .size_bytes >> 20)]
    MapPrivate {
        /// What was asked for.
        size_bytes: u64,
        /// The system's answer.
        source: vm_memory::mmap::MmapRegionError,
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
        "the host has too few free {} MiB huge pages for {} MiB of guest memory ({} needed); \
         reserve them with 'sysctl vm.nr_hugepages={}' or more{}, or use hugepages=off",
        .page >> 20, .size_bytes >> 20, .size_bytes / .page, .size_bytes / .page,
        if *.page == 2 << 20 { "" } else { " where that is the host's default size" }
    )]
    HugePages {
        /// What was asked for.
        size_bytes: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The host has no memory for all pages now.
    #[error("cannot prefault {} MiB of guest memory at {gpa:#x}", .len >> 20)]
    Prefault {
        /// Guest physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A range that is not RAM, or not RAM of the kind that the call is for.
    #[error("{len:#x} bytes at {gpa:#x} are not guest memory that can be {what}")]
    NotEligible {
        /// Guest physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// What was to be done.
        what: &'static str,
    },
    /// The host refused an advice.
    #[error("the host does not take advice on {len:#x} bytes of guest memory at {gpa:#x}")]
    Advise {
        /// Guest physical start.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
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
