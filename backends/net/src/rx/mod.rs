//! Frames to the guest: one receive queue.
//!
//! ```text
//!   ring ──pop──▶ pool of buffers ──reads──▶ filter ──▶ header, used entries ──▶ ring
//!                      │ frame is not where it belongs   └─ not for the guest: buffers stay
//!                      └──▶ stash (copies), delivered in order once there are buffers
//! ```
//!
//! A frame is read straight into guest buffers. The length of the next frame is not known before,
//! so a read ends in a spill, 64 KiB of our own, unless nothing longer than the buffers can come,
//! and nothing is ever cut. Two ways:
//!
//! - **short frames**: a batch of reads, one buffer each, as many as there may be frames
//!   ([`Batcher`]); where there is no io_uring, one read at a time. Where none can be longer,
//!   they are read into memory of ours and copied, which is cheaper.
//! - **long frames** (segmentation offload) have so many bytes that a system call each is no
//!   matter: one read at a time into a pool that is kept large enough for the longest.
//!
//! A frame that lies elsewhere than its turn demands (it is longer than its buffer, or one before
//! it was, or was not for the guest) is copied to the stash with those that follow it in its
//! batch, and from there into the buffers that come next. That is rare.
//!
//! No frame is taken from the tap without a buffer: it stays there, the tap is not polled, and the
//! kernel drops what does not fit into its queue, as a network card does.
//!
//! Threads: the queue's own. Invariants: buffers are used in the order in which they were popped
//! (so a successor can continue from the used index alone), and all buffers of one frame become
//! visible to the driver at once.
//!
//! Spec: virtio 1.3, 5.1.6.3 (receive buffers), 5.1.6.4 (incoming frames).

#![forbid(unsafe_code)]

mod batched;
mod pool;
mod stash;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use berth_queue_worker::{
    Chain, Interest, Poll, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring, Source,
    Throttle,
};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};

use self::pool::Pool;
use crate::device::has;
use crate::filter::PEEK_LEN;
use crate::header::{HDR_LEN, MAX_FRAME_WITH_HDR, NUM_BUFFERS_OFFSET, header_len};
use crate::port::batch::Batcher;
use crate::port::frame::{FrameBuffer, MAX_PIECES};
use crate::port::is_removed;
use crate::state::{DeviceState, FilterView};

/// Sources: frames in the port, and the rate limit's timer.
const TAP: u32 = 1 << 0;
const PAID: u32 = 1 << 1;

/// Frames handed over before the driver is told.
const BATCH: usize = 64;
/// Most reads of one batch. Each may need a spill.
const MAX_READS: usize = 32;
/// Pieces of the buffers of one frame: the spill is one more.
const MAX_POOL_PIECES: usize = MAX_PIECES / 2;
/// Room in the pool while frames are short: header, Ethernet header with tag, 1500 bytes, and some.
const SHORT: usize = 2048;
/// A buffer with so much room can take a short frame by itself.
const ONE_BUFFER: usize = HDR_LEN + 1518;
/// So many short frames in a row end a time of long ones.
const LONG_MEMORY: u8 = 64;

/// One receive queue between start and stop.
pub struct RxQueue {
    state: Arc<DeviceState>,
    pair: u16,
    counters: Arc<QueueCounters>,
    header_len: usize,
    mergeable: bool,
    filter: FilterView,
    pool: Pool,
    list: FrameBuffer,
    /// None: one read at a time.
    batcher: Option<Batcher>,
    /// Reads of the next batch: follows what the last ones found.
    reads: usize,
    results: Vec<i32>,
    /// Tails of frames at their own offsets: what did not fit into the buffers, one for each read
    /// of a batch. Untouched memory takes no room.
    spills: Box<[u8]>,
    /// Frames that were taken from the port and wait for buffers.
    stash: VecDeque<Vec<u8>>,
    /// Counts down from the last long frame.
    long: u8,
    /// Longest frame without segmentation, if known.
    max_plain: Option<usize>,
    /// Longest frame that the last batch reckoned with, if any.
    longest: Option<usize>,
    throttle: Option<Throttle>,
    /// Frames may have been left in the port.
    more: bool,
    running: bool,
}

/// What to do with a frame that has been read.
enum Found {
    /// It is not for the guest.
    Unwanted,
    /// It is for the guest, and has this length.
    Wanted(usize),
}

impl RxQueue {
    /// The handler of the receive queue of `pair`. On the queue's thread.
    ///
    /// # Errors
    /// No timer for the rate limit.
    pub fn new(state: Arc<DeviceState>, pair: u16, start: &QueueStart) -> io::Result<Self> {
        let limiter = state.limits().receive.clone();
        // A limit is charged frame by frame.
        let batcher = limiter
            .is_none()
            .then(|| state.batcher(pair, Batcher::with_slots))
            .flatten();
        let spills = if batcher.is_some() { MAX_READS } else { 1 };
        Ok(Self {
            filter: FilterView::new(&state),
            max_plain: state.port().max_plain_frame(),
            longest: None,
            throttle: limiter.map(Throttle::new).transpose()?,
            batcher,
            state,
            pair,
            counters: Arc::clone(&start.counters),
            header_len: header_len(start.features),
            mergeable: has(start.features, VIRTIO_NET_F_MRG_RXBUF),
            pool: Pool::default(),
            list: FrameBuffer::default(),
            reads: 1,
            results: Vec::new(),
            spills: vec![0; spills * MAX_FRAME_WITH_HDR].into(),
            stash: VecDeque::new(),
            long: 0,
            more: false,
            running: false,
        })
    }

    /// Pops buffers while `more` says so, or the ring is empty, or a useless buffer was given
    /// back. False if the next one is useless, and has to wait for its turn to be given back.
    fn fill(&mut self, ring: &mut Ring, more: impl Fn(&Pool) -> bool) -> Result<bool, QueueError> {
        while more(&self.pool) {
            let mut chain = self.pool.spare();
            if !ring.pop_into(&mut chain)? {
                self.pool.keep(chain);
                break;
            }
            let pieces = chain.writable().count();
            let useless = chain.writable_len() < self.header_len || pieces > MAX_POOL_PIECES;
            if useless && self.pool.is_empty() {
                self.counters.errors.add(1);
                ring.push_used(chain.head(), 0)?;
                self.pool.keep(chain);
                // One a time: a driver that adds nothing else must not keep us here.
                return Ok(true);
            } else if useless {
                ring.put_back(1);
                self.pool.keep(chain);
                return Ok(false);
            }
            self.pool.push(chain, pieces);
        }
        Ok(true)
    }

    /// Pops buffers for a frame of `goal` bytes; false as in [`fill`](Self::fill), or if it has
    /// more pieces than one read may.
    fn fill_for(&mut self, ring: &mut Ring, goal: usize) -> Result<bool, QueueError> {
        let mergeable = self.mergeable;
        let usable = self.fill(ring, |pool| {
            let several = mergeable || pool.is_empty();
            several && pool.bytes() < goal && pool.pieces() < MAX_POOL_PIECES
        })?;
        Ok(usable && self.pool.pieces() < MAX_POOL_PIECES)
    }

    /// Reads one frame into the first buffers of the pool and, where they end, into the spill; its
    /// length, and how many buffers it may lie in.
    fn receive(&mut self, goal: usize) -> io::Result<(usize, usize)> {
        let goal = if self.mergeable { goal } else { 1 };
        let (mut count, mut pieces) = (0, 0);
        let mut frame = self.list.frame();
        for chain in self.pool.chains_from(0) {
            pieces += chain.writable().count();
            if frame.len() >= goal || (count > 0 && pieces > MAX_POOL_PIECES) {
                break;
            }
            frame.push_guest(chain.writer());
            count += 1;
        }
        let in_pool = frame.len().min(MAX_FRAME_WITH_HDR);
        frame.push_own(&mut self.spills[in_pool..MAX_FRAME_WITH_HDR]);
        let len = self.state.port().recv(self.pair, &mut frame)?;
        Ok((len, count))
    }

    /// Whether the frame of `len` bytes, just read into `count` buffers from the `first` one on,
    /// and into `spill`, is for the guest.
    fn judge(&mut self, len: usize, first: usize, count: usize, spill: usize) -> Found {
        if len < self.header_len || !self.is_wanted(first, count, spill) {
            return Found::Unwanted;
        }
        self.note_len(len);
        Found::Wanted(len)
    }

    /// The next frames are probably as long as the last ones.
    fn note_len(&mut self, len: usize) {
        if len > SHORT {
            self.long = LONG_MEMORY;
        } else {
            self.long = self.long.saturating_sub(1);
        }
    }

    fn is_wanted(&self, first: usize, count: usize, spill: usize) -> bool {
        let filter = self.filter.filter();
        if filter.passes_all() {
            return true;
        }
        let mut start = [0; PEEK_LEN];
        let in_pool = self
            .pool
            .copy_out(first, count, self.header_len, &mut start);
        let from = spill * MAX_FRAME_WITH_HDR + self.header_len + in_pool;
        let rest = PEEK_LEN - in_pool;
        start[in_pool..].copy_from_slice(&self.spills[from..from + rest]);
        filter.accepts(&start)
    }

    /// The frame lies in the first buffers of the pool: completes its header and uses them.
    fn finish(&mut self, len: usize, ring: &mut Ring) -> Result<(), QueueError> {
        let (count, _) = self.pool.covering(len);
        // At most MAX_FRAME_WITH_HDR, a byte each.
        self.complete_header(u16::try_from(count).unwrap_or(u16::MAX));
        let mut left = len;
        for _ in 0..count {
            let Some(chain) = self.pool.pop() else { break };
            let written = left.min(chain.writable_len());
            left -= written;
            // At most MAX_FRAME_WITH_HDR.
            ring.push_used(chain.head(), written as u32)?;
            self.pool.keep(chain);
        }
        self.account(len)
    }

    /// The frame lies in the first buffer of the pool, header and all: uses it.
    fn use_first(&mut self, len: usize, ring: &mut Ring) -> Result<(), QueueError> {
        if let Some(chain) = self.pool.pop() {
            // At most MAX_FRAME_WITH_HDR.
            ring.push_used(chain.head(), len as u32)?;
            self.pool.keep(chain);
        }
        self.account(len)
    }

    /// A frame has been delivered.
    fn account(&mut self, len: usize) -> Result<(), QueueError> {
        let payload = (len - self.header_len) as u64;
        self.counters.requests.add(1);
        self.counters.bytes_to_guest.add(payload);
        if let Some(throttle) = &mut self.throttle
            && !throttle.is_waiting()
            && !throttle.charge(payload)?
        {
            self.counters.throttled.add(1);
        }
        Ok(())
    }

    /// Writes what the port does not: the number of buffers; and no flags for a driver that does
    /// not know any (5.1.6.4.1).
    fn complete_header(&self, num_buffers: u16) {
        let Some(chain) = self.pool.chains_from(0).next() else {
            return;
        };
        if !has(self.state.offloads(), VIRTIO_NET_F_GUEST_CSUM) {
            chain.writer().write(&[0]);
        }
        if self.header_len == HDR_LEN {
            let mut cursor = chain.writer();
            cursor.skip(NUM_BUFFERS_OFFSET);
            cursor.write(&num_buffers.to_le_bytes());
        }
    }

    /// One frame, with a read of its own; what to wait for if nothing more can be done now.
    fn step(&mut self, ring: &mut Ring) -> Result<Option<Interest>, QueueError> {
        let goal = if self.long > 0 {
            MAX_FRAME_WITH_HDR
        } else {
            SHORT
        };
        self.fill_for(ring, goal)?;
        if self.pool.is_empty() {
            return Ok(Some(Interest::KICK));
        }
        let (len, count) = match self.receive(goal) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return self.no_frame(error).map(Some),
        };
        let Found::Wanted(len) = self.judge(len, 0, count, 0) else {
            return Ok(None);
        };
        let room: usize = self.room(0, count);
        if len <= room {
            self.finish(len, ring)?;
        } else if self.mergeable {
            self.stash(len, 0, count, 0);
        } else {
            self.counters.dropped.add(1);
        }
        Ok(None)
    }

    fn room(&self, first: usize, count: usize) -> usize {
        let chains = self.pool.chains_from(first).take(count);
        chains.map(Chain::writable_len).sum()
    }

    /// A read found none; what to wait for.
    fn no_frame(&self, error: io::Error) -> Result<Interest, QueueError> {
        if error.kind() == io::ErrorKind::WouldBlock {
            return Ok(Interest::sources(TAP));
        }
        if is_removed(&error) {
            tracing::warn!(pair = self.pair, "tap has been removed");
            return Ok(Interest::sources(0));
        }
        Err(QueueError::Device {
            what: "reading from the tap",
            source: error,
        })
    }

    /// What may be done now in the way that frames are at present; what to wait for if nothing.
    fn advance(&mut self, ring: &mut Ring) -> Result<Option<Interest>, QueueError> {
        if !self.stash.is_empty() {
            let done = self.deliver_stashed(ring)?;
            return Ok((!done).then_some(Interest::KICK));
        }
        if self.batcher.is_none() || self.long > 0 {
            return self.step(ring);
        }
        let reads = self.reads;
        self.fill(ring, |pool| pool.len() < reads)?;
        let fit = self
            .pool
            .chains_from(0)
            .take_while(|chain| chain.writable_len() >= ONE_BUFFER);
        let count = fit.take(reads).count();
        if count < 2 {
            self.reads = (self.reads * 2).min(MAX_READS);
            return self.step(ring);
        }
        self.batch(count, ring)
    }
}

impl QueueWorker for RxQueue {
    fn sources(&self) -> Vec<Source> {
        let frames = Source::readable(self.state.port().fd(self.pair));
        let paid = self.throttle.as_ref().map(Throttle::source);
        [Some(frames), paid].into_iter().flatten().collect()
    }

    fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
        if !self.running {
            self.running = true;
            self.state.start_pair(self.pair, ring.next_avail() != 0);
        }
        self.filter.refresh(&self.state);
        let begin = self.counters.requests.get();
        for _ in 0..BATCH {
            if self.counters.requests.get() - begin >= BATCH as u64 {
                break;
            }
            if let Some(throttle) = &mut self.throttle
                && !throttle.release()?
            {
                self.more = false;
                return Ok(Interest::sources(PAID));
            }
            if let Some(interest) = self.advance(ring)? {
                self.more = false;
                return Ok(interest);
            }
        }
        self.more = true;
        Ok(Interest::sources(TAP))
    }

    fn poll(&mut self) -> Poll {
        if self.more {
            Poll::Ready
        } else {
            Poll::Unknown
        }
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        // Frames in the stash are ours and wait, unless this is a stop.
        ring.put_back(self.pool.len() as u16);
        self.pool = Pool::default();
        if let Some(throttle) = &mut self.throttle {
            throttle.give_up();
        }
        if std::mem::take(&mut self.running) {
            self.state.stop_pair(self.pair);
        }
        Ok(())
    }
}

impl Drop for RxQueue {
    fn drop(&mut self) {
        if self.running {
            self.state.stop_pair(self.pair);
        }
    }
}
