//! virtio-balloon: memory that the guest lends to the host (virtio 1.2, 5.5).
//!
//! ```text
//!  vm.resize ─▶ driver ─▶ Handle ─ num_pages ─▶ config interrupt ─▶ the guest's driver
//!  vm.info  ◀──────────── Handle ◀─ State ◀──┐                        │ PFNs, ranges, numbers
//!                                            │   inflateq, deflateq, statsq, reporting_vq
//!                                     thread "balloon" ◀──────────────┘
//!                                            │ request: PFNs to ranges ─▶ pages: whole pages of the host
//!                                            └─▶ GuestRam::discard: a hole in the memfd, or MADV_DONTNEED
//! ```
//!
//! The thread is started with the machine, by the thread `boot`, so that vCPU threads, which start other devices' workers,
//! need not be allowed to punch holes; the transport only sends it commands.
//!
//! Invariants: a buffer is given back after its pages are; what is not RAM is counted and never touched; what of a huge
//! page is given back waits for the rest of it. Configuration space changes under the lock of `Shared`, which is never
//! held over a system call that can wait.
//!
//! Free page hinting (VIRTIO_BALLOON_F_FREE_PAGE_HINT) is not offered: a hinted page may be in use again when we see the
//! hint, so its one use is to leave pages out of a migration (docs/adr/0006-no-free-page-hinting.md).

mod device;
mod fuzz;
mod pages;
mod request;
mod rings;
mod shared;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use self::device::{Balloon, Error};
pub(crate) use self::fuzz::guest_queues;
pub use self::shared::{Handle, Info};
pub use self::state::{STATS, State, Stats};

/// A page of the balloon, whatever the host's and the guest's are.
pub const PAGE: u64 = 4096;

/// Its name in `vm.info` and `vm.counters`.
pub const NAME: &str = "_balloon";

/// Memory statistics are available on a queue.
const F_STATS_VQ: u64 = 1 << 1;
/// The guest takes pages back rather than be out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest says what its free pages hold.
const F_PAGE_POISON: u64 = 1 << 4;
/// The guest reports free pages.
const F_REPORTING: u64 = 1 << 5;
