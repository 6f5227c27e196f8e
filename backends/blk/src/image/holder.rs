//! How long the image is locked: for the life of the process, or while a queue runs.
//!
//! ```text
//!   always   open ─lock────────────────────────────────────────────────────────────▶ exit
//!   running  open ──── first queue ─lock───────── last queue ─fdatasync, unlock──── …
//! ```
//!
//! The second is for a live migration between two daemons on one image: the destination's daemon
//! is started while the source's still serves. The frontend of the source takes back its rings
//! before that of the destination starts its own, so the lock is free by then; where it is not,
//! the destination's queues refuse to start. No message of vhost-user says that the image may be
//! let go, so this is the operator's choice: between two rings (a reboot of the guest) anybody may
//! take an image that is locked this way.
//!
//! Threads: all queue threads; the mutex protects the number of queues, and is held while the lock
//! is taken or given up.
#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::lock::{self, LockError};
use super::marker::Marker;

/// When the image is locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LockTime {
    /// From the start of the process to its end
    #[default]
    Always,
    /// Only while a queue runs, so that a live migration can hand the image over
    Running,
}

/// The lock of one image, and who needs it.
#[derive(Debug)]
pub struct Holder {
    time: LockTime,
    marker: Marker,
    queues: Mutex<usize>,
}

impl Holder {
    /// Nothing is locked yet. `marker` is that of the file which the other methods are given.
    pub fn new(time: LockTime, marker: Marker) -> Holder {
        Holder {
            time,
            marker,
            queues: Mutex::new(0),
        }
    }

    fn queues(&self) -> MutexGuard<'_, usize> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image was opened.
    pub fn open(&self, file: &File, read_only: bool) -> Result<(), LockError> {
        match self.time {
            LockTime::Always => lock::lock(file, &self.marker, read_only),
            LockTime::Running => Ok(()),
        }
    }

    /// One more queue runs.
    pub fn begin_use(&self, file: &File, read_only: bool) -> Result<(), LockError> {
        let mut queues = self.queues();
        if *queues == 0
            && self.time == LockTime::Running
            && let Err(error) = lock::lock(file, &self.marker, read_only)
        {
            let_go(file);
            return Err(error);
        }
        *queues += 1;
        Ok(())
    }

    /// One queue less runs. What was written is on the medium before anybody else gets the image.
    pub fn end_use(&self, file: &File, read_only: bool) {
        let mut queues = self.queues();
        *queues = queues.saturating_sub(1);
        if *queues == 0 && self.time == LockTime::Running {
            if !read_only && let Err(error) = file.sync_data() {
                tracing::error!(%error, "cannot make the image durable before it is let go");
            }
            let_go(file);
        }
    }
}

fn let_go(file: &File) {
    if let Err(error) = lock::unlock(file) {
        tracing::error!(%error, "cannot unlock the image");
    }
}
