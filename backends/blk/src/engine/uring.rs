//! The io_uring engine: every operation is one submission on a registered file.
#![expect(unsafe_code, reason = "submissions name buffers by address")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;
use std::time::Instant;

use berth_queue_worker::GuestMemory;
use berth_queue_worker::uring::{IoRing, Setup};
use io_uring::{opcode, squeue, types};
use tracing::warn;

use super::fixed::{self, FixedBuffers};
use super::inline::{Place, Policy};
use super::{DiskEngine, EngineChoice, Io, Plan, sync};
use crate::image::Disk;

/// The disk's file in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// A kernel thread that submits sleeps after so long without anything.
const SQPOLL_IDLE_MS: u32 = 10;

/// Registered buffers were refused; once for all queues.
static NOT_FIXED: Once = Once::new();

/// All that the ring may do; the last two only with registered buffers.
const OPCODES: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
];

/// How many of [`OPCODES`] there are without registered buffers.
const NOT_FIXED_OPCODES: usize = OPCODES.len() - 2;

/// I/O through one io_uring, and on the spot where [`Policy`] says so.
#[derive(Debug)]
pub struct UringEngine {
    ring: IoRing,
    /// For reads and writes, where the device is asked for completions: nothing else can be done
    /// in such a ring.
    polled: Option<IoRing>,
    /// The device has refused a polled transfer (one read at the start may have hit a hole, which
    /// never gets to the device): all goes to the other ring.
    polled_refused: bool,
    /// Guest memory registered with the ring that does reads and writes, if that was asked for.
    fixed: Option<FixedBuffers>,
    fixed_count: u64,
    fd: RawFd,
    reads: Policy,
    writes: Policy,
    /// Done on the spot, not yet taken.
    done: Vec<(u64, i32)>,
    /// Waits for `submit`: done on the spot if nothing else has come until then.
    alone: Option<Alone>,
    /// The one operation in the ring that is timed.
    timed: Option<(u64, bool, Instant)>,
}

/// A transfer that was started and is nowhere yet.
#[derive(Debug)]
struct Alone {
    tag: u64,
    write: bool,
    offset: u64,
    iovecs: *const libc::iovec,
    count: usize,
}

impl UringEngine {
    /// A ring with room for `depth` operations, on the thread that will use it.
    pub fn new(disk: &Disk, depth: u16, plan: &Plan) -> io::Result<UringEngine> {
        if !plan.fixed_buffers {
            return UringEngine::with(disk, depth, plan, false);
        }
        UringEngine::with(disk, depth, plan, true).or_else(|error| {
            // Before 5.13 there is no such operation that a ring could allow.
            let engine = UringEngine::with(disk, depth, plan, false)?;
            NOT_FIXED.call_once(|| warn!(%error, "no registered buffers here, going on without"));
            Ok(engine)
        })
    }

    fn with(disk: &Disk, depth: u16, plan: &Plan, fixed: bool) -> io::Result<UringEngine> {
        let fd = disk.file().as_raw_fd();
        let (opcodes, register_ops) = if fixed {
            (&OPCODES[..], &fixed::REGISTER_OPS[..])
        } else {
            (&OPCODES[..NOT_FIXED_OPCODES], &[][..])
        };
        let setup = Setup {
            entries: u32::from(depth),
            files: &[fd],
            opcodes,
            register_ops,
            sqpoll_idle_ms: (plan.choice == EngineChoice::SqPoll).then_some(SQPOLL_IDLE_MS),
            ..Setup::default()
        };
        let ring = IoRing::new(&setup)?;
        let polled = match plan.choice {
            EngineChoice::IoPoll => Some(IoRing::new(&Setup {
                iopoll: true,
                ..setup
            })?),
            _ => None,
        };
        let [reads, writes] = plan.on_the_spot;
        Ok(UringEngine {
            ring,
            polled,
            polled_refused: false,
            fixed: fixed.then(FixedBuffers::default),
            fixed_count: 0,
            fd,
            reads: Policy::new(reads),
            writes: Policy::new(writes),
            done: Vec::with_capacity(usize::from(depth)),
            alone: None,
            timed: None,
        })
    }

    fn policy(&mut self, write: bool) -> &mut Policy {
        if write {
            &mut self.writes
        } else {
            &mut self.reads
        }
    }

    /// Where `io` goes.
    fn place(&mut self, io: &Io) -> Place {
        let (write, iovecs) = match *io {
            Io::Read { iovecs, .. } => (false, iovecs),
            Io::Write {
                iovecs,
                durable: false,
                ..
            } => (true, iovecs),
            _ => return Place::Ring,
        };
        let len = iovecs.iter().map(|v| v.iov_len).sum();
        self.policy(write).place(len)
    }

    /// Does a transfer now.
    ///
    /// # Safety
    ///
    /// As for [`DiskEngine::start`].
    unsafe fn run_here(&mut self, tag: u64, io: &Io) {
        let begin = Instant::now();
        // SAFETY: the caller's promise.
        let result = unsafe { sync::run(self.fd, io) };
        self.policy(matches!(io, Io::Write { .. }))
            .took(begin.elapsed());
        self.done.push((tag, result));
    }

    /// The ring that does reads and writes, unless the device has refused that.
    fn transfer_ring(&self) -> &IoRing {
        self.polled.as_ref().unwrap_or(&self.ring)
    }

    /// Pushes an operation to the ring that does it; false where that is full.
    ///
    /// # Safety
    ///
    /// As for [`DiskEngine::start`].
    unsafe fn push(&mut self, tag: u64, io: &Io) -> bool {
        let ring = match (&mut self.polled, io) {
            (Some(polled), Io::Read { .. } | Io::Write { .. }) if !self.polled_refused => polled,
            _ => &mut self.ring,
        };
        let registered = !self.polled_refused;
        let fixed = self.fixed.as_ref().filter(|_| registered);
        let fixed_entry = fixed.and_then(|fixed| fixed_entry(fixed, io));
        let is_fixed = fixed_entry.is_some();
        let entry = fixed_entry.unwrap_or_else(|| entry(io));
        // SAFETY: the caller keeps iovecs and buffers until the completion is taken, or until this
        // engine, and with it the ring, is dropped.
        let pushed = unsafe { ring.push(&entry.user_data(tag)) };
        self.fixed_count += u64::from(pushed && is_fixed);
        pushed
    }

    /// Puts what waits for `submit` into the ring; false where that is full.
    fn queue_alone(&mut self) -> bool {
        let Some(alone) = self.alone.take() else {
            return true;
        };
        // SAFETY: the promise of the `start` that it came with.
        let pushed = unsafe { self.push(alone.tag, &alone.io()) };
        if !pushed {
            self.alone = Some(alone);
        }
        pushed
    }
}

impl Alone {
    /// Valid as long as the caller of `start` keeps its promise: until the completion is taken.
    fn io(&self) -> Io<'_> {
        // SAFETY: pointer and length are of a slice that the caller of `start` keeps.
        let iovecs = unsafe { std::slice::from_raw_parts(self.iovecs, self.count) };
        let offset = self.offset;
        if self.write {
            Io::Write {
                offset,
                iovecs,
                durable: false,
            }
        } else {
            Io::Read { offset, iovecs }
        }
    }

    fn new(tag: u64, io: &Io) -> Option<Alone> {
        let (write, offset, iovecs) = match *io {
            Io::Read { offset, iovecs } => (false, offset, iovecs),
            Io::Write { offset, iovecs, .. } => (true, offset, iovecs),
            _ => return None,
        };
        Some(Alone {
            tag,
            write,
            offset,
            iovecs: iovecs.as_ptr(),
            count: iovecs.len(),
        })
    }
}

fn entry(io: &Io) -> squeue::Entry {
    match *io {
        // One buffer: the plain opcodes spare the kernel the copy of an iovec array.
        Io::Read {
            offset,
            iovecs: [one],
        } => opcode::Read::new(FILE, one.iov_base.cast(), clamp(one.iov_len))
            .offset(offset)
            .build(),
        Io::Read { offset, iovecs } => {
            opcode::Readv::new(FILE, iovecs.as_ptr(), iovecs.len() as u32)
                .offset(offset)
                .build()
        }
        Io::Write {
            offset,
            iovecs: [one],
            durable,
        } => opcode::Write::new(FILE, one.iov_base.cast(), clamp(one.iov_len))
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        Io::Write {
            offset,
            iovecs,
            durable,
        } => opcode::Writev::new(FILE, iovecs.as_ptr(), iovecs.len() as u32)
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        Io::Sync => opcode::Fsync::new(FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Io::Allocate { mode, offset, len } => opcode::Fallocate::new(FILE, len)
            .offset(offset)
            .mode(mode)
            .build(),
    }
}

/// The same on a registered buffer, where one buffer holds it all.
fn fixed_entry(fixed: &FixedBuffers, io: &Io) -> Option<squeue::Entry> {
    match *io {
        Io::Read {
            offset,
            iovecs: [one],
        } => {
            let (base, len) = (one.iov_base.cast(), clamp(one.iov_len));
            let read = opcode::ReadFixed::new(FILE, base, len, fixed.slot_of(one)?);
            Some(read.offset(offset).build())
        }
        Io::Write {
            offset,
            iovecs: [one],
            durable,
        } => {
            let (base, len) = (one.iov_base.cast(), clamp(one.iov_len));
            let write = opcode::WriteFixed::new(FILE, base, len, fixed.slot_of(one)?);
            Some(write.offset(offset).rw_flags(write_flags(durable)).build())
        }
        _ => None,
    }
}

/// What is cut off here comes back as a short transfer and is continued.
fn clamp(len: usize) -> u32 {
    len.min(1 << 30) as u32
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

impl DiskEngine for UringEngine {
    unsafe fn start(&mut self, tag: u64, io: &Io) -> bool {
        if !self.queue_alone() {
            return false;
        }
        match self.place(io) {
            Place::Here => {
                // SAFETY: the caller's promise.
                unsafe { self.run_here(tag, io) };
                return true;
            }
            Place::HereIfAlone if self.ring.in_flight() == 0 => {
                self.alone = Alone::new(tag, io);
                if self.alone.is_some() {
                    return true;
                }
            }
            Place::RingTimed if self.timed.is_none() => {
                let write = matches!(io, Io::Write { .. });
                self.timed = Some((tag, write, Instant::now()));
            }
            Place::HereIfAlone | Place::Ring | Place::RingTimed => {}
        }
        // SAFETY: the caller's promise.
        unsafe { self.push(tag, io) }
    }

    fn submit(&mut self) -> io::Result<()> {
        if let Some(alone) = self.alone.take() {
            // SAFETY: the promise of the `start` that it came with.
            unsafe { self.run_here(alone.tag, &alone.io()) };
        }
        if let Some(polled) = &mut self.polled {
            polled.submit()?;
        }
        self.ring.submit()
    }

    fn is_starved(&mut self) -> bool {
        let ring = match &mut self.polled {
            Some(polled) if !self.polled_refused => polled,
            _ => &mut self.ring,
        };
        ring.queued() > ring.under_way()
    }

    fn take_completions(&mut self, limit: usize, each: &mut dyn FnMut(u64, i32)) -> io::Result<()> {
        for (tag, result) in self.done.drain(..limit.min(self.done.len())) {
            each(tag, result);
        }
        if let Some(polled) = &mut self.polled {
            let refused = &mut self.polled_refused;
            polled.take_up_to(limit, |done| {
                let unsupported = done.result == -libc::EOPNOTSUPP;
                if unsupported && !*refused {
                    *refused = true;
                    warn!("the device does not do polled I/O, going on without");
                }
                // Which makes the worker start it again.
                let result = if unsupported {
                    -libc::EAGAIN
                } else {
                    done.result
                };
                each(done.user_data, result);
            })?;
        }
        if self.ring.in_flight() == 0 {
            return Ok(());
        }
        let mut time = None;
        let timed = &self.timed;
        self.ring.take_up_to(limit, |done| {
            if let Some((tag, write, begin)) = timed
                && *tag == done.user_data
            {
                time = Some((*write, begin.elapsed()));
            }
            each(done.user_data, done.result);
        })?;
        if let Some((write, time)) = time {
            self.timed = None;
            self.policy(write).ring_took(time);
        }
        Ok(())
    }

    fn done_here(&self) -> usize {
        self.done.len()
    }

    fn is_ready(&mut self) -> bool {
        !self.done.is_empty()
            || self.ring.is_ready()
            || self.polled.as_mut().is_some_and(IoRing::is_ready)
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if !self.done.is_empty() {
            return Ok(());
        }
        match &mut self.polled {
            Some(polled) if polled.in_flight() > 0 => polled.wait(),
            _ => self.ring.wait(),
        }
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ring.completion_fd())
    }

    fn arm(&mut self) -> bool {
        self.ring.arm() || self.is_ready()
    }

    fn clear_event(&self) {
        self.ring.clear_event();
    }

    fn use_memory(&mut self, memory: &GuestMemory) {
        let Some(mut fixed) = self.fixed.take() else {
            return;
        };
        if let Err(error) = fixed.add(&self.transfer_ring().submitter(), memory) {
            NOT_FIXED.call_once(|| {
                warn!(%error, "guest memory cannot be registered (RLIMIT_MEMLOCK?), going on without");
            });
        }
        self.fixed = Some(fixed);
    }

    fn forget_memory(&mut self) {
        let Some(mut fixed) = self.fixed.take() else {
            return;
        };
        match fixed.clear(&self.transfer_ring().submitter()) {
            Ok(()) => self.fixed = Some(fixed),
            // Never registered with again.
            Err(error) => warn!(%error, "registered buffers cannot be given back"),
        }
    }

    fn take_fixed_count(&mut self) -> u64 {
        std::mem::take(&mut self.fixed_count)
    }
}
