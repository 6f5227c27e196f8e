//! Waiting for descriptors and for a time, whichever comes first.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken at a time.
const BATCH: usize = 16;

/// Descriptors that are watched, each with a token.
pub(super) struct Waiter(Epoll);

/// One that is ready.
pub(super) struct Ready {
    pub(super) token: u64,
    /// Whether the other end is gone.
    pub(super) hung_up: bool,
}

impl Waiter {
    pub(super) fn new() -> io::Result<Self> {
        Epoll::new().map(Self)
    }

    pub(super) fn watch(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let interest = EventSet::IN | EventSet::READ_HANG_UP;
        self.0.ctl(
            ControlOperation::Add,
            fd.as_raw_fd(),
            EpollEvent::new(interest, token),
        )
    }

    /// Watches a descriptor no more. To be done before it is closed if another process has it too.
    pub(super) fn forget(&self, fd: &impl AsRawFd) {
        // It fails only for one that is not watched.
        let _ = self.0.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        );
    }

    /// Waits; nothing is ready if the time came first, or a signal.
    pub(super) fn wait(&self, until: Option<Instant>) -> io::Result<Vec<Ready>> {
        let timeout = until.map_or(-1, |until| {
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up, so as not to wake before the time.
            i32::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); BATCH];
        let ready = match self.0.wait(timeout, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let gone = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
        let events = events[..ready].iter().map(|event| Ready {
            token: event.data(),
            hung_up: event.event_set().intersects(gone),
        });
        Ok(events.collect())
    }
}
