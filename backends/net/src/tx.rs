//! Frames from the guest: one transmit queue.
//!
//! ```text
//!   ring ─pop × n─▶ header judged ─▶ rate limit ─▶ one batch of writes ─▶ used entries, in order
//!            ▲                          │ over it: held until paid for        │
//!            └── put back ◀─────────────┴─────────── no room ◀────────────────┘
//! ```
//!
//! Each chain is one frame behind its header. The header is copied and judged ([`TxPolicy`]); a
//! frame in one piece whose header is as it should be then goes out of guest memory as it is,
//! another one behind our copy of its header. (A guest that changes the header in between gets
//! what it could have had by negotiating more: the kernel trusts no header.) A frame that the tap
//! has no room for stays in the ring until there is some; one that is refused is dropped and
//! counted, as on a cable.
//!
//! Threads: the queue's own. Between two calls of `process` nothing is in flight; one chain may be
//! held by the rate limit.
//!
//! Spec: virtio 1.3, 5.1.6.2.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use berth_queue_worker::{
    Chain, Interest, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring, Source,
    Throttle,
};

use crate::header::{HDR_LEN, MEANT_ON_TRANSMIT, TxPolicy, header_len};
use crate::port::batch::{Batcher, MAX_BATCH};
use crate::port::frame::{Frame, FrameBuffer, MAX_PIECES};
use crate::state::DeviceState;

/// Sources: room in the port, and the rate limit's timer.
const ROOM: u32 = 1 << 0;
const PAID: u32 = 1 << 1;

/// One transmit queue between start and stop.
pub struct TxQueue {
    state: Arc<DeviceState>,
    pair: u16,
    counters: Arc<QueueCounters>,
    header_len: usize,
    policy: TxPolicy,
    /// None: frame by frame.
    batcher: Option<Batcher>,
    list: FrameBuffer,
    slots: Vec<Slot>,
    throttle: Option<Throttle>,
    /// The first slot has a frame that waits until the rate limit lets it go.
    held: bool,
}

/// One frame.
#[derive(Default)]
struct Slot {
    chain: Chain,
    header: [u8; HDR_LEN],
    fate: Fate,
}

/// What became of a frame, or is to become of it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Fate {
    /// To be sent as it lies in the guest's memory.
    AsItIs,
    /// To be sent behind our copy of the header.
    Copied,
    /// Gone.
    Sent,
    /// No room.
    Full,
    /// Refused, by us or by the port.
    #[default]
    Dropped,
}

/// What came of taking a frame from the ring.
enum Taken {
    /// There is none.
    No,
    /// It may be sent.
    MayGo,
    /// It is to be held.
    MustWait,
}

impl Slot {
    /// Looks at the frame's header: how is it to be sent?
    fn judge(&mut self, header_len: usize, policy: TxPolicy) {
        self.fate = Fate::Dropped;
        self.header = [0; HDR_LEN];
        let mut cursor = self.chain.reader();
        if cursor.read(&mut self.header[..header_len]) < header_len {
            return;
        }
        let given = self.header;
        if policy.admit(&mut self.header).is_err() {
            return;
        }
        let mut pieces = self.chain.readable();
        let in_one = pieces.next().is_some() && pieces.next().is_none();
        let pieces = 3 + pieces.count();
        if in_one && given[..MEANT_ON_TRANSMIT] == self.header[..MEANT_ON_TRANSMIT] {
            self.fate = Fate::AsItIs;
        } else if pieces <= MAX_PIECES {
            self.fate = Fate::Copied;
        }
    }

    /// Bytes behind the header.
    fn payload(&self, header_len: usize) -> u64 {
        self.chain.readable_len().saturating_sub(header_len) as u64
    }

    /// Lists the pieces.
    fn lay_out<'m>(&'m mut self, header_len: usize, frame: &mut Frame<'_, 'm>) {
        let mut cursor = self.chain.reader();
        if self.fate == Fate::Copied {
            cursor.skip(header_len);
            frame.push_own(&mut self.header[..header_len]);
        }
        frame.push_guest(cursor);
    }

    fn is_to_be_sent(&self) -> bool {
        matches!(self.fate, Fate::AsItIs | Fate::Copied)
    }
}

impl TxQueue {
    /// The handler of the transmit queue of `pair`. On the queue's thread.
    ///
    /// # Errors
    /// No timer for the rate limit.
    pub fn new(state: Arc<DeviceState>, pair: u16, start: &QueueStart) -> io::Result<Self> {
        let limiter = state.limits().transmit.clone();
        let batcher = state
            .port()
            .is_roomy()
            .then(|| state.batcher(pair, Batcher::new));
        Ok(Self {
            batcher: batcher.flatten(),
            throttle: limiter.map(Throttle::new).transpose()?,
            state,
            pair,
            counters: Arc::clone(&start.counters),
            header_len: header_len(start.features),
            policy: TxPolicy::new(start.features),
            list: FrameBuffer::default(),
            slots: (0..MAX_BATCH).map(|_| Slot::default()).collect(),
            held: false,
        })
    }

    /// Takes frames into the first slots; how many may go now. Stops at one that has to wait for
    /// the rate limit, which is then in the slot behind them, `held`.
    fn collect(&mut self, ring: &mut Ring) -> Result<usize, QueueError> {
        let mut count = usize::from(std::mem::take(&mut self.held));
        while count < self.slots.len() {
            match self.collect_one(count, ring) {
                Ok(Taken::No) => break,
                Ok(Taken::MayGo) => count += 1,
                Ok(Taken::MustWait) => {
                    self.counters.throttled.add(1);
                    self.held = true;
                    break;
                }
                Err(error) => {
                    // At most MAX_BATCH.
                    ring.put_back(count as u16);
                    return Err(error);
                }
            }
        }
        Ok(count)
    }

    fn collect_one(&mut self, index: usize, ring: &mut Ring) -> Result<Taken, QueueError> {
        let slot = &mut self.slots[index];
        if !ring.pop_into(&mut slot.chain)? {
            return Ok(Taken::No);
        }
        slot.judge(self.header_len, self.policy);
        let Some(throttle) = self.throttle.as_mut().filter(|_| slot.is_to_be_sent()) else {
            return Ok(Taken::MayGo);
        };
        match throttle.charge(slot.payload(self.header_len)) {
            Ok(true) => Ok(Taken::MayGo),
            Ok(false) => Ok(Taken::MustWait),
            Err(error) => {
                ring.put_back(1);
                Err(error)
            }
        }
    }

    /// Sends the frame of one slot by itself.
    fn send_one(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let mut frame = self.list.frame();
        slot.lay_out(self.header_len, &mut frame);
        let port = self.state.port();
        let result = loop {
            match port.send(self.pair, &frame) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        slot.fate = match result {
            Ok(_) => Fate::Sent,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Fate::Full,
            Err(_) => Fate::Dropped,
        };
    }

    /// Sends the frames of the first slots one by one, up to the first that finds no room.
    fn send_each(&mut self, count: usize) {
        for index in 0..count {
            if self.slots[index].is_to_be_sent() {
                self.send_one(index);
            }
            if self.slots[index].fate == Fate::Full {
                for slot in &mut self.slots[index..count] {
                    slot.fate = Fate::Full;
                }
                return;
            }
        }
    }

    /// Sends the frames of the first slots with one system call.
    fn send_batch(batcher: &mut Batcher, slots: &mut [Slot], header_len: usize) -> io::Result<()> {
        let mut batch = batcher.writes();
        for slot in &mut *slots {
            if slot.is_to_be_sent() {
                slot.lay_out(header_len, &mut batch.add());
            }
        }
        if batch.is_empty() {
            return Ok(());
        }
        let mut results = batch.run()?.iter();
        for slot in slots.iter_mut().filter(|slot| slot.is_to_be_sent()) {
            slot.fate = match results.next() {
                Some(0..) => Fate::Sent,
                Some(&error) if error == -libc::EAGAIN => Fate::Full,
                _ => Fate::Dropped,
            };
        }
        Ok(())
    }

    fn send(&mut self, count: usize) {
        let Some(batcher) = self.batcher.as_mut().filter(|_| count > 1) else {
            return self.send_each(count);
        };
        let slots = &mut self.slots[..count];
        match Self::send_batch(batcher, slots, self.header_len) {
            Ok(()) => self.send_overtaken(count),
            Err(error) => {
                tracing::warn!(pair = self.pair, %error, "io_uring failed; going on without");
                self.batcher = None;
                // Some may have gone; none is sent twice.
                for slot in &mut self.slots[..count] {
                    slot.fate = Fate::Dropped;
                }
            }
        }
    }

    /// A port that always has room had none, and has some again: frames that others have overtaken
    /// go behind them; there is no way back into the ring for them.
    fn send_overtaken(&mut self, count: usize) {
        let last_gone = self.slots[..count]
            .iter()
            .rposition(|slot| slot.fate != Fate::Full);
        for index in 0..last_gone.unwrap_or(0) {
            if self.slots[index].fate == Fate::Full {
                self.send_one(index);
                if self.slots[index].fate == Fate::Full {
                    self.slots[index].fate = Fate::Dropped;
                }
            }
        }
    }

    /// Answers the first slots; false where some found no room and have been put back.
    fn settle(&mut self, count: usize, ring: &mut Ring) -> Result<bool, QueueError> {
        for (index, slot) in self.slots[..count].iter().enumerate() {
            match slot.fate {
                Fate::Full => {
                    let held = usize::from(std::mem::take(&mut self.held));
                    // At most MAX_BATCH.
                    ring.put_back((count - index + held) as u16);
                    return Ok(false);
                }
                Fate::Sent => {
                    self.counters.requests.add(1);
                    let bytes = slot.payload(self.header_len);
                    self.counters.bytes_from_guest.add(bytes);
                }
                _ => self.counters.dropped.add(1),
            }
            ring.push_used(slot.chain.head(), 0)?;
        }
        Ok(true)
    }
}

impl QueueWorker for TxQueue {
    fn sources(&self) -> Vec<Source> {
        let room = Source::writable(self.state.port().fd(self.pair));
        let paid = self.throttle.as_ref().map(Throttle::source);
        [Some(room), paid].into_iter().flatten().collect()
    }

    fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
        if let Some(throttle) = &mut self.throttle
            && !throttle.release()?
        {
            return Ok(Interest::sources(PAID));
        }
        let count = self.collect(ring)?;
        self.send(count);
        if !self.settle(count, ring)? {
            return Ok(Interest::sources(ROOM));
        }
        if self.held {
            self.slots.swap(0, count);
            return Ok(Interest::sources(PAID));
        }
        Ok(Interest::KICK)
    }

    fn discards(&self) -> bool {
        true
    }

    fn discard(&mut self, ring: &mut Ring) -> Result<Interest, QueueError> {
        let chain = &mut self.slots[0].chain;
        for _ in 0..MAX_BATCH {
            if !ring.pop_into(chain)? {
                break;
            }
            ring.push_used(chain.head(), 0)?;
            self.counters.dropped.add(1);
        }
        chain.release();
        Ok(Interest::KICK)
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        if std::mem::take(&mut self.held) {
            ring.put_back(1);
        }
        if let Some(throttle) = &mut self.throttle {
            throttle.give_up();
        }
        // A chain keeps its memory mapped.
        for slot in &mut self.slots {
            slot.chain.release();
        }
        Ok(())
    }
}
