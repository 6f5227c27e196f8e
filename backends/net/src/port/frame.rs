//! The pieces of one frame, in guest memory and our own, as the kernel wants them: an iovec list.
//!
//! A [`Frame`] borrows everything that it points to, so a list that the kernel is given cannot
//! outlive its memory. That is the whole reason for the type: the system calls on it are safe
//! functions. Guest memory in it stays raw pointers; nobody but the kernel goes through them.

use std::marker::PhantomData;

use berth_queue_worker::chain::Cursor;

/// Most pieces that one system call takes (UIO_MAXIOV).
pub const MAX_PIECES: usize = 1024;

/// Room for iovec lists, kept between frames so that none allocates.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    // Pointers in here are stale except through a `Frame`, which starts by clearing them.
    list: Vec<libc::iovec>,
}

impl FrameBuffer {
    /// Starts an empty frame.
    pub fn frame<'m>(&mut self) -> Frame<'_, 'm> {
        self.list.clear();
        Frame::at_end_of(&mut self.list)
    }
}

/// One frame under construction; `'m` is the memory that it points into.
#[derive(Debug)]
pub struct Frame<'l, 'm> {
    list: &'l mut Vec<libc::iovec>,
    /// Where this frame's pieces begin; those before are another frame's of the same batch.
    first: usize,
    len: usize,
    _memory: PhantomData<&'m mut [u8]>,
}

impl<'l, 'm> Frame<'l, 'm> {
    /// An empty frame behind what is in the list.
    pub(super) fn at_end_of(list: &'l mut Vec<libc::iovec>) -> Self {
        Self {
            first: list.len(),
            list,
            len: 0,
            _memory: PhantomData,
        }
    }

    /// Appends all that is left of a guest's buffers.
    pub fn push_guest(&mut self, mut cursor: Cursor<'m>) {
        let all = cursor.remaining();
        self.len += cursor.take_iovecs(all, self.list);
    }

    /// Appends memory of our own.
    pub fn push_own(&mut self, bytes: &'m mut [u8]) {
        if !bytes.is_empty() {
            self.len += bytes.len();
            self.list.push(libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            });
        }
    }

    /// Bytes of all pieces.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces. Every one is valid for reads and writes as long as this borrow lives: it comes
    /// from a `Cursor<'m>` over mapped guest memory or from a `&'m mut [u8]`.
    #[must_use]
    pub fn pieces(&self) -> &[libc::iovec] {
        &self.list[self.first..]
    }
}
