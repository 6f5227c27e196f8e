//! Deadlines for exchanges with a backend.
//!
//! `vhost::vhost_user::Frontend` reads until a reply is whole, and takes a socket timeout for a reason to
//! try again, forever; so does its sending. What does end it is the end of the connection. One thread
//! therefore shuts a session's socket down when its exchange has taken too long, and whatever the
//! session's thread is doing on it fails.
//!
//! Threads: any may arm; `vu-deadline` fires. One lock, held for the list alone.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::sandbox::{self, ThreadKind};

/// The list of running deadlines; its thread ends when it is dropped.
pub(super) struct Deadlines(Arc<Inner>);

struct Inner {
    list: Mutex<List>,
    changed: Condvar,
}

#[derive(Default)]
struct List {
    next_id: u64,
    armed: BTreeMap<u64, Armed>,
    /// Whatever is armed is over at once.
    closed: bool,
    /// Nobody can arm any more.
    ended: bool,
}

struct Armed {
    at: Instant,
    stream: Arc<UnixStream>,
    fired: Arc<AtomicBool>,
}

/// A deadline that runs until it is dropped.
pub(super) struct Guard {
    inner: Arc<Inner>,
    id: u64,
    fired: Arc<AtomicBool>,
}

impl Deadlines {
    pub(super) fn new() -> io::Result<Self> {
        let inner = Arc::new(Inner {
            list: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = Arc::clone(&inner);
        sandbox::spawn(ThreadKind::Deadline, "vu-deadline", move || thread.run())?;
        Ok(Self(inner))
    }

    /// Shuts `stream` down at that time, unless the guard is dropped before.
    pub(super) fn arm(&self, stream: &Arc<UnixStream>, at: Instant) -> Guard {
        let fired = Arc::new(AtomicBool::new(false));
        let armed = Armed {
            at,
            stream: Arc::clone(stream),
            fired: Arc::clone(&fired),
        };
        let mut list = self.0.list();
        let id = list.next_id;
        list.next_id += 1;
        list.armed.insert(id, armed);
        drop(list);
        self.0.changed.notify_one();
        Guard {
            inner: Arc::clone(&self.0),
            id,
            fired,
        }
    }

    /// Every deadline is over now, and those that will be armed are over at once.
    pub(super) fn expire_all(&self) {
        self.0.list().closed = true;
        self.0.changed.notify_one();
    }
}

impl Drop for Deadlines {
    fn drop(&mut self) {
        self.0.list().ended = true;
        self.0.changed.notify_one();
    }
}

impl Guard {
    /// Whether the time is up and the connection gone.
    pub(super) fn expired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.inner.list().armed.remove(&self.id);
    }
}

impl Inner {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut list = self.list();
        while !list.ended {
            let now = Instant::now();
            let closed = list.closed;
            list.armed.retain(|_, armed| {
                let over = closed || armed.at <= now;
                if over {
                    armed.fired.store(true, Ordering::SeqCst);
                    // It fails only for a connection that is gone already.
                    let _ = armed.stream.shutdown(Shutdown::Both);
                }
                !over
            });
            let next = list.armed.values().map(|armed| armed.at).min();
            list = match next {
                Some(at) => {
                    let waited = self.changed.wait_timeout(list, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(list);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_read_that_takes_too_long_ends() {
        let deadlines = Deadlines::new().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let ours = Arc::new(ours);
        let guard = deadlines.arm(&ours, Instant::now() + Duration::from_millis(20));
        assert_eq!((&*ours).read(&mut [0]).unwrap(), 0);
        assert!(guard.expired());
    }

    #[test]
    fn one_that_was_dropped_harms_nothing_and_order_does_not_matter() {
        let deadlines = Deadlines::new().unwrap();
        let pairs = [(); 2].map(|()| UnixStream::pair().unwrap());
        let [(first, _a), (second, _b)] = pairs;
        let (first, second) = (Arc::new(first), Arc::new(second));
        let late = deadlines.arm(&first, Instant::now() + Duration::from_secs(1000));
        let early = deadlines.arm(&second, Instant::now() + Duration::from_millis(20));
        assert_eq!((&*second).read(&mut [0]).unwrap(), 0);
        assert!(early.expired() && !late.expired());
        drop(late);
        deadlines.expire_all();
        first.set_nonblocking(true).unwrap();
        assert!((&*first).read(&mut [0]).is_err(), "still open");
    }

    #[test]
    fn after_expire_all_everything_is_over_at_once() {
        let deadlines = Deadlines::new().unwrap();
        deadlines.expire_all();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let ours = Arc::new(ours);
        let guard = deadlines.arm(&ours, Instant::now() + Duration::from_secs(1000));
        assert_eq!((&*ours).read(&mut [0]).unwrap(), 0);
        assert!(guard.expired());
    }
}
