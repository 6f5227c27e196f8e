//! The in-flight region: which requests were taken and not yet answered, in memory that outlives us.
//!
//! ```text
//!   region (a memfd that the frontend keeps) = one part per queue, each 64-byte aligned:
//!   ┌ features u64 │ version u16 │ desc_num u16 │ last_batch_head u16 │ used_idx u16 ┐
//!   ├ desc_num × { inflight u8, padding [u8; 5], next u16, counter u64 }            ┤
//!   └ room, at the end of the part, for a state of the device's (saved_state)       ┘
//!
//!   pop      desc[head].counter = n++, then .inflight = 1
//!   push     desc[head].next = last_batch_head, then last_batch_head = head
//!   publish  used.idx of the ring, then .inflight = 0 of the batch, then used_idx
//! ```
//!
//! A process may be killed between any two of these stores. Whoever takes the ring over compares
//! used_idx with the ring's own: where they differ, the last batch (its length is the difference,
//! its heads are the list) was published and only its marks are stale. What is still marked was not
//! answered, and is handed to the device again in the order of the counters, before anything new.
//!
//! The bytes are foreign: read once, when a ring starts, each value checked and every walk bounded;
//! a region that contradicts its ring breaks that queue. After that it is only written. A region
//! whose file is truncated ends the session like lost guest memory. Order of stores: a kill takes effect between two instructions,
//! so the compiler must keep the order and the processor need not be told.
//!
//! Threads: made by the control thread, written by the queue's. Spec: vhost-user, "Inflight I/O
//! tracking" (split virtqueues).
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use crate::guest_memory::{GuestSlice, MemoryError, RawSlice, Region, RegionInfo};
use crate::protocol::message::InflightInfo;
use crate::saved_state::AREA_SIZE;
use crate::sys;

const HEADER_SIZE: usize = 16;
const ENTRY_SIZE: usize = 16;
/// Alignment of a queue's part, as all implementations have it.
const QUEUE_ALIGN: u64 = 64;
const VERSION: u16 = 1;

/// Offsets of a queue's fields.
mod at {
    pub(super) const FEATURES: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    /// Within an entry.
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
}

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// Numbers of a message that make no sense.
    #[error("in-flight region of {queues} queues of {size} entries in {bytes:#x} bytes")]
    BadShape {
        /// Queues, as the frontend says.
        queues: u16,
        /// Entries of each, as the frontend says.
        size: u16,
        /// Bytes of all.
        bytes: u64,
    },
    /// Written by something that we do not know.
    #[error("in-flight region of version {0}")]
    Version(u16),
    /// The ring has more entries than the queue's part.
    #[error("in-flight region has no room for queue {queue} with {size} entries")]
    NoRoom {
        /// Which queue.
        queue: u16,
        /// Entries of its ring.
        size: u16,
    },
    /// The last batch names descriptors that the ring does not have.
    #[error("in-flight region names descriptor {head} of a ring of {size}")]
    BadHead {
        /// The descriptor.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// Requests are in flight, and of another ring than this one.
    #[error("in-flight region is at used index {region}, its ring of {size} entries at {ring}")]
    OtherRing {
        /// used_idx of the region.
        region: u16,
        /// used.idx of the ring.
        ring: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// The file cannot be mapped, or is too short.
    #[error("in-flight region")]
    Memory(#[from] MemoryError),
}

/// A new region for `num_queues` rings of up to `entries` each, sealed: the fd, and what the
/// frontend is told of it.
pub fn allocate(num_queues: u16, entries: u16) -> io::Result<(OwnedFd, InflightInfo)> {
    let one = (HEADER_SIZE + ENTRY_SIZE * usize::from(entries) + AREA_SIZE) as u64;
    let map_size = one.next_multiple_of(QUEUE_ALIGN) * u64::from(num_queues);
    let file = sys::sealed_memfd(c"berth-inflight", map_size)?;
    let info = InflightInfo {
        map_size,
        map_offset: 0,
        num_queues,
        queue_size: entries,
    };
    Ok((file, info))
}

/// A region that the frontend handed us, mapped.
#[derive(Debug)]
pub struct InflightRegion {
    region: Region,
    num_queues: u16,
    /// Bytes from one queue's part to the next.
    stride: usize,
}

impl InflightRegion {
    /// Maps what SET_INFLIGHT_FD described.
    ///
    /// A queue's part is as large as the whole region has room for: how many entries that is was
    /// our choice, or that of the backend that made it, and the frontend repeats its own number.
    pub fn map(info: InflightInfo, file: &OwnedFd) -> Result<InflightRegion, InflightError> {
        let bad = InflightError::BadShape {
            queues: info.num_queues,
            size: info.queue_size,
            bytes: info.map_size,
        };
        if info.num_queues == 0 || !info.map_offset.is_multiple_of(8) {
            return Err(bad);
        }
        let stride = info.map_size / u64::from(info.num_queues) / QUEUE_ALIGN * QUEUE_ALIGN;
        let stride = match usize::try_from(stride) {
            Ok(stride) if stride >= HEADER_SIZE + ENTRY_SIZE => stride,
            _ => return Err(bad),
        };
        let place = RegionInfo {
            gpa: 0,
            size: info.map_size,
            uva: 0,
            file_offset: info.map_offset,
        };
        Ok(InflightRegion {
            region: Region::map(place, file)?,
            num_queues: info.num_queues,
            stride,
        })
    }

    /// Whether the file was truncated under us.
    pub fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    /// Room for the saved state of `queue`, whose ring has `size` entries, if there is.
    pub(crate) fn state_area(&self, queue: u16, size: u16) -> Option<RawSlice> {
        let marks = HEADER_SIZE + ENTRY_SIZE * usize::from(size);
        let room = self.stride.checked_sub(AREA_SIZE)?;
        // Values are accessed at multiples of eight.
        if queue >= self.num_queues || room < marks || !room.is_multiple_of(8) {
            return None;
        }
        let all = self.region.as_slice();
        let area = all.sub(usize::from(queue) * self.stride + room, AREA_SIZE);
        area.ok().map(|area| area.raw())
    }

    /// The part of `queue`, whose ring has `size` entries.
    fn queue(&self, queue: u16, size: u16) -> Result<RawSlice, InflightError> {
        let len = HEADER_SIZE + ENTRY_SIZE * usize::from(size);
        if queue >= self.num_queues || len > self.stride {
            return Err(InflightError::NoRoom { queue, size });
        }
        let all = self.region.as_slice();
        Ok(all.sub(usize::from(queue) * self.stride, len)?.raw())
    }
}

/// The marks of one queue, on its own thread.
#[derive(Debug)]
pub(crate) struct Tracker {
    region: Arc<InflightRegion>,
    part: RawSlice,
    size: u16,
    next_counter: u64,
    /// Head of the chain taken from each slot of the available ring.
    taken: Box<[u16]>,
    /// Heads pushed and not published.
    batch: Vec<u16>,
    last_batch_head: u16,
}

impl Tracker {
    pub(crate) fn new(
        region: Arc<InflightRegion>,
        queue: u16,
        size: u16,
    ) -> Result<Tracker, InflightError> {
        Ok(Tracker {
            part: region.queue(queue, size)?,
            region,
            size,
            next_counter: 0,
            taken: vec![0; usize::from(size)].into(),
            batch: Vec::with_capacity(usize::from(size)),
            last_batch_head: 0,
        })
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    fn part(&self) -> GuestSlice<'_> {
        self.part.bind(&*self.region)
    }

    fn entry(&self, head: u16) -> Result<GuestSlice<'_>, MemoryError> {
        let offset = HEADER_SIZE + ENTRY_SIZE * usize::from(head);
        self.part().sub(offset, ENTRY_SIZE)
    }

    fn mark(&self, head: u16, inflight: u8) -> Result<(), MemoryError> {
        self.entry(head)?.store(0, inflight)
    }

    /// Reads what an earlier owner of the ring left, whose used index now is `used_idx`, and puts
    /// right what it could not finish: the heads still in flight, oldest first. None where nobody
    /// has used this part of the region before.
    ///
    /// May be cut short anywhere and be begun anew.
    pub(crate) fn recover(&mut self, used_idx: u16) -> Result<Option<Vec<u16>>, InflightError> {
        let part = self.part();
        match part.load::<u16>(at::VERSION)? {
            0 => {
                self.initialise(used_idx)?;
                return Ok(None);
            }
            VERSION => {}
            other => return Err(InflightError::Version(other)),
        }
        let size = self.size;
        let known: u16 = part.load(at::USED_IDX)?;
        let last_batch_head = part.load(at::LAST_BATCH_HEAD)?;
        let batch = used_idx.wrapping_sub(known);
        if batch <= size {
            self.finish_batch(last_batch_head, batch)?;
        }
        let mut found = Vec::new();
        for head in 0..size {
            let entry = self.entry(head)?;
            if entry.load::<u8>(0)? != 0 {
                found.push((entry.load::<u64>(at::COUNTER)?, head));
            }
        }
        if batch > size && !found.is_empty() {
            return Err(InflightError::OtherRing {
                region: known,
                ring: used_idx,
                size,
            });
        }
        part.store(at::USED_IDX, used_idx)?;
        found.sort_unstable();
        self.last_batch_head = if last_batch_head < size {
            last_batch_head
        } else {
            0
        };
        self.next_counter = found.last().map_or(0, |(last, _)| last.wrapping_add(1));
        Ok(Some(found.into_iter().map(|(_, head)| head).collect()))
    }

    fn initialise(&self, used_idx: u16) -> Result<(), InflightError> {
        let part = self.part();
        for head in 0..self.size {
            self.mark(head, 0)?;
        }
        part.store(at::FEATURES, 0u64)?;
        part.store(at::DESC_NUM, self.size)?;
        part.store(at::LAST_BATCH_HEAD, 0u16)?;
        part.store(at::USED_IDX, used_idx)?;
        compiler_fence(Ordering::SeqCst);
        part.store(at::VERSION, VERSION)?;
        Ok(())
    }

    /// Clears the marks of the last `batch` heads pushed, which were published.
    fn finish_batch(&self, last: u16, batch: u16) -> Result<(), InflightError> {
        let mut head = last;
        for _ in 0..batch {
            if head >= self.size {
                let size = self.size;
                return Err(InflightError::BadHead { head, size });
            }
            self.mark(head, 0)?;
            head = self.entry(head)?.load(at::NEXT)?;
        }
        Ok(())
    }

    /// The chain at `head`, from this slot of the available ring, goes to the device.
    pub(crate) fn take(&mut self, slot: usize, head: u16) -> Result<(), MemoryError> {
        let entry = self.entry(head)?;
        entry.store(at::COUNTER, self.next_counter)?;
        entry.store(0, 1u8)?;
        self.next_counter = self.next_counter.wrapping_add(1);
        if let Some(taken) = self.taken.get_mut(slot) {
            *taken = head;
        }
        Ok(())
    }

    /// The chain from this slot was not begun: it is to be taken again.
    pub(crate) fn untake(&mut self, slot: usize) -> Result<(), MemoryError> {
        let head = self.taken.get(slot).copied().unwrap_or(0);
        self.mark(head, 0)
    }

    /// The chain at `head`, of which nothing is known yet here, will be taken from its ring anew.
    pub(crate) fn forget(&self, head: u16) -> Result<(), MemoryError> {
        self.mark(head, 0)
    }

    /// The used ring has an entry for `head` that is not published.
    pub(crate) fn push(&mut self, head: u16) -> Result<(), MemoryError> {
        self.entry(head)?.store(at::NEXT, self.last_batch_head)?;
        self.part().store(at::LAST_BATCH_HEAD, head)?;
        self.last_batch_head = head;
        self.batch.push(head);
        Ok(())
    }

    /// The used index that the driver sees is `used_idx` now: all that was pushed is answered.
    pub(crate) fn published(&mut self, used_idx: u16) -> Result<(), MemoryError> {
        // After the store of the used index, in the program's order.
        compiler_fence(Ordering::SeqCst);
        while let Some(head) = self.batch.pop() {
            self.mark(head, 0)?;
        }
        self.part().store(at::USED_IDX, used_idx)
    }
}
