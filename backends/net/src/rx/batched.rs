//! A batch of reads, one buffer each, and what to do with what they found.

#![forbid(unsafe_code)]

use std::io;

use berth_queue_worker::{Interest, QueueError, Ring};

use super::{Found, MAX_READS, RxQueue};
use crate::device::GUEST_SEGMENTATION;
use crate::header::MAX_FRAME_WITH_HDR;

impl RxQueue {
    /// A batch of reads into the first `count` buffers of the pool, one each.
    pub(super) fn batch(
        &mut self,
        count: usize,
        ring: &mut Ring,
    ) -> Result<Option<Interest>, QueueError> {
        if let Err(error) = self.read_batch(count) {
            // Frames that were read are lost.
            tracing::warn!(pair = self.pair, %error, "io_uring failed; going on without");
            self.batcher = None;
            return Ok(None);
        }
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
        self.after_batch(count, found)
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
        let segmented = self.state.offloads() & GUEST_SEGMENTATION != 0;
        self.longest = self.max_plain.filter(|_| !segmented);
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
