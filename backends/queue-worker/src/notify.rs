//! The event fds of a vring: kick (driver to device), call (device to driver) and err.
//!
//! They belong to the frontend, which may hand over anything: reading a kick never blocks.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::metrics::QueueCounters;
use crate::sys;

/// An fd of a vring, shared between session and worker.
pub(crate) type VringFd = Arc<OwnedFd>;

/// The three fds of a running vring, on the worker's side.
#[derive(Debug)]
pub(crate) struct Notifiers {
    pub(crate) kick: VringFd,
    pub(crate) call: Option<VringFd>,
    pub(crate) err: Option<VringFd>,
    /// Tells the session that guest memory was lost.
    pub(crate) memory_lost: Arc<EventFd>,
    pub(crate) counters: Arc<QueueCounters>,
}

impl Notifiers {
    pub(crate) fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes all kicks that have come; true where there was one.
    pub(crate) fn take_kicks(&self) -> io::Result<bool> {
        let kicks = sys::read_event(self.kick.as_fd())?;
        self.counters.kicks.add(kicks);
        Ok(kicks != 0)
    }

    /// Signals the driver, if the frontend gave a call fd.
    pub(crate) fn call(&self) -> io::Result<()> {
        if let Some(call) = &self.call {
            sys::write_event(call.as_fd())?;
            self.counters.calls.add(1);
        }
        Ok(())
    }

    /// Tells the frontend that this vring is broken. Best effort: it may have closed the fd.
    pub(crate) fn raise_err(&self) {
        if let Some(err) = &self.err {
            let _ = sys::write_event(err.as_fd());
        }
    }
}

/// Lets a log line through at most once per interval, and counts the rest. For lines that another
/// party can cause.
#[derive(Debug)]
pub struct LogLimit {
    interval_ms: u64,
    /// Milliseconds since `start` of the last line, plus 1; 0 for none yet.
    last: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// At most one line per `interval`.
    pub const fn new(interval: Duration) -> LogLimit {
        LogLimit {
            interval_ms: interval.as_millis() as u64,
            last: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
        }
    }

    /// `Some(n)`: write the line, `n` lines were held back since the last one.
    pub fn pass(&self) -> Option<u64> {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let start = START.get_or_init(Instant::now);
        let now = start.elapsed().as_millis() as u64 + 1;
        let last = self.last.load(Ordering::Relaxed);
        let due = last == 0 || now - last.min(now) >= self.interval_ms;
        let won = due
            && self
                .last
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if won {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}
