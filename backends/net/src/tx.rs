//! Frames from the guest: one transmit queue.
//!
//! Each chain is one frame behind its header. The header is copied and judged ([`TxPolicy`]), the
//! frame goes out of guest memory with one writev. A frame that the tap has no room for stays in
//! the ring until there is some; one that is refused is dropped and counted, as on a cable.
//!
//! Threads: the queue's own. Nothing is in flight between two calls of `process`.
//!
//! Spec: virtio 1.3, 5.1.6.2.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use berth_queue_worker::{
    Chain, Interest, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring, Source,
};

use crate::header::{HDR_LEN, TxPolicy, header_len};
use crate::port::NetPort;
use crate::port::frame::{FrameBuffer, MAX_PIECES};
use crate::state::DeviceState;

const ROOM: u32 = 1;

/// Frames sent before the driver is told.
const BATCH: usize = 64;

/// One transmit queue between start and stop.
pub struct TxQueue {
    state: Arc<DeviceState>,
    pair: u16,
    counters: Arc<QueueCounters>,
    header_len: usize,
    policy: TxPolicy,
    chain: Chain,
    list: FrameBuffer,
}

/// What became of a frame.
enum Sent {
    /// It went out, so many bytes without header.
    Gone(usize),
    /// No room.
    Full,
    /// Refused, by us or by the port.
    Dropped,
}

impl TxQueue {
    /// The handler of the transmit queue of `pair`.
    #[must_use]
    pub fn new(state: Arc<DeviceState>, pair: u16, start: &QueueStart) -> Self {
        Self {
            state,
            pair,
            counters: Arc::clone(&start.counters),
            header_len: header_len(start.features),
            policy: TxPolicy::new(start.features),
            chain: Chain::new(),
            list: FrameBuffer::default(),
        }
    }

    /// Sends the frame in `self.chain`.
    fn send(&mut self) -> Sent {
        let mut header = [0; HDR_LEN];
        let mut cursor = self.chain.reader();
        let header_part = &mut header[..self.header_len];
        if cursor.read(header_part) < self.header_len || self.policy.admit(&mut header).is_err() {
            return Sent::Dropped;
        }
        let mut frame = self.list.frame();
        frame.push_own(&mut header[..self.header_len]);
        frame.push_guest(cursor);
        if frame.pieces().len() > MAX_PIECES {
            return Sent::Dropped;
        }
        let port: &dyn NetPort = &**self.state.port();
        let result = loop {
            match port.send(self.pair, &frame) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        match result {
            Ok(n) => Sent::Gone(n.saturating_sub(self.header_len)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Full,
            Err(_) => Sent::Dropped,
        }
    }
}

impl QueueWorker for TxQueue {
    fn sources(&self) -> Vec<Source> {
        vec![Source::writable(self.state.port().fd(self.pair))]
    }

    fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
        for _ in 0..BATCH {
            if !ring.pop_into(&mut self.chain)? {
                break;
            }
            match self.send() {
                Sent::Gone(bytes) => {
                    self.counters.requests.add(1);
                    self.counters.bytes_from_guest.add(bytes as u64);
                }
                Sent::Full => {
                    ring.put_back(1);
                    return Ok(Interest::sources(ROOM));
                }
                Sent::Dropped => self.counters.dropped.add(1),
            }
            ring.push_used(self.chain.head(), 0)?;
        }
        Ok(Interest::KICK)
    }

    fn drain(&mut self, _ring: &mut Ring) -> Result<(), QueueError> {
        // A chain keeps its memory mapped.
        self.chain = Chain::new();
        Ok(())
    }
}
