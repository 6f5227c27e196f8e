//! A batch of reads, one buffer each, and what to do with what they found.
//!
//! ```text
//!   none can be longer than a slot:  tap ──read──▶ slot ──copy──▶ the guest's buffer
//!   otherwise:                       tap ──read──▶ the guest's buffer, and a spill
//! ```
//!
//! A slot is nobody else's: what is in it and not for the guest costs no buffer and no turn.

#![forbid(unsafe_code)]

use std::io;

use berth_queue_worker::{Chain, Interest, QueueError, Ring};
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use super::{Found, MAX_READS, RxQueue};
use crate::device::{GUEST_SEGMENTATION, has};
use crate::filter::{PEEK_LEN, RxFilter};
use crate::header::{HDR_LEN, MAX_FRAME_WITH_HDR, NUM_BUFFERS_OFFSET};
use crate::port::batch::{Batcher, SLOT_LEN};

impl RxQueue {
    /// A batch of reads for the first `count` buffers of the pool, one each.
    pub(super) fn batch(
        &mut self,
        count: usize,
        ring: &mut Ring,
    ) -> Result<Option<Interest>, QueueError> {
        let segmented = self.state.offloads() & GUEST_SEGMENTATION != 0;
        self.longest = self.max_plain.filter(|_| !segmented);
        let copy = is_bare(self.longest, SLOT_LEN)
            && self.batcher.as_ref().is_some_and(Batcher::has_slots);
        let read = if copy {
            self.read_slots(count)
        } else {
            self.read_batch(count)
        };
        if let Err(error) = read {
            // Frames that were read are lost.
            tracing::warn!(pair = self.pair, %error, "io_uring failed; going on without");
            self.batcher = None;
            return Ok(None);
        }
        let found = if copy {
            self.take_copies(ring)?
        } else {
            self.take_in_place(count, ring)?
        };
        self.after_batch(count, found)
    }

    fn read_slots(&mut self, count: usize) -> io::Result<()> {
        if let Some(batcher) = &mut self.batcher {
            self.results.clear();
            self.results.extend_from_slice(batcher.read_slots(count)?);
        }
        Ok(())
    }

    /// Frames in slots: how many there were.
    fn take_copies(&mut self, ring: &mut Ring) -> Result<usize, QueueError> {
        let mut found = 0;
        for index in 0..self.results.len() {
            if let Ok(len) = usize::try_from(self.results[index]) {
                found += 1;
                self.take_copy(index, len, ring)?;
            }
        }
        Ok(found)
    }

    fn take_copy(&mut self, index: usize, len: usize, ring: &mut Ring) -> Result<(), QueueError> {
        let has_csum = has(self.state.offloads(), VIRTIO_NET_F_GUEST_CSUM);
        let Some(batcher) = &mut self.batcher else {
            return Ok(());
        };
        let frame = batcher.slot(index, len);
        let filter = self.filter.filter();
        if len < self.header_len
            || !(filter.passes_all() || accepts(filter, &frame[self.header_len..]))
        {
            return Ok(());
        }
        if len == SLOT_LEN {
            // It has been cut: the port's MTU has just been raised.
            self.max_plain = self.state.port().max_plain_frame();
            self.counters.dropped.add(1);
            return Ok(());
        }
        let first = self.pool.chains_from(0).next();
        let room = first.map_or(0, Chain::writable_len);
        if !self.stash.is_empty() || (len > room && self.mergeable) {
            self.stash.push_back(frame.to_vec());
            self.note_len(len);
        } else if let Some(chain) = first.filter(|_| len <= room) {
            if !has_csum {
                frame[0] = 0;
            }
            if self.header_len == HDR_LEN {
                frame[NUM_BUFFERS_OFFSET..HDR_LEN].copy_from_slice(&1_u16.to_le_bytes());
            }
            chain.writer().write(frame);
            self.note_len(len);
            self.use_first(len, ring)?;
        } else {
            self.counters.dropped.add(1);
        }
        Ok(())
    }

    /// Frames in the first `count` buffers of the pool, one each: how many there were.
    fn take_in_place(&mut self, count: usize, ring: &mut Ring) -> Result<usize, QueueError> {
        let mut delivered = 0;
        let mut in_turn = true;
        let mut found = 0;
        for spill in 0..count {
            let first = spill - delivered;
            let Ok(len) = usize::try_from(self.results[spill]) else {
                in_turn = false;
                continue;
            };
            found += 1;
            let Found::Wanted(len) = self.judge(len, first, 1, spill) else {
                in_turn = false;
                continue;
            };
            let room = self.room(first, 1);
            let cut = len == room && is_bare(self.longest, room);
            if cut || (len > room && !self.mergeable) {
                self.counters.dropped.add(1);
                in_turn = false;
                self.max_plain = self.state.port().max_plain_frame();
            } else if in_turn && len <= room {
                self.finish(len, ring)?;
                delivered += 1;
            } else {
                self.stash(len, first, 1, spill);
                in_turn = false;
            }
        }
        Ok(found)
    }

    fn after_batch(&mut self, count: usize, found: usize) -> Result<Option<Interest>, QueueError> {
        if found == count {
            self.reads = (self.reads * 2).min(MAX_READS);
            return Ok(None);
        }
        self.reads = found.max(1);
        if !self.stash.is_empty() {
            return Ok(None);
        }
        let error = self.results.iter().rfind(|result| **result < 0);
        let error = error.map_or(libc::EAGAIN, |result| -result);
        self.no_frame(io::Error::from_raw_os_error(error)).map(Some)
    }

    fn read_batch(&mut self, count: usize) -> io::Result<()> {
        let longest = self.longest;
        let Some(batcher) = &mut self.batcher else {
            return Ok(());
        };
        let mut batch = batcher.reads();
        let spills = self.spills.chunks_exact_mut(MAX_FRAME_WITH_HDR);
        for (chain, spill) in self.pool.chains_from(0).take(count).zip(spills) {
            let mut frame = batch.add();
            frame.push_guest(chain.writer());
            if !is_bare(longest, frame.len()) {
                let in_pool = frame.len().min(MAX_FRAME_WITH_HDR);
                frame.push_own(&mut spill[in_pool..]);
            }
        }
        let results = batch.run()?;
        self.results.clear();
        self.results.extend_from_slice(results);
        Ok(())
    }
}

/// Whether a read into so much room needs no spill: then a frame that fills it has been cut (the
/// port's MTU has just been raised), and one that does not is whole.
fn is_bare(longest: Option<usize>, room: usize) -> bool {
    longest.is_some_and(|longest| longest < room)
}

/// Whether the guest wants the frame of these bytes.
fn accepts(filter: &RxFilter, frame: &[u8]) -> bool {
    let mut start = [0; PEEK_LEN];
    let len = frame.len().min(PEEK_LEN);
    start[..len].copy_from_slice(&frame[..len]);
    filter.accepts(&start)
}
