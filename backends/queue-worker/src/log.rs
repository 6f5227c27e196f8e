//! The dirty log of a live migration: a bit for each page of guest memory that we wrote.
//!
//! ```text
//!   SET_LOG_BASE ──▶ DirtyLog: the frontend's memory, bit N = guest page N (4 KiB)
//!   SET_FEATURES, VHOST_F_LOG_ALL ──▶ data: buffers that the device wrote
//!   SET_VRING_ADDR, VHOST_VRING_F_LOG ──▶ used ring: entries, index, flags, avail_event
//!
//!   data written ─▶ Ring::push_used(head) ─▶ bits of all of the chain's writable buffers
//!                                         ─▶ used entry, its bit ─▶ publish: used.idx, its bit
//! ```
//!
//! Every device answers through [`Ring::push_used`](crate::Ring::push_used) (or gives a chain back
//! with `put_back`), so that is where data is marked: the chain is walked again, and all of its
//! writable part counts as written, as a device may write before it fails and a status byte lies
//! behind the data. A driver that changes a chain while we own it harms nobody but itself.
//!
//! A bit is set after the bytes it speaks of are written (Release), as the frontend takes the bit
//! away before it reads them. Nothing of this exists while logging is off: one branch.
//!
//! The log is foreign memory like the guest's: its size is checked, and a frontend that truncates
//! it loses its session. Threads: marked by all queue threads. A page beyond the log's end stops
//! the queue, since a page that is not logged would be lost in silence.
//!
//! Spec: vhost-user, "Migration".
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::chain::Chain;
use crate::guest_memory::{MemoryError, Region, RegionInfo};
use crate::notify::VringFd;
use crate::protocol::message::LogArea;
use crate::sys;
use crate::virtqueue::RingError;

/// Bytes of a page of the log (VHOST_LOG_PAGE), whatever the host's page size is.
pub const LOG_PAGE: u64 = 4096;

/// Why something cannot be logged.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The frontend's memory for the log.
    #[error("dirty log of {size:#x} bytes")]
    Map {
        /// Its size.
        size: u64,
        /// What is wrong.
        source: MemoryError,
    },
    /// Guest memory that the log has no bits for.
    #[error("gpa {gpa:#x}+{len:#x} is beyond the dirty log, which ends at {end:#x}")]
    Beyond {
        /// Guest address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// First address without a bit.
        end: u64,
    },
}

/// The log of one session: mapped memory of the frontend.
#[derive(Debug)]
pub struct DirtyLog {
    region: Region,
}

impl DirtyLog {
    /// Maps the log; it must lie in the file entirely.
    pub fn map(area: LogArea, file: &OwnedFd) -> Result<DirtyLog, LogError> {
        let info = RegionInfo {
            gpa: 0,
            size: area.size,
            uva: 0,
            file_offset: area.offset,
        };
        match Region::map(info, file) {
            Ok(region) => Ok(DirtyLog { region }),
            Err(source) => Err(LogError::Map {
                size: area.size,
                source,
            }),
        }
    }

    /// First guest address that it has no bit for.
    pub fn end(&self) -> u64 {
        self.region.info().size.saturating_mul(8 * LOG_PAGE)
    }

    /// Whether the frontend truncated it.
    pub fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    /// Sets the bits of all pages of `len` bytes at `gpa`, which have been written.
    pub fn mark(&self, gpa: u64, len: u64) -> Result<(), LogError> {
        let beyond = || LogError::Beyond {
            gpa,
            len,
            end: self.end(),
        };
        if len == 0 {
            return Ok(());
        }
        let last = gpa.checked_add(len - 1).ok_or_else(beyond)? / LOG_PAGE;
        let mut page = gpa / LOG_PAGE;
        let bits = self.region.as_slice();
        while page <= last {
            // The pages up to the end of their byte, or to the last one.
            let to = last.min(page | 7);
            let mask = (0xff << (page & 7)) & (0xff_u32 >> (7 - (to & 7)));
            let byte = usize::try_from(page / 8)
                .ok()
                .and_then(|at| bits.atomic_u8(at).ok());
            // Release: what was written to the page is visible before its bit.
            byte.ok_or_else(beyond)?
                .fetch_or(mask as u8, Ordering::Release);
            page = to + 1;
        }
        Ok(())
    }
}

/// What a session logs, as the frontend has said it so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct SessionLog {
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// SET_LOG_FD: told when bits have been set.
    pub(crate) notify: Option<VringFd>,
    /// VHOST_F_LOG_ALL.
    pub(crate) data: bool,
}

impl SessionLog {
    /// What a queue logs whose used ring is logged at `used_gpa`, if at all; `None` for nothing.
    pub(crate) fn of_queue(&self, used_gpa: Option<u64>) -> Option<QueueLog> {
        if !self.data && used_gpa.is_none() {
            return None;
        }
        Some(QueueLog {
            log: Arc::clone(self.log.as_ref()?),
            notify: self.notify.clone(),
            data: self.data,
            used_gpa,
        })
    }
}

/// What a queue logs. Replaced as a whole when the frontend changes anything.
#[derive(Clone, Debug)]
pub(crate) struct QueueLog {
    log: Arc<DirtyLog>,
    notify: Option<VringFd>,
    data: bool,
    used_gpa: Option<u64>,
}

/// The log on the side of a running ring.
#[derive(Debug)]
pub(crate) struct RingLog {
    queue: QueueLog,
    /// Bits were set that the frontend has not been told of.
    news: bool,
    /// An error that had nowhere to go when it came.
    failed: Option<RingError>,
    /// Room to walk a chain in.
    pub(crate) chain: Chain,
}

impl RingLog {
    pub(crate) fn new(queue: QueueLog) -> RingLog {
        RingLog {
            queue,
            news: false,
            failed: None,
            chain: Chain::new(),
        }
    }

    /// Whether buffers are logged.
    pub(crate) fn logs_data(&self) -> bool {
        self.queue.data
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.queue.log.is_lost()
    }

    /// A buffer was written.
    pub(crate) fn mark_data(&mut self, gpa: u64, len: usize) -> Result<(), LogError> {
        self.news = true;
        self.queue.log.mark(gpa, len as u64)
    }

    /// `len` bytes at `offset` of the used ring were written.
    pub(crate) fn mark_used(&mut self, offset: usize, len: usize) -> Result<(), LogError> {
        let Some(used) = self.queue.used_gpa else {
            return Ok(());
        };
        self.news = true;
        self.queue
            .log
            .mark(used.saturating_add(offset as u64), len as u64)
    }

    /// Keeps an error for [`finish_batch`](RingLog::finish_batch).
    pub(crate) fn fail_later(&mut self, error: RingError) {
        self.failed.get_or_insert(error);
    }

    /// Tells the frontend of new bits, if it wants to know; an error that waited.
    pub(crate) fn finish_batch(&mut self) -> Result<(), RingError> {
        if std::mem::take(&mut self.news)
            && let Some(notify) = &self.queue.notify
        {
            // Best effort: it may have closed the fd.
            let _ = sys::write_event(notify.as_fd());
        }
        self.failed.take().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn log_of(pages: u64) -> (DirtyLog, crate::testing::GuestRam) {
        let ram = crate::testing::GuestRam::new(0, pages / 8);
        let area = LogArea {
            size: pages / 8,
            offset: 0,
        };
        let fd = ram.fd().as_fd().try_clone_to_owned().unwrap();
        (DirtyLog::map(area, &fd).unwrap(), ram)
    }

    fn dirty(ram: &crate::testing::GuestRam) -> Vec<u64> {
        let bytes = ram.read(0, ram.info().size as usize);
        let bit = |page: &u64| bytes[*page as usize / 8] & 1 << (page % 8) != 0;
        (0..8 * bytes.len() as u64).filter(bit).collect()
    }

    #[test]
    fn pages_that_a_range_touches_are_marked_and_no_others() {
        for (gpa, len, pages) in [
            (0, 0, 0..0),
            (0, 1, 0..1),
            (4095, 2, 0..2),
            (7 * 4096, 4096, 7..8),
            (7 * 4096, 4097, 7..9),
            (5 * 4096 + 1, 30 * 4096, 5..36),
            (63 * 4096, 4096, 63..64),
            (0, 64 * 4096, 0..64),
        ] {
            let (log, ram) = log_of(64);
            log.mark(gpa, len).unwrap();
            assert_eq!(dirty(&ram), pages.collect::<Vec<_>>(), "{gpa:#x}+{len:#x}");
        }
    }

    #[test]
    fn what_lies_beyond_the_log_is_an_error() {
        let (log, _ram) = log_of(64);
        assert_eq!(log.end(), 64 * 4096);
        for (gpa, len) in [
            (64 * 4096, 1),
            (63 * 4096, 4097),
            (u64::MAX, 1),
            (u64::MAX, 2),
        ] {
            let error = log.mark(gpa, len).unwrap_err();
            assert!(matches!(error, LogError::Beyond { .. }), "{error}");
        }
    }

    #[test]
    fn log_must_lie_in_its_file() {
        let ram = crate::testing::GuestRam::new(0, 4096);
        let fd = ram.fd().as_fd().try_clone_to_owned().unwrap();
        let map = |size, offset| DirtyLog::map(LogArea { size, offset }, &fd);
        assert!(map(4096, 0).is_ok());
        for (size, offset) in [(0, 0), (4097, 0), (4096, 1), (u64::MAX, 0), (1, u64::MAX)] {
            assert!(map(size, offset).is_err(), "{size:#x} at {offset:#x}");
        }
    }
}
