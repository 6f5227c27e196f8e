//! An io_uring of one worker thread, with an eventfd that says when something has completed.
//!
//! ```text
//!   push × n ─▶ submit (one system call a batch) ─▶ kernel ─▶ eventfd, completions
//! ```
//!
//! Made and used on the worker's thread (IORING_SETUP_SINGLE_ISSUER). The kernel keeps writing to
//! the buffers of requests in flight whatever becomes of this value, so dropping it waits for
//! them: whoever owns the buffers drops the ring first. Spec: io_uring(7), io_uring_setup(2).
#![expect(
    unsafe_code,
    reason = "submission of requests whose buffers the kernel accesses"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use io_uring::{IoUring, squeue};

use crate::sys;

/// One io_uring with its completion eventfd.
pub struct IoRing {
    ring: IoUring,
    event: OwnedFd,
    /// Pushed, not yet submitted.
    queued: usize,
    /// Submitted, completion not yet taken.
    in_flight: usize,
}

impl IoRing {
    /// A ring of `entries` submissions, on the thread that will use it. An error where the kernel
    /// or a container's policy has no io_uring.
    pub fn new(entries: u32) -> io::Result<IoRing> {
        let fast = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(entries);
        let ring = match fast {
            Ok(ring) => ring,
            // A kernel before 6.0.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries)?,
            Err(e) => return Err(e),
        };
        let event = sys::event()?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(IoRing {
            ring,
            event,
            queued: 0,
            in_flight: 0,
        })
    }

    /// Registers files for `types::Fixed(n)`.
    pub fn register_files(&self, files: &[RawFd]) -> io::Result<()> {
        self.ring.submitter().register_files(files)
    }

    /// Readable when something has completed; to be polled.
    pub fn completion_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Requests pushed whose completion has not been taken.
    pub fn in_flight(&self) -> usize {
        self.queued + self.in_flight
    }

    /// Queues a request; false where the submission queue is full (submit and try again).
    ///
    /// # Safety
    ///
    /// Memory that the entry points to (buffers, iovecs) stays valid, and is not accessed in ways
    /// that conflict with the kernel's access, until its completion has been taken or this ring
    /// has been dropped.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.queued += usize::from(pushed);
        pushed
    }

    /// Hands everything queued to the kernel.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(submitted) => {
                    self.queued -= submitted.min(self.queued);
                    self.in_flight += submitted;
                }
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Submits, and blocks until at least one completion can be taken.
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        while self.in_flight > 0 && self.ring.completion().is_empty() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Clears the completion eventfd: after it was found readable, before taking completions.
    pub fn clear_event(&self) {
        // Non-blocking; nothing to read is fine.
        let _ = sys::read_event(self.event.as_fd());
    }

    /// Takes what has completed: `user_data` and result (bytes, or -errno).
    pub fn take_completions(&mut self, mut each: impl FnMut(u64, i32)) {
        for entry in self.ring.completion() {
            self.in_flight = self.in_flight.saturating_sub(1);
            each(entry.user_data(), entry.result());
        }
    }
}

/// The kernel wants to be asked again: a signal, or no room for completions at the moment.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

impl Drop for IoRing {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            match self.wait() {
                Ok(()) => self.take_completions(|_, _| {}),
                // Never submitted, so the kernel does not know of them.
                Err(_) if self.in_flight == 0 => break,
                // The kernel still writes to memory that is about to be freed.
                Err(error) => {
                    tracing::error!(%error, "cannot wait for I/O in flight");
                    std::process::abort();
                }
            }
        }
        // The kernel tears a closed ring down later, on a thread of its own. Registered files, and
        // the locks on them, must not outlast this value. No file registered is fine.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl std::fmt::Debug for IoRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoRing")
            .field("queued", &self.queued)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}
