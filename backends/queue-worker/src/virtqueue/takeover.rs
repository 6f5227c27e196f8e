//! Requests in flight: what an earlier process left, and what is put back for a later one.
//!
//! ```text
//!   earlier process ─▶ in-flight region ─▶ recover ─┬▶ still next in the ring: popped as ever
//!                                                   └▶ out of order: resubmits, popped first
//!   put_back ─▶ fresh chains leave the region again; resubmitted ones stay noted
//! ```
//!
//! Spec: vhost-user, "Inflight I/O tracking".

use std::sync::Arc;

use super::{Ring, RingError};
use crate::inflight::{InflightRegion, Tracker};
use crate::saved_state::SavedState;

impl Ring {
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

    /// Chains of an earlier process that have yet to be popped.
    pub(crate) fn resubmits_left(&self) -> usize {
        self.resubmits.len() - self.resubmitted
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
}
