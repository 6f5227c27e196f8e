//! A descriptor chain taken from a ring: the buffers of one request, already checked and translated.
//!
//! ```text
//!   Ring::pop ──▶ Chain { head, [readable buffers …][writable buffers …] }
//!                          driver → device          device → driver
//! ```
//!
//! Reading order is the driver's: first every device-readable byte, then every device-writable
//! one (virtio 1.3, 2.7.4.2). Framing is the driver's choice (2.7.4), so a device must not care
//! how a header is cut into buffers: use [`Chain::reader`] and [`Chain::writer`].
//!
//! A chain keeps the memory it points into mapped, so it may be held while I/O is in flight. It
//! belongs to the worker thread of its queue (it is not `Send`).

use std::rc::Rc;

use vm_memory::ByteValued;

use crate::guest_memory::{GuestMemory, GuestSlice, MemoryError, RawSlice};

/// The buffers of one request. Reuse one value for many requests: its capacity is kept.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    /// Readable ones first.
    pieces: Vec<RawSlice>,
    num_readable: usize,
    readable_len: usize,
    writable_len: usize,
    /// Keeps what `pieces` point into.
    memory: Rc<GuestMemory>,
}

impl Chain {
    /// An empty chain to pass to [`Ring::pop_into`](crate::Ring::pop_into).
    pub fn new() -> Chain {
        Chain::default()
    }

    /// Empties the chain and lets go of the memory it pointed into. For chains that are kept for
    /// reuse while no request is in flight, so that removed memory is really unmapped.
    pub fn release(&mut self) {
        self.begin(0, &Rc::default());
    }

    /// The index of the first descriptor: what the used ring must name.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// The device-readable buffers in order.
    pub fn readable(&self) -> impl Iterator<Item = GuestSlice<'_>> {
        self.pieces[..self.num_readable]
            .iter()
            .map(|p| p.bind(&*self.memory))
    }

    /// The device-writable buffers in order.
    pub fn writable(&self) -> impl Iterator<Item = GuestSlice<'_>> {
        self.pieces[self.num_readable..]
            .iter()
            .map(|p| p.bind(&*self.memory))
    }

    /// A cursor over the device-readable bytes.
    pub fn reader(&self) -> Cursor<'_> {
        Cursor::new(self, &self.pieces[..self.num_readable], self.readable_len)
    }

    /// A cursor over the device-writable bytes.
    pub fn writer(&self) -> Cursor<'_> {
        Cursor::new(self, &self.pieces[self.num_readable..], self.writable_len)
    }

    pub(crate) fn begin(&mut self, head: u16, memory: &Rc<GuestMemory>) {
        self.head = head;
        self.pieces.clear();
        self.num_readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        if !Rc::ptr_eq(&self.memory, memory) {
            self.memory = Rc::clone(memory);
        }
    }

    /// Adds one descriptor's buffer.
    pub(crate) fn add(&mut self, gpa: u64, len: u32, writable: bool) -> Result<(), MemoryError> {
        let before = self.pieces.len();
        let pieces = &mut self.pieces;
        self.memory
            .pieces(gpa, len as usize, |piece| pieces.push(piece))?;
        if writable {
            self.writable_len += len as usize;
        } else {
            self.num_readable += self.pieces.len() - before;
            self.readable_len += len as usize;
        }
        Ok(())
    }

    pub(crate) fn has_writable(&self) -> bool {
        self.pieces.len() > self.num_readable
    }
}

/// A position in a run of buffers. Reads and writes advance it and cross buffer boundaries.
#[derive(Clone, Debug)]
pub struct Cursor<'c> {
    memory: &'c GuestMemory,
    pieces: &'c [RawSlice],
    /// Offset in `pieces[0]`.
    offset: usize,
    remaining: usize,
}

impl<'c> Cursor<'c> {
    fn new(chain: &'c Chain, pieces: &'c [RawSlice], remaining: usize) -> Cursor<'c> {
        Cursor {
            memory: &chain.memory,
            pieces,
            offset: 0,
            remaining,
        }
    }

    /// Bytes from here to the end.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// The next contiguous piece of at most `max` bytes; advances past it.
    pub fn next_piece(&mut self, max: usize) -> Option<GuestSlice<'c>> {
        let max = max.min(self.remaining);
        if max == 0 {
            return None;
        }
        let piece = self.pieces.first()?;
        let len = max.min(piece.len() - self.offset);
        let slice = piece.bind(self.memory).sub(self.offset, len).ok()?;
        self.offset += len;
        self.remaining -= len;
        if self.offset == piece.len() {
            self.pieces = &self.pieces[1..];
            self.offset = 0;
        }
        Some(slice)
    }

    /// Moves forward by `len` bytes, or to the end; says how far.
    pub fn skip(&mut self, len: usize) -> usize {
        let mut done = 0;
        while let Some(piece) = self.next_piece(len - done) {
            done += piece.len();
        }
        done
    }

    /// Copies out of the guest into `buf`; less than `buf.len()` only at the end.
    pub fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(piece) = self.next_piece(buf.len() - done) {
            let len = piece.len();
            if piece.read(0, &mut buf[done..done + len]).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// Fetches one object, or nothing where fewer bytes are left.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut value = T::default();
        let size = size_of::<T>();
        (self.remaining >= size && self.read(value.as_mut_slice()) == size).then_some(value)
    }

    /// Copies `buf` into the guest; less than `buf.len()` only at the end.
    pub fn write(&mut self, buf: &[u8]) -> usize {
        let mut done = 0;
        while let Some(piece) = self.next_piece(buf.len() - done) {
            let len = piece.len();
            if piece.write(0, &buf[done..done + len]).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// Writes one object; false, and nothing written, where fewer bytes are left.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> bool {
        let bytes = value.as_slice();
        self.remaining >= bytes.len() && self.write(bytes) == bytes.len()
    }

    /// Appends up to `len` bytes as iovecs; says how many bytes they cover. Whoever hands them to
    /// the kernel keeps the chain until the kernel is done.
    pub fn take_iovecs(&mut self, len: usize, iovecs: &mut Vec<libc::iovec>) -> usize {
        let mut done = 0;
        while let Some(piece) = self.next_piece(len - done) {
            iovecs.push(piece.as_iovec());
            done += piece.len();
        }
        done
    }
}
