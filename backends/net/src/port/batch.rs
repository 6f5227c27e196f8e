//! Many frames with one system call: reads, or writes, of one queue through an io_uring.
//!
//! ```text
//!   batch.add() × n ─▶ run: n requests in one io_uring_enter ─▶ n results, in the same order
//! ```
//!
//! A tap moves one frame a call, and the call costs as much as a short frame. Through a ring, n
//! frames share one. Every request says RWF_NOWAIT, so it is carried out, or answered EAGAIN,
//! inside that call, one after the other: nothing is in flight when [`Batch::run`] returns, and
//! memory that a frame points to need not outlive it. A frame of one piece goes as a plain read or
//! write, which spares the kernel the list.
//!
//! Frames of an ordinary MTU are cheaper by another way ([`Batcher::read_slots`]): into slots of our
//! own, which are registered with the ring. The kernel then reaches them without user access, once
//! for the header and twice for the frame, and they are in this core's caches, where the guest's
//! buffers are in another's; copies to those overlap, which the kernel's do not.
//!
//! Threads: made and used on the queue's own. Kernel: io_uring, restricted to five opcodes on the
//! port's descriptor; RWF_NOWAIT on taps (6.4). What is missing shows in [`Batcher::new`].

#![expect(unsafe_code, reason = "io_uring takes raw pointers")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::RawFd;

use berth_queue_worker::IoRing;
use berth_queue_worker::uring::Setup;
use io_uring::{Submitter, opcode, squeue, types};

use super::frame::Frame;

/// Most frames of one batch.
pub const MAX_BATCH: usize = 64;

/// Frames that one call of [`Batcher::read_slots`] takes at most.
pub const MAX_SLOTS: usize = 32;
/// Room in a slot, header included. No power of two, so that slots do not share cache sets.
pub const SLOT_LEN: usize = 2304;

const PORT: types::Fixed = types::Fixed(0);
/// Taps and sockets have no position.
const NO_OFFSET: u64 = u64::MAX;
const NOWAIT: i32 = libc::RWF_NOWAIT;

/// The ring of one queue, and room for the lists of its frames.
pub struct Batcher {
    /// None after it failed.
    ring: Option<IoRing>,
    /// Registered with the ring, which is dropped before it; empty where that could not be.
    slots: Box<[u8]>,
    pieces: Vec<libc::iovec>,
    /// Where each frame's pieces begin.
    starts: Vec<usize>,
    results: Vec<i32>,
}

/// Which way the frames of a batch go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

impl Batcher {
    /// A ring for reads and writes of `fd`, which must not block, on the thread that will use it.
    ///
    /// # Errors
    /// No io_uring here, or it cannot do without waiting on this kind of descriptor.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        Self::prepared(fd, Box::default(), |_| Ok(()))
    }

    /// The same, with slots for [`read_slots`](Self::read_slots) where there may be some: they are
    /// pinned, which RLIMIT_MEMLOCK may forbid.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn with_slots(fd: RawFd) -> io::Result<Self> {
        let mut slots: Box<[u8]> = vec![0; MAX_SLOTS * SLOT_LEN].into();
        let all = libc::iovec {
            iov_base: slots.as_mut_ptr().cast(),
            iov_len: slots.len(),
        };
        let register = |submitter: &Submitter| {
            // SAFETY: the slots stay where they are until the ring has been dropped: fields of a
            // `Batcher` are dropped in order.
            unsafe { submitter.register_buffers(&[all]) }
        };
        Self::prepared(fd, slots, register).or_else(|_| Self::new(fd))
    }

    fn prepared(
        fd: RawFd,
        slots: Box<[u8]>,
        prepare: impl FnOnce(&Submitter) -> io::Result<()>,
    ) -> io::Result<Self> {
        let setup = Setup {
            entries: MAX_BATCH as u32,
            files: &[fd],
            opcodes: &[
                opcode::Read::CODE,
                opcode::Readv::CODE,
                opcode::ReadFixed::CODE,
                opcode::Write::CODE,
                opcode::Writev::CODE,
            ],
            ..Setup::default()
        };
        let mut batcher = Self {
            ring: Some(IoRing::prepared(&setup, prepare)?),
            slots,
            pieces: Vec::new(),
            starts: Vec::new(),
            results: Vec::new(),
        };
        // No bytes are asked for, so no frame is taken; but the flag is looked at.
        let mut batch = batcher.reads();
        batch.add();
        match batch.run()? {
            [error @ ..0] => Err(io::Error::from_raw_os_error(-*error)),
            _ => Ok(batcher),
        }
    }

    /// Whether there are slots.
    #[must_use]
    pub fn has_slots(&self) -> bool {
        !self.slots.is_empty()
    }

    /// Reads up to `count` frames, at most [`MAX_SLOTS`], each into the slot of its number; results
    /// as of [`Batch::run`].
    ///
    /// # Errors
    /// As of [`Batch::run`]; there are no slots.
    pub fn read_slots(&mut self, count: usize) -> io::Result<&[i32]> {
        if !self.has_slots() || count > MAX_SLOTS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let slots = self.slots.as_mut_ptr();
        self.carry_out(count, |_, index| {
            // Below MAX_SLOTS slots, so within the memory.
            let slot = slots.wrapping_add(index * SLOT_LEN);
            opcode::ReadFixed::new(PORT, slot, SLOT_LEN as u32, 0)
                .offset(NO_OFFSET)
                .rw_flags(NOWAIT)
                .build()
        })?;
        Ok(&self.results)
    }

    /// What lies in slot `index` after a read of `len` bytes.
    #[must_use]
    pub fn slot(&mut self, index: usize, len: usize) -> &mut [u8] {
        let slot = self.slots.chunks_exact_mut(SLOT_LEN).nth(index);
        slot.and_then(|slot| slot.get_mut(..len))
            .unwrap_or_default()
    }

    /// Begins a batch of reads; each takes one frame, as long as there are any.
    pub fn reads<'m>(&mut self) -> Batch<'_, 'm> {
        self.begin(Way::Read)
    }

    /// Begins a batch of writes; each sends one frame.
    pub fn writes<'m>(&mut self) -> Batch<'_, 'm> {
        self.begin(Way::Write)
    }

    fn begin<'m>(&mut self, way: Way) -> Batch<'_, 'm> {
        self.pieces.clear();
        self.starts.clear();
        Batch {
            batcher: self,
            way,
            _memory: PhantomData,
        }
    }

    /// The request for the frame whose pieces are these.
    fn entry(way: Way, pieces: &[libc::iovec]) -> squeue::Entry {
        let (list, count) = (pieces.as_ptr(), pieces.len() as u32);
        // One piece that is longer than a request can say goes as a list.
        let one = match pieces {
            [] => Some((std::ptr::null_mut(), 0)),
            [one] => u32::try_from(one.iov_len)
                .ok()
                .map(|len| (one.iov_base.cast::<u8>(), len)),
            _ => None,
        };
        match (way, one) {
            (Way::Read, Some((at, len))) => opcode::Read::new(PORT, at, len)
                .offset(NO_OFFSET)
                .rw_flags(NOWAIT)
                .build(),
            (Way::Read, None) => opcode::Readv::new(PORT, list, count)
                .offset(NO_OFFSET)
                .rw_flags(NOWAIT)
                .build(),
            (Way::Write, Some((at, len))) => opcode::Write::new(PORT, at, len)
                .offset(NO_OFFSET)
                .rw_flags(NOWAIT)
                .build(),
            (Way::Write, None) => opcode::Writev::new(PORT, list, count)
                .offset(NO_OFFSET)
                .rw_flags(NOWAIT)
                .build(),
        }
    }

    /// Carries out all frames of the list; returns when the kernel is done with every one.
    fn run(&mut self, way: Way) -> io::Result<()> {
        self.carry_out(self.starts.len(), |batcher, index| {
            let start = batcher.starts[index];
            let end = batcher.starts.get(index + 1).copied();
            let pieces = &batcher.pieces[start..end.unwrap_or(batcher.pieces.len())];
            Self::entry(way, pieces)
        })
    }

    /// Carries out `count` requests; returns when the kernel is done with every one. They point to
    /// memory that the caller's `Batch` borrows, or to slots, and to lists that are not changed.
    fn carry_out(
        &mut self,
        count: usize,
        entry: impl Fn(&Self, usize) -> squeue::Entry,
    ) -> io::Result<()> {
        let mut ring = self.ring.take().ok_or(io::ErrorKind::NotConnected)?;
        self.results.clear();
        self.results.resize(count, -libc::EAGAIN);
        for index in 0..count {
            let entry = entry(self, index).user_data(index as u64);
            // SAFETY: memory and list are the caller's and ours; both last until this function
            // returns, and it returns only when nothing is in flight, or after the ring was
            // dropped.
            if !unsafe { ring.push(&entry) } {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        let results = &mut self.results;
        ring.submit()?;
        loop {
            ring.take_completions(|done| {
                let slot = usize::try_from(done.user_data)
                    .ok()
                    .and_then(|index| results.get_mut(index));
                if let Some(slot) = slot {
                    *slot = done.result;
                }
            })?;
            if ring.in_flight() == 0 {
                self.ring = Some(ring);
                return Ok(());
            }
            ring.wait()?;
        }
    }
}

/// Frames under construction; `'m` is the memory that they point into.
pub struct Batch<'b, 'm> {
    batcher: &'b mut Batcher,
    way: Way,
    _memory: PhantomData<&'m mut [u8]>,
}

impl<'b, 'm> Batch<'b, 'm> {
    /// Adds an empty frame. More than [`MAX_BATCH`] make `run` fail.
    pub fn add(&mut self) -> Frame<'_, 'm> {
        self.batcher.starts.push(self.batcher.pieces.len());
        Frame::at_end_of(&mut self.batcher.pieces)
    }

    /// How many frames there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.batcher.starts.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batcher.starts.is_empty()
    }

    /// Carries them out in order; per frame its length, or -errno: EAGAIN where there was no frame,
    /// or no room for it.
    ///
    /// # Errors
    /// The ring failed, and will not work again. Any of the frames may have been carried out.
    pub fn run(self) -> io::Result<&'b [i32]> {
        let Self { batcher, way, .. } = self;
        batcher.run(way)?;
        Ok(&batcher.results)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::NetPort;
    use crate::port::testing::SocketPort;

    #[test]
    fn a_batch_goes_out_in_order_and_comes_in_as_far_as_there_is() {
        // Arrange
        let port = SocketPort::new(1).unwrap();
        let mut batcher = Batcher::new(port.fd(0)).expect("io_uring");
        let mut head = *b"head";
        let mut bodies: Vec<[u8; 3]> = (0..MAX_BATCH as u8).map(|n| [n; 3]).collect();
        // Act: every other frame in two pieces
        let mut batch = batcher.writes();
        let mut head = Some(&mut head[..]);
        for body in &mut bodies {
            let mut frame = batch.add();
            if let Some(head) = head.take() {
                frame.push_own(head);
            }
            frame.push_own(body);
        }
        let results = batch.run().unwrap();
        // Assert
        assert_eq!(results[..2], [7, 3]);
        assert_eq!(port.take(0).unwrap(), b"head\0\0\0");
        for n in 1..MAX_BATCH as u8 {
            assert_eq!(port.take(0).unwrap(), [n; 3]);
        }
        // Act: three frames come, five are asked for
        for n in 0..3 {
            port.inject(0, &[n; 5]).unwrap();
        }
        let mut room = [[0xee; 8]; 5];
        let mut batch = batcher.reads();
        for room in &mut room {
            batch.add().push_own(room);
        }
        // Assert
        let again = -libc::EAGAIN;
        assert_eq!(batch.run().unwrap(), [5, 5, 5, again, again]);
        assert_eq!(room[2][..6], [2, 2, 2, 2, 2, 0xee]);
    }

    #[test]
    fn frames_come_into_slots_as_far_as_there_are_any() {
        // Arrange
        let port = SocketPort::new(1).unwrap();
        let mut batcher = Batcher::with_slots(port.fd(0)).expect("io_uring");
        assert!(batcher.has_slots(), "72 KiB may be pinned");
        port.inject(0, &[1; 5]).unwrap();
        port.inject(0, &[2; SLOT_LEN + 1]).unwrap();
        // Act, assert: one of them is cut
        let again = -libc::EAGAIN;
        assert_eq!(batcher.read_slots(3).unwrap(), [5, SLOT_LEN as i32, again]);
        assert_eq!(batcher.slot(0, 5), [1; 5]);
        assert!(batcher.slot(1, SLOT_LEN).iter().all(|byte| *byte == 2));
        // Act, assert: no more than there is room for, and batches of other kinds as before
        assert!(batcher.read_slots(MAX_SLOTS + 1).is_err());
        port.inject(0, &[3; 4]).unwrap();
        let mut room = [0; 4];
        let mut batch = batcher.reads();
        batch.add().push_own(&mut room);
        assert_eq!(batch.run().unwrap(), [4]);
        assert_eq!(room, [3; 4]);
    }

    #[test]
    fn a_batcher_without_slots_reads_into_none() {
        let port = SocketPort::new(1).unwrap();
        let mut batcher = Batcher::new(port.fd(0)).expect("io_uring");
        assert!(!batcher.has_slots());
        assert!(batcher.read_slots(1).is_err());
    }

    #[test]
    fn a_full_port_refuses_without_waiting() {
        let port = SocketPort::new(1).unwrap();
        let mut batcher = Batcher::new(port.fd(0)).expect("io_uring");
        let mut frame = vec![0; 32 << 10];
        for _ in 0..1000 {
            let mut batch = batcher.writes();
            batch.add().push_own(&mut frame);
            if batch.run().unwrap() == [-libc::EAGAIN] {
                return;
            }
        }
        panic!("never full");
    }

    #[test]
    fn what_cannot_go_without_waiting_is_said_at_once() {
        assert!(Batcher::new(-1).is_err());
    }
}
