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

mod dirty;
mod error;
mod layout;
mod takeover;
mod walk;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use crate::chain::Chain;
use crate::guest_memory::{GuestMemory, GuestSlice};
use crate::inflight::Tracker;
use crate::latency::Latency;
use crate::log::RingLog;
use crate::metrics::QueueCounters;
use crate::saved_state::SavedState;

pub use error::RingError;
use layout::Parts;
pub use layout::RingLayout;

/// Longest chain taken, indirect descriptors included. The specification's limit is the queue
/// size; drivers that size indirect tables by seg_max go somewhat above it.
const MAX_CHAIN: usize = 4096;
const DESC_SIZE: usize = 16;

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

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// The index of the next entry of the used ring.
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used
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
