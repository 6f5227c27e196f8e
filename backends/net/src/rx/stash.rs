//! Frames that were taken from the port and lie elsewhere than their turn demands: copies of them,
//! and their delivery once the driver has given buffers.

#![forbid(unsafe_code)]

use berth_queue_worker::{QueueError, Ring};

use super::RxQueue;
use crate::header::MAX_FRAME_WITH_HDR;

impl RxQueue {
    /// Takes a copy of a frame, to be delivered later.
    pub(super) fn stash(&mut self, len: usize, first: usize, count: usize, spill: usize) {
        let mut bytes = vec![0; len];
        let in_pool = self.pool.copy_out(first, count, 0, &mut bytes);
        let from = spill * MAX_FRAME_WITH_HDR;
        bytes[in_pool..].copy_from_slice(&self.spills[from + in_pool..from + len]);
        self.stash.push_back(bytes);
    }

    /// Delivers the first frame of the stash; false if the driver has yet to give buffers.
    pub(super) fn deliver_stashed(&mut self, ring: &mut Ring) -> Result<bool, QueueError> {
        let Some(frame) = self.stash.pop_front() else {
            return Ok(true);
        };
        let may_grow = self.fill_for(ring, frame.len())?;
        let room = match self.pool.chains_from(0).next() {
            Some(chain) if !self.mergeable => chain.writable_len(),
            _ => self.pool.bytes(),
        };
        if frame.len() <= room {
            self.pool.copy_in(&frame);
            self.finish(frame.len(), ring)?;
        } else if !may_grow
            || (!self.mergeable && !self.pool.is_empty())
            || self.pool.pieces() >= usize::from(ring.size())
        {
            // The driver has no buffer left to give: waiting would be for ever.
            self.counters.dropped.add(1);
        } else {
            self.stash.push_front(frame);
            return Ok(false);
        }
        Ok(true)
    }
}
