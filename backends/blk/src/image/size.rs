//! The size of a disk while it is in use: an image may grow under it, and may have shrunk.
//!
//! ```text
//!   0 ───────────────── end ─────────── told        in sectors; end ≤ told
//!     served            │ IOERR         │ IOERR, and the driver knows
//! ```
//!
//! `told` is the capacity that the driver sees, and only grows: a driver whose disk becomes
//! smaller has nowhere to put what it holds. `end` is where the image ends. Written on one thread
//! at a time (the lock of [`Size::update`]), read by every queue.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::request::SECTOR_SIZE;

/// What a look at the image has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The size that the driver knows.
    None,
    /// Larger: the driver has to be told.
    Grown {
        /// Sectors before.
        from: u64,
        /// Sectors now.
        to: u64,
    },
    /// Smaller than the driver knows: what lies beyond fails.
    Shrunk {
        /// Sectors that the driver knows.
        from: u64,
        /// Sectors that there are.
        to: u64,
    },
    /// No whole number of sectors: as before.
    Odd {
        /// Bytes that there are.
        bytes: u64,
    },
}

/// Capacity and end of a disk.
#[derive(Debug)]
pub struct Size {
    told: AtomicU64,
    end: AtomicU64,
    /// One update at a time.
    updating: Mutex<()>,
}

impl Size {
    /// A disk of this many bytes.
    pub fn new(bytes: u64) -> Size {
        Size {
            told: AtomicU64::new(bytes / SECTOR_SIZE),
            end: AtomicU64::new(bytes / SECTOR_SIZE),
            updating: Mutex::new(()),
        }
    }

    /// Sectors that the driver knows of.
    pub fn told(&self) -> u64 {
        self.told.load(Ordering::Acquire)
    }

    /// Sectors that can be used.
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Takes the image's size from `look`; what that means.
    pub fn update<E>(&self, look: impl FnOnce() -> Result<u64, E>) -> Result<Change, E> {
        // The lock guards no data that a panic could leave half done.
        let _one = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = look()?;
        let (from, to) = (self.told(), bytes / SECTOR_SIZE);
        if to < from {
            self.end.store(to, Ordering::Release);
            return Ok(Change::Shrunk { from, to });
        }
        if !bytes.is_multiple_of(SECTOR_SIZE) {
            return Ok(Change::Odd { bytes });
        }
        // First what may be used, then what is told: a driver never knows more than it may use.
        self.end.store(to, Ordering::Release);
        self.told.store(to, Ordering::Release);
        Ok(if to == from {
            Change::None
        } else {
            Change::Grown { from, to }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(size: &Size, bytes: u64) -> Change {
        size.update(|| Ok::<_, ()>(bytes)).unwrap()
    }

    #[test]
    fn growth_is_told_and_a_shrunken_image_only_ends_earlier() {
        let size = Size::new(8 * 512);
        assert_eq!(update(&size, 8 * 512), Change::None);
        assert_eq!(update(&size, 16 * 512), Change::Grown { from: 8, to: 16 });
        assert_eq!((size.told(), size.end()), (16, 16));
        let shrunk = Change::Shrunk { from: 16, to: 4 };
        assert_eq!(update(&size, 4 * 512 + 1), shrunk);
        assert_eq!((size.told(), size.end()), (16, 4));
        // Back again: nothing that the driver would have to know.
        assert_eq!(update(&size, 16 * 512), Change::None);
        assert_eq!((size.told(), size.end()), (16, 16));
        assert_eq!(update(&size, 17 * 512 + 1), Change::Odd { bytes: 8705 });
        assert_eq!((size.told(), size.end()), (16, 16));
        assert_eq!(size.update(|| Err("gone")), Err("gone"));
        assert_eq!((size.told(), size.end()), (16, 16));
    }
}
