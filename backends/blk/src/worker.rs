//! One queue of the disk: requests from the ring into the engine, completions back to the ring.
//!
//! ```text
//!   ring ─pop─▶ Slot{chain} ─parse─▶ answer at once ───────────────────────────┐
//!                 │ ▲           └──▶ Task ─step─▶ engine … completion ─┐       ▼
//!        over the │ │ timer           ▲──── more to do (short, ranges) ┘   status byte,
//!           limit ▼ │                                      done ─────────▶ push_used
//!                  held
//! ```
//!
//! Runs on the queue's thread and owns everything here. Guest buffers go straight to the kernel;
//! only direct I/O on misaligned ones takes a copy through a bounce buffer. Invariant: iovecs, chain
//! and bounce buffer of a slot are not touched while its operation is in flight.
//!
//! Batches save system calls and cost overlap. A medium that completes many requests at once has
//! nothing to do until the first of the next ones gets to it, and what lies between is us and the
//! driver. So both directions are cut: answers go out [`BATCH`] at a time, and the driver works on
//! them while we go on; of new requests the first goes to the medium at once, and then each time as
//! many as it has already (1, 1, 2, 4, …), so that it always has something to do.
//! Spec: virtio 1.3, 5.2.6.2.
#![expect(unsafe_code, reason = "starts I/O on guest buffers")]

use std::io;
use std::sync::Arc;

use berth_queue_worker::{
    Chain, Interest, Poll, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring, Source,
    Throttle,
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::device::Shared;
use crate::engine::{self, DiskEngine, Io};
use crate::request::{self, HEADER_SIZE, Limits, Request, Status};
use crate::task::{Page, Ranges, Transfer, status_of};

/// Most operations in flight for one queue; further requests wait in the ring.
const MAX_DEPTH: u16 = 256;

/// Requests answered before the driver is told, where there are more.
const BATCH: usize = 8;

/// What a slot is doing.
#[derive(Debug)]
enum Task {
    Idle,
    Transfer(Transfer),
    Flush,
    Ranges(Ranges),
}

/// Room for one request.
struct Slot {
    chain: Chain,
    task: Task,
    iovecs: Vec<libc::iovec>,
    bounce: Vec<Page>,
}

/// The worker of one queue.
pub struct BlkWorker {
    shared: Arc<Shared>,
    /// First of the fields that name memory: its drop waits for I/O in flight.
    engine: Box<dyn DiskEngine>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// The memory that the engine was told of.
    generation: Option<u64>,
    completions: Vec<(u64, i32)>,
    counters: Arc<QueueCounters>,
    /// The driver knows FLUSH; if not, every write is durable when it completes.
    flush_negotiated: bool,
    /// The disk's rate limit, if it has one.
    throttle: Option<Throttle>,
    /// The slot of a request that was taken and must wait for the rate limit; nothing more is
    /// taken from the ring meanwhile.
    held: Option<u16>,
    /// The last field: the image may be unlocked when nothing is in flight.
    _image: ImageUse,
}

/// A queue's claim to the image.
struct ImageUse(Arc<Shared>);

impl ImageUse {
    fn begin(shared: &Arc<Shared>) -> io::Result<ImageUse> {
        shared.disk().begin_use().map_err(io::Error::other)?;
        Ok(ImageUse(Arc::clone(shared)))
    }
}

impl Drop for ImageUse {
    fn drop(&mut self) {
        self.0.disk().end_use();
    }
}

/// What becomes of a slot after a step.
enum Next {
    InFlight,
    Done(Status),
}

impl BlkWorker {
    /// A worker with an engine of its own. On the queue's thread.
    pub fn new(shared: Arc<Shared>, start: &QueueStart) -> io::Result<BlkWorker> {
        BlkWorker::with_engine(shared, start, |shared, depth| {
            engine::open(shared.disk(), depth, shared.engine())
        })
    }

    /// The same with the engine that `open` makes for so many operations.
    pub(crate) fn with_engine(
        shared: Arc<Shared>,
        start: &QueueStart,
        open: impl FnOnce(&Shared, u16) -> Box<dyn DiskEngine>,
    ) -> io::Result<BlkWorker> {
        let image = ImageUse::begin(&shared)?;
        let depth = start.size.clamp(1, MAX_DEPTH);
        let engine = open(&shared, depth);
        let slot = || Slot {
            chain: Chain::new(),
            task: Task::Idle,
            iovecs: Vec::new(),
            bounce: Vec::new(),
        };
        let limiter = shared.limiter().cloned();
        let throttle = limiter.map(Throttle::new).transpose()?;
        Ok(BlkWorker {
            shared,
            engine,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            generation: None,
            completions: Vec::new(),
            counters: Arc::clone(&start.counters),
            flush_negotiated: start.features & 1 << VIRTIO_BLK_F_FLUSH != 0,
            throttle,
            held: None,
            _image: image,
        })
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether writes must be durable when they complete.
    fn durable(&self) -> bool {
        !self.flush_negotiated || !self.shared.write_cache_enabled()
    }

    /// Takes requests while there are slots; false where the ring still has some.
    fn fill(&mut self, ring: &mut Ring) -> Result<bool, QueueError> {
        if !self.release_held(ring)? {
            return Ok(false);
        }
        while let Some(&index) = self.free.last() {
            let slot = &mut self.slots[usize::from(index)];
            if !ring.pop_into(&mut slot.chain)? {
                return Ok(true);
            }
            self.free.pop();
            let may_go = self.may_go(index);
            if !matches!(may_go, Ok(true)) {
                self.held = Some(index);
                self.counters.throttled.add(1);
                return may_go;
            }
            self.begin_or_answer(ring, index)?;
            if self.engine.done_here() >= BATCH {
                return Ok(false);
            }
            if self.engine.is_starved() {
                submit(self.engine.as_mut())?;
            }
        }
        Ok(false)
    }

    /// Charges the request in a slot to the rate limit; false where it has to wait.
    fn may_go(&mut self, index: u16) -> Result<bool, QueueError> {
        let Some(throttle) = &mut self.throttle else {
            return Ok(true);
        };
        let chain = &self.slots[usize::from(index)].chain;
        let sent = chain.readable_len().saturating_sub(HEADER_SIZE);
        let wanted = chain.writable_len().saturating_sub(1);
        throttle.charge(sent.saturating_add(wanted) as u64)
    }

    /// Begins the request that waited for the rate limit; false where it has to wait on.
    fn release_held(&mut self, ring: &mut Ring) -> Result<bool, QueueError> {
        if let (Some(index), Some(throttle)) = (self.held, &mut self.throttle) {
            if !throttle.release()? {
                return Ok(false);
            }
            self.held = None;
            self.begin_or_answer(ring, index)?;
        }
        Ok(true)
    }

    /// Begins the request in a slot, and completes it where that is all.
    fn begin_or_answer(&mut self, ring: &mut Ring, index: u16) -> Result<(), QueueError> {
        let next = self.begin(index);
        self.go_on(ring, index, next)
    }

    /// Does what a step has led to. A slot is given back whatever happens, or a drain would wait
    /// for it for ever.
    fn go_on(
        &mut self,
        ring: &mut Ring,
        index: u16,
        next: Result<Next, QueueError>,
    ) -> Result<(), QueueError> {
        match next {
            Ok(Next::InFlight) => Ok(()),
            Ok(Next::Done(status)) => self.complete(ring, index, status),
            Err(error) => {
                self.free.push(index);
                Err(error)
            }
        }
    }

    /// Parses the request in a slot and takes its first step.
    fn begin(&mut self, index: u16) -> Result<Next, QueueError> {
        let slot = &mut self.slots[usize::from(index)];
        let disk = self.shared.disk();
        let limits = Limits {
            capacity_sectors: disk.usable_sectors(),
            read_only: disk.read_only(),
        };
        let request = request::parse(&slot.chain, &limits)
            .map_err(|malformed| QueueError::Request(malformed.message()))?;
        slot.task = match request {
            Request::Answer(status) => return Ok(Next::Done(status)),
            Request::GetId => {
                let mut id = slot.chain.writer();
                let room = id.remaining() - 1;
                let serial = self.shared.serial();
                id.write(&serial[..serial.len().min(room)]);
                return Ok(Next::Done(Status::Ok));
            }
            Request::Read { offset, len } => Task::Transfer(Transfer::new(false, offset, len)),
            Request::Write { offset, len } => Task::Transfer(Transfer::new(true, offset, len)),
            Request::Flush if disk.read_only() => return Ok(Next::Done(Status::Ok)),
            Request::Flush => Task::Flush,
            Request::Discard(ranges) => Task::Ranges(Ranges::new(ranges, true)),
            Request::WriteZeroes(ranges) => Task::Ranges(Ranges::new(ranges, false)),
        };
        self.step(index)
    }

    /// Starts the next operation of a slot's task.
    fn step(&mut self, index: u16) -> Result<Next, QueueError> {
        let durable = self.durable();
        let direct = self.shared.disk().direct();
        let slot = &mut self.slots[usize::from(index)];
        let io = match &mut slot.task {
            Task::Idle => return Ok(Next::Done(Status::Ok)),
            Task::Flush => Some(Io::Sync),
            Task::Transfer(transfer) if transfer.is_done() => None,
            Task::Transfer(transfer) => {
                let prepared =
                    transfer.prepare(&slot.chain, direct, &mut slot.iovecs, &mut slot.bounce);
                let Some(offset) = prepared else {
                    return Ok(Next::Done(Status::IoErr));
                };
                Some(transfer.io(offset, &slot.iovecs, durable))
            }
            Task::Ranges(ranges) => ranges.next_io(durable, &mut slot.iovecs, &mut slot.bounce),
        };
        let Some(io) = io else {
            return Ok(Next::Done(Status::Ok));
        };
        // SAFETY: the iovecs lie in the slot, the memory they name in its bounce buffer or in the
        // guest memory that its chain keeps mapped; none is touched, and the slot is not reused,
        // until the completion is taken. `engine` is dropped before `slots`.
        while !unsafe { self.engine.start(u64::from(index), &io) } {
            submit(self.engine.as_mut())?;
        }
        Ok(Next::InFlight)
    }

    /// Takes completions, up to a batch; how many there were.
    fn reap(&mut self, ring: &mut Ring) -> Result<usize, QueueError> {
        let mut completions = std::mem::take(&mut self.completions);
        let taken = self
            .engine
            .take_completions(BATCH, &mut |tag, result| completions.push((tag, result)));
        let count = completions.len();
        let mut outcome = taken.map(|()| count).map_err(engine_error);
        for (tag, result) in completions.drain(..) {
            // Tags are slot indices.
            let index = tag as u16;
            let next = self.advance(index, result);
            if let Err(error) = self.go_on(ring, index, next) {
                outcome = Err(error);
            }
        }
        self.completions = completions;
        outcome
    }

    /// An operation of a slot has completed with `result`.
    fn advance(&mut self, index: u16, result: i32) -> Result<Next, QueueError> {
        let slot = &mut self.slots[usize::from(index)];
        if matches!(-result, libc::EAGAIN | libc::EINTR) {
            return self.step(index);
        }
        let status = match &mut slot.task {
            Task::Idle | Task::Flush => status_of(result),
            Task::Transfer(transfer) => transfer.finish_part(result, &slot.chain, &slot.bounce),
            Task::Ranges(ranges) => ranges.finish_part(result, self.shared.disk()),
        };
        let more = !matches!(slot.task, Task::Idle | Task::Flush);
        if status == Status::Ok && more {
            return self.step(index);
        }
        Ok(Next::Done(status))
    }

    /// Answers a request and frees its slot.
    fn complete(&mut self, ring: &mut Ring, index: u16, status: Status) -> Result<(), QueueError> {
        self.free.push(index);
        let slot = &mut self.slots[usize::from(index)];
        let task = std::mem::replace(&mut slot.task, Task::Idle);
        slot.bounce = Vec::new();
        // The parser has seen that there is a status byte.
        let data_len = slot.chain.writable_len().saturating_sub(1);
        let mut status_byte = slot.chain.writer();
        status_byte.skip(data_len);
        status_byte.write(&[status.byte()]);
        self.counters.requests.add(1);
        let written = if status == Status::Ok {
            if let Task::Transfer(transfer) = task {
                let counters = &self.counters;
                let (to, from) = (&counters.bytes_to_guest, &counters.bytes_from_guest);
                let bytes = if transfer.write { from } else { to };
                bytes.add(transfer.len as u64);
            }
            data_len
        } else {
            self.counters.errors.add(1);
            0
        };
        // A chain is bounded far below 4 GiB by the disk's own size or by the guest's memory; what
        // does not fit is cut, as the driver only learns less.
        let len = u32::try_from(written + 1).unwrap_or(u32::MAX);
        Ok(ring.push_used(slot.chain.head(), len)?)
    }
}

impl QueueWorker for BlkWorker {
    fn sources(&self) -> Vec<Source> {
        let completions = self.engine.completion_fd().map(Source::readable);
        let throttle = self.throttle.as_ref().map(Throttle::source);
        completions.into_iter().chain(throttle).collect()
    }

    fn process(&mut self, ring: &mut Ring, ready: Ready) -> Result<Interest, QueueError> {
        let completions = u32::from(self.engine.completion_fd().is_some());
        if completions != 0 && ready.source(0) {
            self.engine.clear_event();
        }
        if self.generation != Some(ring.memory_generation()) {
            self.engine.use_memory(ring.memory());
            self.generation = Some(ring.memory_generation());
        }
        let mut taken = self.reap(ring)?;
        let emptied = loop {
            let emptied = self.fill(ring)?;
            submit(self.engine.as_mut())?;
            // What completed at once may have more steps, and makes room for what waits.
            if taken < BATCH || self.engine.done_here() > 0 {
                let more = self.reap(ring)?;
                if more == 0 {
                    break emptied;
                }
                taken += more;
            }
            // `poll` finds the rest.
            if taken >= BATCH && self.engine.done_here() == 0 {
                break self.held.is_none() && !self.free.is_empty();
            }
        };
        self.shared.count_fixed(self.engine.take_fixed_count());
        let in_engine = self.in_flight() - usize::from(self.held.is_some());
        let mut sources = if in_engine > 0 { completions } else { 0 };
        if self.held.is_some() {
            sources |= 1 << completions;
        }
        Ok(Interest {
            kick: emptied,
            sources,
        })
    }

    fn poll(&mut self) -> Poll {
        if self.engine.is_ready() {
            Poll::Ready
        } else {
            Poll::Nothing
        }
    }

    fn arm(&mut self) -> bool {
        self.engine.arm()
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        let mut result = Ok(());
        if let Some(index) = self.held.take() {
            if let Some(throttle) = &mut self.throttle {
                throttle.give_up();
            }
            result = self.begin_or_answer(ring, index);
        }
        while self.in_flight() > 0 {
            self.engine.wait().map_err(engine_error)?;
            // A ring that cannot be written any more must not keep us from waiting for the rest.
            if let Err(error) = self.reap(ring) {
                result = Err(error);
            }
        }
        self.engine.forget_memory();
        self.generation = None;
        for slot in &mut self.slots {
            slot.chain.release();
        }
        result
    }
}

fn submit(engine: &mut dyn DiskEngine) -> Result<(), QueueError> {
    engine.submit().map_err(engine_error)
}

fn engine_error(source: io::Error) -> QueueError {
    QueueError::Device {
        what: "disk I/O",
        source,
    }
}
