//! The device side of a split virtqueue over mapped guest memory.
//!
//! ```text
//!   avail.idx ──▶ pop_into ──▶ Chain … device … ──▶ push_used ──▶ (publish) used.idx ──▶ signal?
//! ```
//!
//! Why not `virtio_queue::Queue`: its chain iterator ends silently where the ring is broken (we
//! must stop the queue and say so), it ignores VRING_AVAIL_F_NO_INTERRUPT, and it looks the
//! region up for every field of the ring; here the three parts are translated once.
//!
//! Owned by one worker thread. Used entries become visible in one store per batch
//! ([`Ring::publish`]), and the driver is signalled at most once for it ([`Ring::needs_signal`]).
//!
//! Invariants: an index or descriptor is fetched once and then checked; a chain of N descriptors
//! costs O(N) with N bounded, whatever the driver writes. Spec: virtio 1.3, 2.7.
#![forbid(unsafe_code)]

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use crate::chain::Chain;
use crate::guest_memory::{GuestMemory, GuestSlice, MemoryError, RawSlice};
use crate::inflight::{InflightError, InflightRegion, Tracker};
use crate::latency::Latency;
use crate::log::{LogError, QueueLog, RingLog};
use crate::metrics::QueueCounters;
use crate::saved_state::SavedState;

/// Longest chain taken, indirect descriptors included. The specification's limit is the queue
/// size; drivers that size indirect tables by seg_max go somewhat above it.
const MAX_CHAIN: usize = 4096;
const DESC_SIZE: usize = 16;

/// What the driver did wrong. None of these can come from a driver that follows the specification.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// avail.idx ran ahead of the ring.
    #[error("avail index {avail} is {ahead} ahead of {next} in a ring of {size}")]
    AvailJump {
        /// What the driver wrote.
        avail: u16,
        /// What we expected to take next.
        next: u16,
        /// The difference.
        ahead: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index outside of its table.
    #[error("descriptor index {index} is outside a table of {len}")]
    BadIndex {
        /// The index.
        index: u16,
        /// Length of the table.
        len: usize,
    },
    /// A loop, or a chain without end.
    #[error("descriptor chain at head {head} does not end after {limit} descriptors")]
    Endless {
        /// Head of the chain.
        head: u16,
        /// How many descriptors were followed.
        limit: usize,
    },
    /// An indirect table of a size that is 0 or no multiple of 16, or too long.
    #[error("indirect table of {len} bytes at gpa {gpa:#x}")]
    BadIndirect {
        /// Its address.
        gpa: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// An indirect descriptor inside an indirect table, with NEXT, or not negotiated.
    #[error("indirect descriptor where none is allowed, in the chain at head {head}")]
    UnexpectedIndirect {
        /// Head of the chain.
        head: u16,
    },
    /// A readable descriptor after a writable one.
    #[error("device-readable descriptor after a writable one, in the chain at head {head}")]
    BadOrder {
        /// Head of the chain.
        head: u16,
    },
    /// An address outside of guest memory.
    #[error("bad address in the ring")]
    Memory(#[from] MemoryError),
    /// What an earlier process left in the in-flight region cannot be.
    #[error("cannot continue the ring")]
    Inflight(#[from] InflightError),
    /// Writes that cannot be logged for a migration.
    #[error("cannot log a write")]
    Log(#[from] LogError),
}

/// Where the frontend placed a ring, as in SET_VRING_ADDR, and how large it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of entries, a power of two.
    pub size: u16,
    /// Frontend address of the descriptor table.
    pub desc_uva: u64,
    /// Frontend address of the available ring.
    pub avail_uva: u64,
    /// Frontend address of the used ring.
    pub used_uva: u64,
}

/// The three parts of a ring, translated.
#[derive(Clone, Copy, Debug)]
struct Parts {
    desc: RawSlice,
    avail: RawSlice,
    used: RawSlice,
}

impl Parts {
    fn translate(layout: &RingLayout, memory: &GuestMemory) -> Result<Parts, MemoryError> {
        let size = usize::from(layout.size);
        let part = |uva: u64, len: usize, align: usize| {
            let slice = memory.slice_uva(uva, len)?;
            if !slice.host_addr().is_multiple_of(align) {
                return Err(MemoryError::Misaligned { offset: 0 });
            }
            Ok(slice.raw())
        };
        Ok(Parts {
            desc: part(layout.desc_uva, DESC_SIZE * size, 8)?,
            // flags, idx, ring[size], used_event
            avail: part(layout.avail_uva, 6 + 2 * size, 2)?,
            // flags, idx, ring[size] of 8 bytes, avail_event
            used: part(layout.used_uva, 6 + 8 * size, 4)?,
        })
    }
}

/// The device side of one split virtqueue.
#[derive(Debug)]
pub struct Ring {
    layout: RingLayout,
    memory: Rc<GuestMemory>,
    /// How often the memory was another one.
    memory_generation: u64,
    parts: Parts,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    /// avail.idx as last fetched.
    known_avail: u16,
    next_used: u16,
    published_used: u16,
    /// used.idx when the driver's wish to be signalled was last looked at.
    signalled_used: u16,
    /// Whether it was, since the ring was started: until then nobody knows what the driver was
    /// signalled for, and a wish that lies behind us may be one that was never fulfilled.
    signalled: bool,
    /// The ring goes on from where a predecessor left it.
    resumed: bool,
    latency: Option<Latency>,
    /// Where requests in flight are noted, if the frontend gave us a region.
    tracker: Option<Tracker>,
    /// Where the device may keep a little, in the same region.
    saved: Option<SavedState>,
    /// What an earlier process left in flight, to be popped first, and how many of it have been.
    resubmits: Vec<u16>,
    resubmitted: usize,
    /// Pops after those; counted up to `u16::MAX`, and only where there were any.
    fresh: u16,
    /// While the frontend wants our writes logged.
    log: Option<Box<RingLog>>,
}

impl Ring {
    /// A ring that continues at `base`, with `features` as the driver accepted them.
    pub fn new(
        layout: RingLayout,
        base: u16,
        features: u64,
        memory: Rc<GuestMemory>,
    ) -> Result<Ring, RingError> {
        let parts = Parts::translate(&layout, &memory)?;
        let has = |bit: u32| features & (1 << bit) != 0;
        let mut ring = Ring {
            layout,
            memory,
            memory_generation: 0,
            parts,
            event_idx: has(crate::features::RING_EVENT_IDX),
            indirect: has(crate::features::RING_INDIRECT_DESC),
            next_avail: base,
            known_avail: base,
            next_used: 0,
            published_used: 0,
            signalled_used: 0,
            signalled: false,
            resumed: false,
            latency: None,
            tracker: None,
            saved: None,
            resubmits: Vec::new(),
            resubmitted: 0,
            fresh: 0,
            log: None,
        };
        // The used index is in the ring, and survives us there.
        ring.next_used = u16::from_le(ring.used_idx()?.load(Ordering::Acquire));
        ring.published_used = ring.next_used;
        ring.signalled_used = ring.next_used;
        ring.resumed = base != 0 || ring.next_used != 0;
        Ok(ring)
    }

    /// Counts how long requests take into `counters`, whose one writer is this ring's thread.
    pub(crate) fn measure_latency(&mut self, counters: Arc<QueueCounters>) {
        self.latency = Some(Latency::new(self.layout.size, counters));
    }

    /// A call of `process` begins.
    pub(crate) fn begin_batch(&mut self) {
        if let Some(latency) = &mut self.latency {
            latency.begin_batch();
        }
    }

    /// The same ring, with its requests in flight noted in the part of `region` for `queue`. Where
    /// an earlier process noted some, this ring begins with these, and after that with the first
    /// chain that was not taken, whatever base it was given.
    pub fn tracked(mut self, region: Arc<InflightRegion>, queue: u16) -> Result<Ring, RingError> {
        self.saved = SavedState::of(&region, queue, self.layout.size);
        let mut tracker = Tracker::new(region, queue, self.layout.size)?;
        if let Some(heads) = tracker.recover(self.next_used)? {
            if self.are_next(&heads)? {
                // Answered in order so far: the ring itself knows them, and in which order. From
                // the last to the first, so that those still marked are always the first ones.
                for head in heads.iter().rev() {
                    tracker.forget(*head)?;
                }
                self.next_avail = self.next_used;
            } else {
                // At most the ring's size.
                self.next_avail = self.next_used.wrapping_add(heads.len() as u16);
                self.resubmits = heads;
            }
            self.known_avail = self.next_avail;
        }
        self.tracker = Some(tracker);
        Ok(self)
    }

    /// Whether the available ring has exactly these from the used index on.
    fn are_next(&self, heads: &[u16]) -> Result<bool, RingError> {
        let avail = self.avail();
        for (at, head) in (self.next_used..=u16::MAX).chain(0..=u16::MAX).zip(heads) {
            if u16::from_le(avail.load(self.avail_entry(at))?) != *head {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Offset in the available ring of the entry with this index.
    fn avail_entry(&self, index: u16) -> usize {
        4 + 2 * self.slot(index)
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.layout.size - 1))
    }

    /// What [`save_state`](Ring::save_state) was last given, by this process or one before it;
    /// nothing where there was nothing, or no region. Foreign bytes.
    pub fn load_state(&self) -> Result<Vec<u8>, RingError> {
        match &self.saved {
            Some(saved) => Ok(saved.load()?),
            None => Ok(Vec::new()),
        }
    }

    /// Keeps `bytes`, at most [`MAX_STATE`](crate::saved_state::MAX_STATE), for a successor of
    /// this process, where the frontend keeps an in-flight region.
    pub fn save_state(&mut self, bytes: &[u8]) -> Result<(), RingError> {
        match &self.saved {
            Some(saved) => Ok(saved.save(bytes)?),
            None => Ok(()),
        }
    }

    /// Whether guest memory, the in-flight region or the dirty log was truncated under us.
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
            || self.tracker.as_ref().is_some_and(Tracker::is_lost)
            || self.log.as_ref().is_some_and(|log| log.is_lost())
    }

    /// Chains of an earlier process that have yet to be popped.
    pub(crate) fn resubmits_left(&self) -> usize {
        self.resubmits.len() - self.resubmitted
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// The index of the next chain to take: what GET_VRING_BASE answers when nothing is in flight.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The memory this ring lives in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Another number each time [`memory`](Ring::memory) is another one. Between two drains, memory
    /// only grows.
    pub fn memory_generation(&self) -> u64 {
        self.memory_generation
    }

    /// Continues in new memory; nothing may be in flight.
    pub(crate) fn set_memory(&mut self, memory: Rc<GuestMemory>) -> Result<(), RingError> {
        self.parts = Parts::translate(&self.layout, &memory)?;
        self.memory = memory;
        self.memory_generation += 1;
        if let Some(log) = &mut self.log {
            log.chain.release();
        }
        Ok(())
    }

    /// What is logged from now on, also of chains that were taken before.
    pub(crate) fn set_log(&mut self, log: Option<QueueLog>) {
        self.log = log.map(|queue| Box::new(RingLog::new(queue)));
    }

    /// The chain of `head` may have been written.
    #[cold]
    fn log_chain(&mut self, head: u16) -> Result<(), RingError> {
        let Some(mut log) = self.log.take() else {
            return Ok(());
        };
        let result = self.log_writable(&mut log, head);
        self.log = Some(log);
        result
    }

    fn log_writable(&self, log: &mut RingLog, head: u16) -> Result<(), RingError> {
        if !log.logs_data() {
            return Ok(());
        }
        let mut chain = std::mem::take(&mut log.chain);
        chain.begin(head, &self.memory);
        let result = self.follow(&mut chain).and_then(|()| {
            for piece in chain.writable() {
                // The piece was found in this memory.
                let gpa = self.memory.gpa_of(&piece).unwrap_or(u64::MAX);
                log.mark_data(gpa, piece.len())?;
            }
            Ok(())
        });
        log.chain = chain;
        result
    }

    /// `len` bytes at `offset` of the used ring were written.
    #[inline]
    fn log_used(&mut self, offset: usize, len: usize) -> Result<(), RingError> {
        match &mut self.log {
            None => Ok(()),
            Some(log) => Ok(log.mark_used(offset, len)?),
        }
    }

    fn desc_table(&self) -> GuestSlice<'_> {
        self.parts.desc.bind(&*self.memory)
    }

    fn avail(&self) -> GuestSlice<'_> {
        self.parts.avail.bind(&*self.memory)
    }

    fn used(&self) -> GuestSlice<'_> {
        self.parts.used.bind(&*self.memory)
    }

    fn used_idx(&self) -> Result<&AtomicU16, RingError> {
        Ok(self.used().atomic_u16(2)?)
    }

    /// Chains that wait in the ring. Fetches avail.idx.
    pub fn num_available(&mut self) -> Result<u16, RingError> {
        let ahead = self.fetch_avail()?;
        // Both at most the ring's size, which is at most half of what fits.
        Ok(ahead.saturating_add(self.resubmits_left() as u16))
    }

    fn fetch_avail(&mut self) -> Result<u16, RingError> {
        let idx = self.avail().atomic_u16(2)?;
        // Acquire: the ring entries and descriptors below this index are read after it.
        let avail = u16::from_le(idx.load(Ordering::Acquire));
        let ahead = avail.wrapping_sub(self.next_avail);
        if ahead > self.layout.size {
            return Err(RingError::AvailJump {
                avail,
                next: self.next_avail,
                ahead,
                size: self.layout.size,
            });
        }
        self.known_avail = avail;
        Ok(ahead)
    }

    /// Takes the next chain. Convenience for [`pop_into`](Ring::pop_into) with a new `Chain`.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::new();
        Ok(self.pop_into(&mut chain)?.then_some(chain))
    }

    /// Takes the next chain into `chain`, whose allocations are reused; false where there is none.
    pub fn pop_into(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if let Some(head) = self.resubmits.get(self.resubmitted) {
            // Still marked, under its old number.
            chain.begin(*head, &self.memory);
            self.follow(chain)?;
            self.resubmitted += 1;
            if let Some(latency) = &mut self.latency {
                latency.popped(chain.head());
            }
            return Ok(true);
        }
        if self.known_avail == self.next_avail && self.fetch_avail()? == 0 {
            return Ok(false);
        }
        let slot = self.slot(self.next_avail);
        let head = u16::from_le(self.avail().load::<u16>(4 + 2 * slot)?);
        chain.begin(head, &self.memory);
        self.follow(chain)?;
        if let Some(tracker) = &mut self.tracker {
            tracker.take(slot, head)?;
            if !self.resubmits.is_empty() {
                self.fresh = self.fresh.saturating_add(1);
            }
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(latency) = &mut self.latency {
            latency.popped(head);
        }
        Ok(true)
    }

    /// Puts back the `count` chains popped last: they will be popped again, in the same order.
    pub fn put_back(&mut self, count: u16) {
        let mut fresh = count;
        if !self.resubmits.is_empty() {
            fresh = count.min(self.fresh);
            self.fresh -= fresh;
        }
        for _ in 0..fresh {
            self.next_avail = self.next_avail.wrapping_sub(1);
            let slot = self.slot(self.next_avail);
            if let Some(tracker) = &mut self.tracker {
                // Cannot fail: it was marked.
                let _ = tracker.untake(slot);
            }
            if self.log.is_some() {
                let head = self.avail().load::<u16>(4 + 2 * slot).map(u16::from_le);
                self.log_put_back(head.map_err(RingError::from));
            }
        }
        for _ in fresh..count {
            self.resubmitted = self.resubmitted.saturating_sub(1);
            if let (Some(&head), true) = (self.resubmits.get(self.resubmitted), self.log.is_some())
            {
                self.log_put_back(Ok(head));
            }
        }
    }

    /// A chain that was taken may have been written, and is left to a successor.
    #[cold]
    fn log_put_back(&mut self, head: Result<u16, RingError>) {
        let logged = head.and_then(|head| self.log_chain(head));
        if let (Err(error), Some(log)) = (logged, &mut self.log) {
            log.fail_later(error);
        }
    }

    /// Walks the descriptors of `chain.head()`.
    fn follow(&self, chain: &mut Chain) -> Result<(), RingError> {
        let head = chain.head();
        let mut walk = Walk {
            table: self.desc_table(),
            len: usize::from(self.layout.size),
            next: Some(head),
            seen: 0,
            limit: usize::from(self.layout.size),
        };
        while let Some(desc) = walk.step(head)? {
            if desc.has(VRING_DESC_F_INDIRECT) {
                if !self.indirect || desc.has(VRING_DESC_F_NEXT) {
                    return Err(RingError::UnexpectedIndirect { head });
                }
                return self.follow_indirect(chain, &desc);
            }
            add_buffer(chain, &desc)?;
        }
        Ok(())
    }

    fn follow_indirect(&self, chain: &mut Chain, desc: &Desc) -> Result<(), RingError> {
        let (gpa, len) = (desc.addr, desc.len);
        let count = len as usize / DESC_SIZE;
        if count == 0 || !(len as usize).is_multiple_of(DESC_SIZE) || count > MAX_CHAIN {
            return Err(RingError::BadIndirect { gpa, len });
        }
        let head = chain.head();
        let mut walk = Walk {
            table: self.memory.slice(gpa, len as usize)?,
            len: count,
            next: Some(0),
            seen: 0,
            limit: count,
        };
        while let Some(desc) = walk.step(head)? {
            if desc.has(VRING_DESC_F_INDIRECT) {
                return Err(RingError::UnexpectedIndirect { head });
            }
            add_buffer(chain, &desc)?;
        }
        Ok(())
    }

    /// The device is done with the chain of `head` and wrote `len` bytes into it. Visible to the
    /// driver after [`publish`](Ring::publish), which the library calls after every `process`.
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        if self.log.is_some() {
            self.log_chain(head)?;
        }
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        let entry = u64::from(head) | u64::from(len) << 32;
        self.used().store(4 + 8 * slot, entry.to_le())?;
        if let Some(tracker) = &mut self.tracker {
            tracker.push(head)?;
        }
        self.log_used(4 + 8 * slot, 8)?;
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(latency) = &mut self.latency {
            latency.used(head);
        }
        Ok(())
    }

    /// Makes all pushed entries visible to the driver; whether there were any.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        let published = self.publish_index()?;
        if let Some(log) = &mut self.log {
            log.finish_batch()?;
        }
        Ok(published)
    }

    fn publish_index(&mut self) -> Result<bool, RingError> {
        if self.published_used == self.next_used {
            return Ok(false);
        }
        // Release: the entries, and the data they speak of, are visible before the index.
        let idx = self.next_used.to_le();
        self.used_idx()?.store(idx, Ordering::Release);
        self.log_used(2, 2)?;
        self.published_used = self.next_used;
        if let Some(tracker) = &mut self.tracker {
            tracker.published(self.next_used)?;
        }
        if let Some(latency) = &mut self.latency {
            latency.published();
        }
        Ok(true)
    }

    /// The driver may have missed a signal: it gets one more.
    pub(crate) fn owe_signal(&mut self) {
        self.signalled = false;
        self.resumed = self.resumed || self.published_used != 0;
    }

    /// Whether the driver wants a signal for what was published since this was last asked. The
    /// first one of a ring that goes on is for what a predecessor published last.
    pub fn needs_signal(&mut self) -> Result<bool, RingError> {
        let (old, new) = (self.signalled_used, self.published_used);
        let first = !self.signalled;
        if old == new && !(first && self.resumed) {
            return Ok(false);
        }
        self.signalled = true;
        self.signalled_used = new;
        // SeqCst: the index is visible before the driver's wish is read; the driver does it the
        // other way round (virtio 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        let avail = self.avail();
        if self.event_idx {
            let offset = 4 + 2 * usize::from(self.layout.size);
            let event = u16::from_le(avail.atomic_u16(offset)?.load(Ordering::Relaxed));
            let passed = new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
            Ok(first || passed)
        } else {
            let flags = u16::from_le(avail.atomic_u16(0)?.load(Ordering::Relaxed));
            Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver not to kick. With EVENT_IDX there is nothing to write: a stale avail_event
    /// has that effect.
    pub fn disable_notification(&mut self) -> Result<(), RingError> {
        if !self.event_idx {
            let flags = (VRING_USED_F_NO_NOTIFY as u16).to_le();
            self.used().atomic_u16(0)?.store(flags, Ordering::Relaxed);
            self.log_used(0, 2)?;
        }
        Ok(())
    }

    /// Asks the driver to kick for the next chain. True where one came in the meantime, so that no
    /// kick may follow.
    pub fn enable_notification(&mut self) -> Result<bool, RingError> {
        let used = self.used();
        if self.event_idx {
            let offset = 4 + 8 * usize::from(self.layout.size);
            let next = self.next_avail.to_le();
            used.atomic_u16(offset)?.store(next, Ordering::Relaxed);
            self.log_used(offset, 2)?;
        } else {
            used.atomic_u16(0)?.store(0, Ordering::Relaxed);
            self.log_used(0, 2)?;
        }
        // SeqCst: the wish is visible before avail.idx is read again; the driver does it the other
        // way round (virtio 1.3, 2.7.10).
        fence(Ordering::SeqCst);
        Ok(self.num_available()? != 0)
    }
}

/// One descriptor, fetched.
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// A walk along one table of descriptors.
struct Walk<'a> {
    table: GuestSlice<'a>,
    len: usize,
    next: Option<u16>,
    seen: usize,
    limit: usize,
}

impl Walk<'_> {
    fn step(&mut self, head: u16) -> Result<Option<Desc>, RingError> {
        let Some(index) = self.next else {
            return Ok(None);
        };
        let len = self.len;
        if usize::from(index) >= len {
            return Err(RingError::BadIndex { index, len });
        }
        if self.seen == self.limit {
            let limit = self.limit;
            return Err(RingError::Endless { head, limit });
        }
        self.seen += 1;
        let offset = usize::from(index) * DESC_SIZE;
        let addr = u64::from_le(self.table.load(offset)?);
        let rest = u64::from_le(self.table.load(offset + 8)?);
        let desc = Desc {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        };
        self.next = desc.has(VRING_DESC_F_NEXT).then_some(desc.next);
        Ok(Some(desc))
    }
}

fn add_buffer(chain: &mut Chain, desc: &Desc) -> Result<(), RingError> {
    let writable = desc.has(VRING_DESC_F_WRITE);
    if !writable && chain.has_writable() {
        let head = chain.head();
        return Err(RingError::BadOrder { head });
    }
    chain.add(desc.addr, desc.len, writable)?;
    Ok(())
}
