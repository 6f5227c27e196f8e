//! One queue of the disk: requests from the ring into the engine, completions back to the ring.
//!
//! ```text
//!   ring ─pop─▶ Slot{chain} ─parse─▶ answer at once ───────────────────────────┐
//!                               └──▶ Task ─step─▶ engine … completion ─┐       ▼
//!                                     ▲──── more to do (short, ranges) ┘   status byte,
//!                                                          done ─────────▶ push_used
//! ```
//!
//! Runs on the queue's thread and owns everything here. A batch is one pass over the ring, one
//! submission, one pass over completions. Guest buffers go straight to the kernel; only direct I/O
//! on misaligned ones takes a copy through a bounce buffer. Invariant: iovecs, chain and bounce
//! buffer of a slot are not touched while its operation is in flight. Spec: virtio 1.3, 5.2.6.2.
#![expect(unsafe_code, reason = "starts I/O on guest buffers")]

use std::io;
use std::sync::Arc;

use berth_queue_worker::{
    Chain, GuestSlice, Interest, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring,
    Source,
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::device::Shared;
use crate::engine::{self, DiskEngine, Io};
use crate::image::Direct;
use crate::request::{self, HEADER_SIZE, Limits, Range, Request, Status};

/// Most operations in flight for one queue; further requests wait in the ring.
const MAX_DEPTH: u16 = 256;
/// IOV_MAX: longer lists are continued like short transfers.
const MAX_IOVECS: usize = 1024;
/// Most bytes copied through a bounce buffer at a time.
const BOUNCE_SIZE: usize = 1 << 20;

/// A page of a bounce buffer, aligned for any direct I/O.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// What a slot is doing.
#[derive(Debug)]
enum Task {
    Idle,
    Transfer(Transfer),
    Flush,
    Ranges(Ranges),
}

/// A read or write under way.
#[derive(Debug)]
struct Transfer {
    write: bool,
    offset: u64,
    len: usize,
    done: usize,
    /// The operation in flight uses the bounce buffer, from `skip` bytes in.
    bounced: Option<usize>,
}

/// A discard or write-zeroes under way, one range after the other.
#[derive(Debug)]
struct Ranges {
    ranges: Vec<Range>,
    at: usize,
    discard: bool,
    /// Bytes of the current range written with zeros, where fallocate could not do it.
    zeroed: Option<u64>,
    /// The final fdatasync is under way.
    syncing: bool,
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
    completions: Vec<(u64, i32)>,
    counters: Arc<QueueCounters>,
    /// The driver knows FLUSH; if not, every write is durable when it completes.
    flush_negotiated: bool,
}

/// What becomes of a slot after a step.
enum Next {
    InFlight,
    Done(Status),
}

impl BlkWorker {
    /// A worker with an engine of its own. On the queue's thread.
    pub fn new(shared: Arc<Shared>, start: &QueueStart) -> BlkWorker {
        let depth = start.size.clamp(1, MAX_DEPTH);
        let engine = engine::open(shared.disk(), depth, shared.engine());
        let slot = || Slot {
            chain: Chain::new(),
            task: Task::Idle,
            iovecs: Vec::new(),
            bounce: Vec::new(),
        };
        BlkWorker {
            shared,
            engine,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            completions: Vec::new(),
            counters: Arc::clone(&start.counters),
            flush_negotiated: start.features & 1 << VIRTIO_BLK_F_FLUSH != 0,
        }
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
        while let Some(&index) = self.free.last() {
            let slot = &mut self.slots[usize::from(index)];
            if !ring.pop_into(&mut slot.chain)? {
                return Ok(true);
            }
            self.free.pop();
            match self.begin(index)? {
                Next::InFlight => {}
                Next::Done(status) => self.complete(ring, index, status)?,
            }
        }
        Ok(false)
    }

    /// Parses the request in a slot and takes its first step.
    fn begin(&mut self, index: u16) -> Result<Next, QueueError> {
        let slot = &mut self.slots[usize::from(index)];
        let disk = self.shared.disk();
        let limits = Limits {
            capacity_sectors: disk.capacity_sectors(),
            read_only: disk.read_only(),
        };
        let request = match request::parse(&slot.chain, &limits) {
            Ok(request) => request,
            Err(malformed) => {
                self.free.push(index);
                return Err(QueueError::Request(malformed.message()));
            }
        };
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
            Task::Transfer(transfer) if transfer.done == transfer.len => None,
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

    /// Takes completions; true where there were any.
    fn reap(&mut self, ring: &mut Ring) -> Result<bool, QueueError> {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine
            .take_completions(&mut |tag, result| completions.push((tag, result)));
        let any = !completions.is_empty();
        for (tag, result) in completions.drain(..) {
            // Tags are slot indices.
            let index = tag as u16;
            match self.advance(index, result)? {
                Next::InFlight => {}
                Next::Done(status) => self.complete(ring, index, status)?,
            }
        }
        self.completions = completions;
        Ok(any)
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
        self.engine
            .completion_fd()
            .map(Source::readable)
            .into_iter()
            .collect()
    }

    fn process(&mut self, ring: &mut Ring, ready: Ready) -> Result<Interest, QueueError> {
        if ready.source(0) {
            self.engine.clear_event();
        }
        self.reap(ring)?;
        let emptied = loop {
            let emptied = self.fill(ring)?;
            submit(self.engine.as_mut())?;
            // What completed at once may have more steps, and makes room for what waits.
            if !self.reap(ring)? {
                break emptied;
            }
        };
        Ok(Interest {
            kick: emptied,
            sources: u32::from(self.in_flight() > 0),
        })
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        let mut result = Ok(());
        while self.in_flight() > 0 {
            self.engine.wait().map_err(engine_error)?;
            // A ring that cannot be written any more must not keep us from waiting for the rest.
            if let Err(error) = self.reap(ring) {
                result = Err(error);
            }
        }
        for slot in &mut self.slots {
            slot.chain.release();
            slot.bounce = Vec::new();
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

fn status_of(result: i32) -> Status {
    match -result {
        libc::EOPNOTSUPP => Status::Unsupported,
        1.. => Status::IoErr,
        _ => Status::Ok,
    }
}

impl Transfer {
    fn new(write: bool, offset: u64, len: usize) -> Transfer {
        Transfer {
            write,
            offset,
            len,
            done: 0,
            bounced: None,
        }
    }

    /// Fills `iovecs` with the next part; the file offset it goes to, or none where it cannot be
    /// done (a write that is no whole number of direct I/O's blocks).
    fn prepare(
        &mut self,
        chain: &Chain,
        direct: Option<Direct>,
        iovecs: &mut Vec<libc::iovec>,
        bounce: &mut Vec<Page>,
    ) -> Option<u64> {
        let at = self.offset + self.done as u64;
        let left = self.len - self.done;
        iovecs.clear();
        self.bounced = None;
        let mut cursor = self.cursor(chain);
        let mut covered = 0;
        let mut aligned = true;
        while iovecs.len() < MAX_IOVECS
            && let Some(piece) = cursor.next_piece(left - covered)
        {
            aligned &= direct.is_none_or(|d| is_aligned(&piece, d));
            covered += piece.len();
            iovecs.push(piece.as_iovec());
        }
        let Some(direct) = direct else {
            return Some(at);
        };
        let block = direct.offset_align;
        if aligned && at.is_multiple_of(block) && (covered as u64).is_multiple_of(block) {
            return Some(at);
        }
        self.prepare_bounce(chain, block, iovecs, bounce)
    }

    /// The same through a bounce buffer that covers whole blocks around the next part.
    fn prepare_bounce(
        &mut self,
        chain: &Chain,
        block: u64,
        iovecs: &mut Vec<libc::iovec>,
        bounce: &mut Vec<Page>,
    ) -> Option<u64> {
        let at = self.offset + self.done as u64;
        let start = at - at % block;
        // Less than a block, which is at most a page or a few.
        let skip = (at - start) as usize;
        let len = (self.len - self.done).min(BOUNCE_SIZE);
        let span = (skip + len).next_multiple_of(block as usize);
        if self.write && (skip != 0 || span != len) {
            return None;
        }
        bounce.resize(span.div_ceil(size_of::<Page>()), Page([0; 4096]));
        if self.write {
            copy_pages(bounce, |bytes, at| {
                let end = len.saturating_sub(at).min(bytes.len());
                let mut cursor = self.cursor(chain);
                cursor.skip(at);
                cursor.read(&mut bytes[..end]);
            });
        }
        iovecs.clear();
        iovecs.push(libc::iovec {
            iov_base: bounce.as_mut_ptr().cast(),
            iov_len: span,
        });
        self.bounced = Some(skip);
        Some(start)
    }

    /// The guest's bytes from where this transfer stands.
    fn cursor<'c>(&self, chain: &'c Chain) -> berth_queue_worker::Cursor<'c> {
        let (mut cursor, before) = if self.write {
            (chain.reader(), HEADER_SIZE)
        } else {
            (chain.writer(), 0)
        };
        cursor.skip(before + self.done);
        cursor
    }

    fn io<'a>(&self, offset: u64, iovecs: &'a [libc::iovec], durable: bool) -> Io<'a> {
        if self.write {
            Io::Write {
                offset,
                iovecs,
                durable,
            }
        } else {
            Io::Read { offset, iovecs }
        }
    }

    /// A part has completed. `Ok` means: go on until all is done.
    fn finish_part(&mut self, result: i32, chain: &Chain, bounce: &[Page]) -> Status {
        let Ok(bytes) = usize::try_from(result) else {
            return status_of(result);
        };
        let left = self.len - self.done;
        let useful = match self.bounced.take() {
            None => bytes.min(left),
            Some(skip) => {
                let useful = bytes.saturating_sub(skip).min(left);
                if !self.write {
                    let mut cursor = self.cursor(chain);
                    for (n, page) in bounce.iter().enumerate() {
                        let first = n * size_of::<Page>();
                        let within = |at: usize| at.clamp(first, first + page.0.len()) - first;
                        cursor.write(&page.0[within(skip)..within(skip + useful)]);
                    }
                }
                useful
            }
        };
        if useful == 0 && left > 0 {
            // The end of the file, though the disk goes on: it was truncated under us.
            return Status::IoErr;
        }
        self.done += useful;
        Status::Ok
    }
}

fn is_aligned(piece: &GuestSlice, direct: Direct) -> bool {
    (piece.host_addr() as u64).is_multiple_of(direct.mem_align)
        && (piece.len() as u64).is_multiple_of(direct.offset_align)
}

/// Calls `fill` with the bytes of each page and their offset.
fn copy_pages(pages: &mut [Page], mut fill: impl FnMut(&mut [u8], usize)) {
    for (n, page) in pages.iter_mut().enumerate() {
        fill(&mut page.0, n * size_of::<Page>());
    }
}

impl Ranges {
    fn new(ranges: Vec<Range>, discard: bool) -> Ranges {
        Ranges {
            ranges,
            at: 0,
            discard,
            zeroed: None,
            syncing: false,
        }
    }

    /// The next operation, none where all is done.
    fn next_io<'a>(
        &mut self,
        durable: bool,
        iovecs: &'a mut Vec<libc::iovec>,
        zeros: &mut Vec<Page>,
    ) -> Option<Io<'a>> {
        while self.ranges.get(self.at).is_some_and(|range| range.len == 0) {
            self.at += 1;
        }
        let Some(range) = self.ranges.get(self.at) else {
            let sync = durable && !self.syncing;
            self.syncing = true;
            return sync.then_some(Io::Sync);
        };
        let Some(zeroed) = self.zeroed else {
            let hole = self.discard || range.unmap;
            let mode = if hole {
                libc::FALLOC_FL_PUNCH_HOLE
            } else {
                libc::FALLOC_FL_ZERO_RANGE
            };
            return Some(Io::Allocate {
                mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                offset: range.offset,
                len: range.len,
            });
        };
        let len = (range.len - zeroed).min(BOUNCE_SIZE as u64) as usize;
        zeros.clear();
        zeros.resize(len.div_ceil(size_of::<Page>()), Page([0; 4096]));
        iovecs.clear();
        iovecs.push(libc::iovec {
            iov_base: zeros.as_mut_ptr().cast(),
            iov_len: len,
        });
        Some(Io::Write {
            offset: range.offset + zeroed,
            iovecs,
            durable: false,
        })
    }

    /// An operation has completed. `Ok` means: go on.
    fn finish_part(&mut self, result: i32, disk: &crate::image::Disk) -> Status {
        let Some(range) = self.ranges.get(self.at) else {
            return status_of(result);
        };
        match (&mut self.zeroed, result) {
            (None, 0..) => self.at += 1,
            (None, _) if -result == libc::EOPNOTSUPP => return self.fall_back(disk),
            // The end of the file, though the disk goes on.
            (Some(_), 0) => return Status::IoErr,
            (Some(zeroed), 1..) => {
                *zeroed += u64::from(result.unsigned_abs());
                if *zeroed >= range.len {
                    self.at += 1;
                    self.zeroed = None;
                }
            }
            (_, error) => return status_of(error),
        }
        Status::Ok
    }

    /// The file system or device does not know this fallocate mode.
    fn fall_back(&mut self, disk: &crate::image::Disk) -> Status {
        let range = &self.ranges[self.at];
        if !self.discard {
            self.zeroed = Some(0);
            return Status::Ok;
        }
        if !disk.is_block_device() {
            return Status::Unsupported;
        }
        match disk.discard_blocks(range.offset, range.len) {
            Ok(()) => {
                self.at += 1;
                Status::Ok
            }
            Err(error) => status_of(-error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}
