//! What does the I/O of one queue: io_uring, or plain system calls where there is no io_uring.
//!
//! ```text
//!   worker: start × n ─▶ submit ─▶ … completion source readable … ─▶ take_completions
//! ```
//!
//! Two implementations: [`uring`] is the engine; [`sync`] takes over, with one warning, on a
//! kernel or in a container without io_uring. Threads: made and used on the queue's worker thread.
#![expect(
    unsafe_code,
    reason = "the trait's method that takes buffers by address is unsafe"
)]

mod fixed;
mod inline;
mod probe;
pub mod sync;
pub mod uring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Once;

use berth_queue_worker::GuestMemory;
use tracing::warn;

use crate::image::Disk;

/// One operation on the disk's file.
#[derive(Clone, Copy, Debug)]
pub enum Io<'a> {
    /// Scatter from byte `offset` into `iovecs`.
    Read {
        /// First byte of the file.
        offset: u64,
        /// Where to.
        iovecs: &'a [libc::iovec],
    },
    /// Gather `iovecs` to byte `offset`; `durable`: on stable storage when complete.
    Write {
        /// First byte of the file.
        offset: u64,
        /// Where from.
        iovecs: &'a [libc::iovec],
        /// RWF_DSYNC.
        durable: bool,
    },
    /// fdatasync.
    Sync,
    /// fallocate with `mode`.
    Allocate {
        /// FALLOC_FL_*.
        mode: i32,
        /// First byte of the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// I/O on one file, some of it in flight.
pub trait DiskEngine {
    /// Begins an operation; its completion carries `tag`. False where the engine is full: take
    /// completions and try again. Does not block (the fallback engine does).
    ///
    /// # Safety
    ///
    /// The iovecs and the memory they name stay valid and where they are until the completion has
    /// been taken or the engine has been dropped.
    unsafe fn start(&mut self, tag: u64, io: &Io) -> bool;

    /// Hands everything started to the kernel: one system call for a batch.
    fn submit(&mut self) -> io::Result<()>;

    /// Whether to submit before more is started: the medium has less to do than waits here.
    fn is_starved(&mut self) -> bool {
        false
    }

    /// Calls `each` with the tag and the result (bytes, or -errno) of what has completed, of up to
    /// `limit` operations of each kind (on the spot, in a ring).
    fn take_completions(&mut self, limit: usize, each: &mut dyn FnMut(u64, i32)) -> io::Result<()>;

    /// Completions that can be taken because `start` did the operation itself.
    fn done_here(&self) -> usize;

    /// Whether a completion can be taken. No system call.
    fn is_ready(&mut self) -> bool;

    /// Blocks until a completion can be taken; at once where nothing is in flight.
    fn wait(&mut self) -> io::Result<()>;

    /// Readable when a completion can be taken, once armed; none where `submit` completes
    /// everything.
    fn completion_fd(&self) -> Option<RawFd>;

    /// Arms the completion fd until completions are taken. True where one can be taken already.
    fn arm(&mut self) -> bool {
        self.is_ready()
    }

    /// The completion fd was found readable: make it unreadable.
    fn clear_event(&self) {}

    /// The guest's memory is this, and not less than it was: register what is new of it, where
    /// that was asked for.
    fn use_memory(&mut self, memory: &GuestMemory) {
        let _ = memory;
    }

    /// Memory may be taken away: hold none of it. Nothing is in flight.
    fn forget_memory(&mut self) {}

    /// Transfers on registered buffers that were begun since this was asked last.
    fn take_fixed_count(&mut self) -> u64 {
        0
    }
}

/// Whether guest memory is registered with the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum FixedBuffers {
    /// Not: the guest may do with its memory what it likes
    #[default]
    Off,
    /// Register it, which pins all of it: no page of it may ever be discarded (balloon, free page
    /// reporting, unplugged memory), or reads go astray
    GuestNeverDiscards,
}

/// Which engine the queues of a disk use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// io_uring, except where the kernel would hand over to a worker what is done in no time;
    /// pread and pwrite where there is no io_uring
    Auto,
    /// io_uring for everything
    IoUring,
    /// pread and pwrite, one request at a time per queue
    Sync,
    /// io_uring for everything, a kernel thread submits.
    #[value(skip)]
    SqPoll,
    /// io_uring for everything, the device is asked for completions of reads and writes.
    #[value(skip)]
    IoPoll,
}

/// Why an image cannot be used with the engine that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is nothing to register memory with.
    #[error("--fixed-buffers needs io_uring, so not --engine=sync")]
    FixedBuffers,
    /// Polled I/O goes past the page cache.
    #[error("--iopoll needs --cache=none")]
    Cached,
    /// The kernel, the file system or the device does not know it.
    #[error("image {path} cannot be used with {flag}")]
    Refused {
        /// The image.
        path: std::path::PathBuf,
        /// What was asked for.
        flag: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Tries what was asked for by name, by one read, so that an operator hears of it before a guest.
pub fn check(
    disk: &Disk,
    choice: EngineChoice,
    fixed_buffers: FixedBuffers,
) -> Result<(), EngineError> {
    if choice == EngineChoice::Sync && fixed_buffers != FixedBuffers::Off {
        return Err(EngineError::FixedBuffers);
    }
    let flag = match choice {
        EngineChoice::Auto | EngineChoice::IoUring | EngineChoice::Sync => return Ok(()),
        EngineChoice::SqPoll => "--sqpoll",
        EngineChoice::IoPoll if disk.direct().is_none() => return Err(EngineError::Cached),
        EngineChoice::IoPoll => "--iopoll",
    };
    probe::read(disk, &Plan::new(disk, choice, FixedBuffers::Off)).map_err(|source| {
        EngineError::Refused {
            path: disk.path().to_owned(),
            flag,
            source,
        }
    })
}

/// What the queues of a disk do their I/O with: found out once, before the process is confined.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    choice: EngineChoice,
    /// Reads, writes: done on the spot while that is faster.
    on_the_spot: [bool; 2],
    pub(crate) fixed_buffers: bool,
}

impl Plan {
    /// For `disk`.
    pub fn new(disk: &Disk, choice: EngineChoice, fixed_buffers: FixedBuffers) -> Plan {
        let on_the_spot = match choice {
            EngineChoice::Auto => probe::handed_over(disk),
            _ => [false; 2],
        };
        Plan {
            choice,
            on_the_spot,
            fixed_buffers: fixed_buffers != FixedBuffers::Off,
        }
    }
}

/// The engine for one queue, with room for `depth` operations.
pub fn open(disk: &Disk, depth: u16, plan: &Plan) -> Box<dyn DiskEngine> {
    static WARNED: Once = Once::new();
    if plan.choice == EngineChoice::Sync {
        return Box::new(sync::SyncEngine::new(disk));
    }
    match uring::UringEngine::new(disk, depth, plan) {
        Ok(engine) => Box::new(engine),
        Err(error) => {
            WARNED.call_once(|| {
                warn!(%error, "no io_uring here, falling back to pread and pwrite");
            });
            Box::new(sync::SyncEngine::new(disk))
        }
    }
}
