//! Where frames come from and go to: the other side of the device.
//!
//! A port has as many queues as the device has pairs. Every frame carries a virtio-net header in
//! front (see [`crate::header`]), both ways. [`tap::Tap`] is the port of the daemon; tests and
//! fuzz targets use one made of memory.

mod attach;
pub mod batch;
mod drops;
pub mod frame;
pub mod link;
mod sys;
pub mod tap;
pub mod testing;

use std::io;
use std::os::fd::RawFd;

use berth_queue_worker::Syscall;

use frame::Frame;

/// A source and sink of frames.
///
/// `recv` and `send` are called on the worker thread of the queue, the rest on the control thread
/// or on the control queue's thread. Nothing blocks; the guest controls the bytes of sent frames,
/// header included, and the order of calls from the control queue.
pub trait NetPort: Send + Sync + 'static {
    /// Number of queues.
    fn num_queues(&self) -> u16;

    /// System calls that all of this makes, for the sandbox.
    fn syscalls(&self) -> Vec<Syscall> {
        Vec::new()
    }

    /// Whether it takes and delivers UDP segmentation (USO).
    fn has_uso(&self) -> bool;

    /// Whether there is always room for another frame, short of the kernel's memory. Where there is
    /// not, frames go one by one, so that none overtakes another that found no room.
    fn is_roomy(&self) -> bool;

    /// Frames for the guest that the host dropped before they got here, where it says. Any thread.
    fn host_drops(&self) -> Option<u64> {
        None
    }

    /// Longest frame without segmentation that comes in, header included, as of now; none where
    /// that is not known.
    fn max_plain_frame(&self) -> Option<usize> {
        None
    }

    /// What to poll for frames and for room on `queue`. Does not block.
    fn fd(&self, queue: u16) -> RawFd;

    /// Reads one frame with its header into `frame`; says how long it is. What does not fit is
    /// lost. WouldBlock: no frame. [`is_removed`]: the interface has gone.
    fn recv(&self, queue: u16, frame: &mut Frame<'_, '_>) -> io::Result<usize>;

    /// Sends one frame with its header. WouldBlock: no room, nothing was sent.
    fn send(&self, queue: u16, frame: &Frame<'_, '_>) -> io::Result<usize>;

    /// Length of the header of every frame, 10 or 12.
    fn set_header_len(&self, len: usize) -> io::Result<()>;

    /// Which offloads received frames may carry: bits of
    /// [`GUEST_OFFLOADS`](crate::device::GUEST_OFFLOADS).
    fn set_offloads(&self, features: u64) -> io::Result<()>;

    /// Attaches `queue`, or detaches it: then no frame is steered to it; it may still send. Queue 0
    /// stays attached.
    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()>;

    /// Calls `on_change` from a thread of its own with the state of the link, and again on each
    /// change, until the process ends. A port that cannot know never calls: its link is up.
    fn watch_link(&self, on_change: Box<dyn Fn(bool) + Send>) -> io::Result<()> {
        drop(on_change);
        Ok(())
    }
}

/// Whether an error of `recv` or `send` says that the interface has gone, for good.
#[must_use]
pub fn is_removed(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}
