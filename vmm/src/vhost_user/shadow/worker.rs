//! The thread of one shadow queue.
//!
//! ```text
//!  guest's doorbell (ioeventfd) ──▶ ┐                ┌ ──▶ backend's kick
//!                                   │  epoll, edges  │
//!  backend's call ────────────────▶ │  back, forward │
//!  stop ──────────────────────────▶ ┘                └ ──▶ guest's interrupt (irqfd)
//! ```
//!
//! It sleeps whenever both rings have nothing, and is woken by events alone; while it works neither side has to kick it
//! (virtio 1.3, 2.7.7, 2.7.10), so that a busy queue is served in batches. The events are watched for edges and never
//! read: each write is one.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Fault;
use super::queue::Queue;

/// What a worker shares with those who end it, or send its interrupts elsewhere.
pub(super) struct Controls {
    pub(super) index: u16,
    stopping: AtomicBool,
    wake: EventFd,
    /// Where interrupts go; the driver may change it.
    call: Mutex<EventFd>,
}

impl Controls {
    pub(super) fn new(index: u16, call: EventFd) -> io::Result<Self> {
        Ok(Self {
            index,
            stopping: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            call: Mutex::new(call),
        })
    }

    /// Has the worker end soon; it begins no request any more.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Full is as good as written.
        let _ = self.wake.write(1);
    }

    pub(super) fn set_call(&self, call: EventFd) {
        let mut current = self.call();
        *current = call;
        // What came in between went to the old one.
        let _ = current.write(1);
    }

    fn call(&self) -> MutexGuard<'_, EventFd> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events between which a worker is.
pub(super) struct Events {
    /// The guest's doorbell.
    pub(super) guest_kick: EventFd,
    pub(super) backend_kick: EventFd,
    pub(super) backend_call: EventFd,
}

pub(super) struct Worker {
    queue: Queue,
    controls: Arc<Controls>,
    events: Events,
    epoll: Epoll,
}

/// Why a worker ended before it was to.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// One of the rings makes no sense.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// It cannot wait any more.
    #[error("cannot wait for events: {0}")]
    Wait(io::Error),
}

impl Worker {
    pub(super) fn new(queue: Queue, controls: Arc<Controls>, events: Events) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for event in [&controls.wake, &events.guest_kick, &events.backend_call] {
            let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        }
        Ok(Self {
            queue,
            controls,
            events,
            epoll,
        })
    }

    /// Serves the queue until it is stopped, or cannot go on.
    pub(super) fn run(mut self) -> Result<(), End> {
        let mut ready = [EpollEvent::default(); 3];
        while !self.controls.stopping.load(Ordering::Acquire) {
            if self.pass()? {
                continue;
            }
            match self.epoll.wait(-1, &mut ready) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(End::Wait(error)),
            }
        }
        Ok(())
    }

    /// Moves what there is both ways; returns whether there is more.
    fn pass(&mut self) -> Result<bool, Fault> {
        if self.queue.give_back()? {
            // Full is as good as written, here and below.
            let _ = self.controls.call().write(1);
        }
        if self.queue.forward()? {
            let _ = self.events.backend_kick.write(1);
        }
        self.queue.listen()
    }
}
