//! Frames to the guest: one receive queue.
//!
//! ```text
//!   ring ──pop──▶ pool of buffers ──readv──▶ filter ──▶ header, used entries ──▶ ring
//!                      │ too small              └─ not for the guest: buffers stay in the pool
//!                      └──▶ spill (ours), delivered once the driver gave enough buffers
//! ```
//!
//! A frame is read straight into guest buffers. The length of the next frame is not known before,
//! so the read always ends in the spill, 64 KiB of our own, and nothing is ever cut: a frame that
//! reaches into it is copied, and waits there if need be. While frames are long the pool is kept
//! large enough for the longest, so that this is rare.
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

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use berth_queue_worker::{
    Chain, Interest, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring, Source,
};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};

use crate::device::has;
use crate::filter::PEEK_LEN;
use crate::header::{HDR_LEN, MAX_FRAME_WITH_HDR, NUM_BUFFERS_OFFSET, header_len};
use crate::port::frame::{FrameBuffer, MAX_PIECES};
use crate::port::is_removed;
use crate::state::{DeviceState, FilterView};

const TAP: u32 = 1;

/// Frames handed over before the driver is told.
const BATCH: usize = 64;
/// Pieces of the whole pool: the spill is one more.
const MAX_POOL_PIECES: usize = MAX_PIECES / 2;
/// Room in the pool while frames are short: header, Ethernet header with tag, 1500 bytes, and some.
const SHORT: usize = 2048;
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
    /// A frame at its own offsets: what did not fit into the pool, or all of it if `spilled`.
    spill: Box<[u8]>,
    /// Length of the frame that waits in the spill.
    spilled: Option<usize>,
    /// Counts down from the last long frame.
    long: u8,
    running: bool,
}

/// A guest buffer that waits for a frame.
struct Buffer {
    chain: Chain,
    pieces: usize,
}

/// Guest buffers in ring order, and used-up ones whose allocation is kept.
#[derive(Default)]
struct Pool {
    buffers: VecDeque<Buffer>,
    spare: Vec<Chain>,
    bytes: usize,
    pieces: usize,
}

impl Pool {
    fn push(&mut self, chain: Chain, pieces: usize) {
        self.bytes += chain.writable_len();
        self.pieces += pieces;
        self.buffers.push_back(Buffer { chain, pieces });
    }

    fn pop(&mut self) -> Option<Chain> {
        let Buffer { chain, pieces } = self.buffers.pop_front()?;
        self.bytes -= chain.writable_len();
        self.pieces -= pieces;
        Some(chain)
    }

    fn chains(&self) -> impl Iterator<Item = &Chain> {
        self.buffers.iter().map(|buffer| &buffer.chain)
    }

    /// Copies bytes of the frame in the pool, from `offset` on; says how many there were.
    fn copy_out(&self, mut offset: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        for chain in self.chains() {
            let mut cursor = chain.writer();
            offset -= cursor.skip(offset);
            done += cursor.read(&mut to[done..]);
            if done == to.len() {
                break;
            }
        }
        done
    }

    /// Copies a frame into the pool.
    fn copy_in(&self, from: &[u8]) {
        let mut done = 0;
        for chain in self.chains() {
            done += chain.writer().write(&from[done..]);
        }
    }
}

impl RxQueue {
    /// The handler of the receive queue of `pair`.
    #[must_use]
    pub fn new(state: Arc<DeviceState>, pair: u16, start: &QueueStart) -> Self {
        Self {
            filter: FilterView::new(&state),
            state,
            pair,
            counters: Arc::clone(&start.counters),
            header_len: header_len(start.features),
            mergeable: has(start.features, VIRTIO_NET_F_MRG_RXBUF),
            pool: Pool::default(),
            list: FrameBuffer::default(),
            spill: vec![0; MAX_FRAME_WITH_HDR].into(),
            spilled: None,
            long: 0,
            running: false,
        }
    }

    /// Pops buffers until the pool has `goal` bytes, or the ring is empty, or a useless buffer was
    /// given back. False if the next one is useless, and has to wait for its turn to be given back.
    fn fill(&mut self, ring: &mut Ring, goal: usize) -> Result<bool, QueueError> {
        while self.pool.bytes < goal && (self.mergeable || self.pool.buffers.is_empty()) {
            let mut chain = self.pool.spare.pop().unwrap_or_default();
            if !ring.pop_into(&mut chain)? {
                self.pool.spare.push(chain);
                break;
            }
            let pieces = chain.writable().count();
            let useless = chain.writable_len() < self.header_len || pieces > MAX_POOL_PIECES;
            if useless && self.pool.buffers.is_empty() {
                self.counters.errors.add(1);
                ring.push_used(chain.head(), 0)?;
                self.pool.spare.push(chain);
                // One a time: a driver that adds nothing else must not keep us here.
                return Ok(true);
            } else if useless || self.pool.pieces + pieces > MAX_POOL_PIECES {
                ring.put_back(1);
                self.pool.spare.push(chain);
                return Ok(false);
            } else {
                self.pool.push(chain, pieces);
            }
        }
        Ok(true)
    }

    /// Reads one frame into the pool and, where that ends, into the spill.
    fn receive(&mut self) -> io::Result<usize> {
        let mut frame = self.list.frame();
        for chain in self.pool.chains() {
            frame.push_guest(chain.writer());
        }
        let in_pool = frame.len().min(self.spill.len());
        frame.push_own(&mut self.spill[in_pool..]);
        self.state.port().recv(self.pair, &mut frame)
    }

    /// The frame of `len` bytes that was just read: to the guest, to the spill, or nowhere.
    fn deliver(&mut self, len: usize, ring: &mut Ring) -> Result<(), QueueError> {
        if len < self.header_len || !self.is_wanted() {
            return Ok(());
        }
        if len > SHORT {
            self.long = LONG_MEMORY;
        } else {
            self.long = self.long.saturating_sub(1);
        }
        if len <= self.pool.bytes {
            return self.finish(len, ring);
        }
        if self.mergeable {
            let in_pool = self.pool.bytes;
            self.pool.copy_out(0, &mut self.spill[..in_pool]);
            self.spilled = Some(len);
        } else {
            self.counters.dropped.add(1);
        }
        Ok(())
    }

    /// Whether the frame just read passes the filter.
    fn is_wanted(&self) -> bool {
        let filter = self.filter.filter();
        if filter.passes_all() {
            return true;
        }
        let mut start = [0; PEEK_LEN];
        let in_pool = self.pool.copy_out(self.header_len, &mut start);
        let from = self.header_len + in_pool;
        start[in_pool..].copy_from_slice(&self.spill[from..self.header_len + PEEK_LEN]);
        filter.accepts(&start)
    }

    /// Delivers the frame in the spill; false if the driver has yet to give buffers.
    fn deliver_spilled(&mut self, len: usize, ring: &mut Ring) -> Result<bool, QueueError> {
        let may_grow = self.fill(ring, len)?;
        if len <= self.pool.bytes {
            self.pool.copy_in(&self.spill[..len]);
            self.spilled = None;
            self.finish(len, ring)?;
        } else if !may_grow || self.pool.pieces >= usize::from(ring.size()) {
            // The driver has no buffer left to give: waiting would be for ever.
            self.counters.dropped.add(1);
            self.spilled = None;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// The frame lies in the first buffers of the pool: completes its header and uses them.
    fn finish(&mut self, len: usize, ring: &mut Ring) -> Result<(), QueueError> {
        let mut count = 0_u16;
        let mut covered = 0;
        for chain in self.pool.chains() {
            count += 1;
            covered += chain.writable_len();
            if covered >= len {
                break;
            }
        }
        self.complete_header(count);
        let mut left = len;
        for _ in 0..count {
            let Some(chain) = self.pool.pop() else { break };
            let written = left.min(chain.writable_len());
            left -= written;
            // At most MAX_FRAME_WITH_HDR.
            ring.push_used(chain.head(), written as u32)?;
            self.pool.spare.push(chain);
        }
        self.counters.requests.add(1);
        self.counters
            .bytes_to_guest
            .add((len - self.header_len) as u64);
        Ok(())
    }

    /// Writes what the port does not: the number of buffers; and no flags for a driver that does
    /// not know any (5.1.6.4.1).
    fn complete_header(&self, num_buffers: u16) {
        let Some(chain) = self.pool.chains().next() else {
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

    /// One step; what to wait for if nothing more can be done now.
    fn step(&mut self, ring: &mut Ring) -> Result<Option<Interest>, QueueError> {
        if let Some(len) = self.spilled {
            let done = self.deliver_spilled(len, ring)?;
            return Ok((!done).then_some(Interest::KICK));
        }
        let goal = if self.long > 0 {
            MAX_FRAME_WITH_HDR
        } else {
            SHORT
        };
        self.fill(ring, goal)?;
        if self.pool.buffers.is_empty() {
            return Ok(Some(Interest::KICK));
        }
        match self.receive() {
            Ok(len) => self.deliver(len, ring)?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Some(Interest::sources(TAP)));
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_removed(&e) => {
                tracing::warn!(pair = self.pair, "tap has been removed");
                return Ok(Some(Interest::sources(0)));
            }
            Err(source) => {
                return Err(QueueError::Device {
                    what: "reading from the tap",
                    source,
                });
            }
        }
        Ok(None)
    }
}

impl QueueWorker for RxQueue {
    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(self.state.port().fd(self.pair))]
    }

    fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
        if !self.running {
            self.running = true;
            self.state.start_pair(self.pair, ring.next_avail() != 0);
        }
        self.filter.refresh(&self.state);
        for _ in 0..BATCH {
            if let Some(interest) = self.step(ring)? {
                return Ok(interest);
            }
        }
        Ok(Interest::sources(TAP))
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        // A frame in the spill is ours and waits, unless this is a stop.
        ring.put_back(self.pool.buffers.len() as u16);
        self.pool = Pool::default();
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
