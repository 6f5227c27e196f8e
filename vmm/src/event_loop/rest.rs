//! A listener that is left alone for a while.
//!
//! A client that cannot be taken, as where there are no descriptors to spare, stays in the listener's queue, and
//! epoll goes on saying so: a thread that only tried again would do nothing else. All that listen here rest instead.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long a listener rests after a client could not be taken.
pub const AFTER_A_FAILURE: Duration = Duration::from_secs(1);

/// Whether a listener of an epoll set rests.
#[derive(Debug, Default)]
pub struct Rest(Option<Until>);

#[derive(Debug, Clone, Copy)]
enum Until {
    Time(Instant),
    Told,
}

impl Rest {
    /// The file, which is in the set, is not reported until that time, or until [`end`](Self::end).
    pub fn begin(&mut self, epoll: &Epoll, file: RawFd, token: u64, until: Option<Instant>) {
        set(epoll, file, token, EventSet::empty());
        self.0 = Some(until.map_or(Until::Told, Until::Time));
    }

    /// It is reported again, if it rested.
    pub fn end(&mut self, epoll: &Epoll, file: RawFd, token: u64) {
        if self.0.take().is_some() {
            set(epoll, file, token, EventSet::IN);
        }
    }

    /// The same once its time has come.
    pub fn end_if_due(&mut self, epoll: &Epoll, file: RawFd, token: u64) {
        if self.deadline().is_some_and(|until| until <= Instant::now()) {
            self.end(epoll, file, token);
        }
    }

    /// When it is due; none where it does not rest, or only until it is told.
    pub fn deadline(&self) -> Option<Instant> {
        match self.0 {
            Some(Until::Time(until)) => Some(until),
            Some(Until::Told) | None => None,
        }
    }
}

fn set(epoll: &Epoll, file: RawFd, token: u64, interest: EventSet) {
    // It is in the set, and changing that takes nothing that could be missing.
    let _ = epoll.ctl(
        ControlOperation::Modify,
        file,
        EpollEvent::new(interest, token),
    );
}

/// For epoll: milliseconds until a deadline, rounded up so that it has passed when the wait is over; -1 without one.
pub fn timeout_ms(deadline: Option<Instant>) -> i32 {
    deadline.map_or(-1, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn one_that_rests_is_not_reported_until_it_is_due() {
        let (epoll, ready) = (Epoll::new().unwrap(), EventFd::new(0).unwrap());
        ready.write(1).unwrap();
        let (file, mut rest) = (ready.as_raw_fd(), Rest::default());
        epoll
            .ctl(
                ControlOperation::Add,
                file,
                EpollEvent::new(EventSet::IN, 5),
            )
            .unwrap();
        let mut events = [EpollEvent::default(); 1];
        let mut reported = || epoll.wait(0, &mut events).unwrap();
        assert_eq!(reported(), 1);
        let now = Instant::now();
        rest.begin(&epoll, file, 5, Some(now + Duration::from_secs(3600)));
        rest.end_if_due(&epoll, file, 5);
        assert_eq!(reported(), 0);
        rest.begin(&epoll, file, 5, Some(now));
        rest.end_if_due(&epoll, file, 5);
        assert_eq!(reported(), 1);
        rest.begin(&epoll, file, 5, None);
        assert_eq!((rest.deadline(), reported()), (None, 0));
        rest.end(&epoll, file, 5);
        assert_eq!(reported(), 1);
    }

    #[test]
    fn a_deadline_that_has_passed_waits_for_nothing() {
        assert_eq!(timeout_ms(None), -1);
        assert_eq!(timeout_ms(Some(Instant::now())), 1);
    }
}
