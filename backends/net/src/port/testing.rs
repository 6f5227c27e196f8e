//! A port made of socket pairs, for tests, fuzz targets and benchmarks: no privilege, no kernel
//! network. A SOCK_SEQPACKET socket keeps message boundaries, cuts what does not fit, and can be
//! full, as a tap does.

#![expect(unsafe_code, reason = "socketpair has no safe form in libc")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::frame::{Frame, FrameBuffer};
use super::{NetPort, sys};

/// How long a test waits before it fails.
pub const PATIENCE_MS: i32 = 20_000;

/// What was set on the port, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// `set_header_len`.
    HeaderLen(usize),
    /// `set_offloads`.
    Offloads(u64),
    /// `set_attached`.
    Attached(u16, bool),
}

/// The port, and the far ends of its queues.
#[derive(Debug)]
pub struct SocketPort {
    near: Vec<OwnedFd>,
    far: Vec<OwnedFd>,
    roomy: bool,
    /// Longest frame without segmentation.
    longest: Option<usize>,
    events: Mutex<Vec<Event>>,
    changed: Condvar,
}

impl SocketPort {
    /// A port with this many queues, which is full at times.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn new(queues: u16) -> io::Result<Self> {
        let mut port = Self {
            near: Vec::new(),
            far: Vec::new(),
            roomy: false,
            longest: None,
            events: Mutex::default(),
            changed: Condvar::new(),
        };
        for _ in 0..queues {
            let (near, far) = seqpacket_pair()?;
            port.near.push(near);
            port.far.push(far);
        }
        Ok(port)
    }

    /// A port that says that it is never full.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn roomy(queues: u16) -> io::Result<Self> {
        let mut port = Self::new(queues)?;
        port.roomy = true;
        Ok(port)
    }

    /// A port that says that it is never full, and that a frame without segmentation has at most
    /// `longest` bytes, header included. A longer one is as after a change of the MTU.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn with_longest(queues: u16, longest: usize) -> io::Result<Self> {
        let mut port = Self::roomy(queues)?;
        port.longest = Some(longest);
        Ok(port)
    }

    /// Puts a frame, header included, where `recv` finds it.
    ///
    /// # Errors
    /// The queue is full (WouldBlock).
    pub fn inject(&self, queue: u16, bytes: &[u8]) -> io::Result<()> {
        let mut bytes = bytes.to_vec();
        let mut buffer = FrameBuffer::default();
        let mut frame = buffer.frame();
        frame.push_own(&mut bytes);
        sys::writev(self.far(queue)?.as_fd(), &frame).map(drop)
    }

    /// Takes a frame, header included, that was sent.
    ///
    /// # Errors
    /// Nothing was sent (WouldBlock).
    pub fn take(&self, queue: u16) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 128 << 10];
        let mut buffer = FrameBuffer::default();
        let mut frame = buffer.frame();
        frame.push_own(&mut bytes);
        let n = sys::readv(self.far(queue)?.as_fd(), &mut frame)?;
        bytes.truncate(n);
        Ok(bytes)
    }

    /// Takes a frame that was sent, or will be soon.
    ///
    /// # Errors
    /// Nothing was sent within [`PATIENCE_MS`] (WouldBlock).
    pub fn wait_sent(&self, queue: u16) -> io::Result<Vec<u8>> {
        sys::wait_readable(self.far(queue)?.as_fd(), PATIENCE_MS)?;
        self.take(queue)
    }

    /// What was set since this was last asked.
    #[allow(clippy::must_use_candidate, reason = "asking is also how to forget")]
    pub fn events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until `event` was set, and forgets everything set so far.
    ///
    /// # Panics
    /// It was not set within [`PATIENCE_MS`].
    pub fn wait_for(&self, event: Event) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = Duration::from_millis(PATIENCE_MS.unsigned_abs().into());
        let missing = |events: &mut Vec<Event>| !events.contains(&event);
        let (mut events, result) = self
            .changed
            .wait_timeout_while(events, patience, missing)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!result.timed_out(), "no {event:?}, only {events:?}");
        events.clear();
    }

    fn record(&self, event: Event) -> io::Result<()> {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
        self.changed.notify_all();
        Ok(())
    }

    fn near(&self, queue: u16) -> io::Result<&OwnedFd> {
        self.near
            .get(usize::from(queue))
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn far(&self, queue: u16) -> io::Result<&OwnedFd> {
        self.far
            .get(usize::from(queue))
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl NetPort for SocketPort {
    fn num_queues(&self) -> u16 {
        self.near.len() as u16
    }

    fn has_uso(&self) -> bool {
        true
    }

    fn is_roomy(&self) -> bool {
        self.roomy
    }

    fn max_plain_frame(&self) -> Option<usize> {
        self.longest
    }

    fn fd(&self, queue: u16) -> RawFd {
        self.near(queue).map_or(-1, AsRawFd::as_raw_fd)
    }

    fn recv(&self, queue: u16, frame: &mut Frame<'_, '_>) -> io::Result<usize> {
        sys::readv(self.near(queue)?.as_fd(), frame)
    }

    fn send(&self, queue: u16, frame: &Frame<'_, '_>) -> io::Result<usize> {
        sys::writev(self.near(queue)?.as_fd(), frame)
    }

    fn set_header_len(&self, len: usize) -> io::Result<()> {
        self.record(Event::HeaderLen(len))
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.record(Event::Offloads(features))
    }

    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()> {
        self.record(Event::Attached(queue, attached))
    }
}

fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socketpair fills an array of two ints, which `fds` is.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call made both descriptors, and nobody else knows them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}
