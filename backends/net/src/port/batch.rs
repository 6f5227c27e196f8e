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
//! Threads: made and used on the queue's own. Kernel: io_uring, restricted to four opcodes on the
//! port's descriptor; RWF_NOWAIT on taps (6.4). What is missing shows in [`Batcher::new`].

#![expect(unsafe_code, reason = "io_uring takes raw pointers")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::RawFd;

use berth_queue_worker::IoRing;
use berth_queue_worker::uring::Setup;
use io_uring::{opcode, squeue, types};

use super::frame::Frame;

/// Most frames of one batch.
pub const MAX_BATCH: usize = 64;

const PORT: types::Fixed = types::Fixed(0);
/// Taps and sockets have no position.
const NO_OFFSET: u64 = u64::MAX;
const NOWAIT: i32 = libc::RWF_NOWAIT;

/// The ring of one queue, and room for the lists of its frames.
pub struct Batcher {
    /// None after it failed.
    ring: Option<IoRing>,
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
        let ring = IoRing::new(&Setup {
            entries: MAX_BATCH as u32,
            files: &[fd],
            opcodes: &[
                opcode::Read::CODE,
                opcode::Readv::CODE,
                opcode::Write::CODE,
                opcode::Writev::CODE,
            ],
            ..Setup::default()
        })?;
        let mut batcher = Self {
            ring: Some(ring),
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
        let ring = self.ring.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        self.results.clear();
        self.results.resize(self.starts.len(), -libc::EAGAIN);
        for (index, &start) in self.starts.iter().enumerate() {
            let end = self.starts.get(index + 1).copied();
            let pieces = &self.pieces[start..end.unwrap_or(self.pieces.len())];
            let entry = Self::entry(way, pieces).user_data(index as u64);
            // SAFETY: the pieces point to memory that the caller's `Batch` borrows, and the list
            // is ours and not changed; both last until this function returns, and it returns only
            // when nothing is in flight, or after the ring was dropped.
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
        if let Err(error) = batcher.run(way) {
            // Dropping waits for what is in flight.
            batcher.ring = None;
            return Err(error);
        }
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
