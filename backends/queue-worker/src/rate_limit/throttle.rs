//! What a queue thread holds of a limiter: the request that waits, and the timer that ends it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::RateLimiter;
use crate::device::{QueueError, Source};

/// Holds one queue to its device's limits. On the queue's thread.
///
/// Charge each request once, before it goes. Where that says no, keep the request, take nothing
/// more from the ring, leave [`Interest::kick`](crate::Interest) out and put the
/// [`source`](Throttle::source) in; each time `process` is called, ask [`release`](Throttle::release)
/// whether the request may go now. A device that learns a size only afterwards (a frame that has
/// been received) charges what has gone already, and holds back the next one.
#[derive(Debug)]
pub struct Throttle {
    limiter: Arc<RateLimiter>,
    pub(super) timer: TimerFd,
    /// On the limiter's clock; none while nothing waits.
    until_ns: Option<u64>,
}

impl Throttle {
    /// For one queue.
    pub fn new(limiter: Arc<RateLimiter>) -> io::Result<Throttle> {
        Ok(Throttle {
            limiter,
            timer: TimerFd::new()?,
            until_ns: None,
        })
    }

    /// Ready when [`release`](Throttle::release) is worth asking. To be polled only while
    /// something waits: it stays ready afterwards.
    pub fn source(&self) -> Source {
        Source::readable(self.timer.as_raw_fd())
    }

    /// Charges one operation of `bytes` bytes; whether it may go now. If not, it waits, and
    /// nothing else may be charged before it has been released.
    pub fn charge(&mut self, bytes: u64) -> Result<bool, QueueError> {
        let now_ns = self.limiter.now_ns();
        let go_ns = self.limiter.reserve(bytes, now_ns);
        if go_ns <= now_ns {
            return Ok(true);
        }
        self.until_ns = Some(go_ns);
        self.arm(go_ns - now_ns)?;
        Ok(false)
    }

    /// Whether a request waits.
    pub fn is_waiting(&self) -> bool {
        self.until_ns.is_some()
    }

    /// Whether what waits may go now; true also where nothing waits.
    pub fn release(&mut self) -> Result<bool, QueueError> {
        let Some(until_ns) = self.until_ns else {
            return Ok(true);
        };
        let now_ns = self.limiter.now_ns();
        if now_ns < until_ns {
            self.arm(until_ns - now_ns)?;
            return Ok(false);
        }
        self.until_ns = None;
        Ok(true)
    }

    /// The queue stops: what waits goes now. It has been charged, so this is early, not free.
    pub fn give_up(&mut self) {
        self.until_ns = None;
    }

    fn arm(&mut self, wait_ns: u64) -> Result<(), QueueError> {
        // Waking up late costs nothing: what came in meanwhile lets the next requests go at once.
        let wait = Duration::from_nanos(wait_ns.max(self.limiter.granularity_ns));
        let armed = self.timer.reset(wait, None);
        armed.map_err(|error| QueueError::Device {
            what: "the rate limit's timer",
            source: error.into(),
        })
    }
}
