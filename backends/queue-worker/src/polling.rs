//! How long a worker looks for work before it sleeps.
//!
//! A sleeping thread costs its waker a system call and itself a wake-up, which is more than a
//! whole request on a fast medium. So a worker that has nothing to do first watches its ring, its
//! device and its commands for a while, with notifications off:
//!
//! ```text
//!                 ┌── found something within the window: stays as it is
//!   wait of t  ───┼── t longer than the window, but not than the limit: would have paid, doubles
//!                 └── t longer than the limit: was in vain, halves, and soon is nothing
//! ```
//!
//! So the window is the price of being busy only: an idle worker sleeps at once, and takes no CPU.
//! Pure: time is the caller's. One per queue thread.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Below this a window is not worth the look at the clock, and is nothing.
const SMALLEST: Duration = Duration::from_micros(8);

/// The window of one worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    limit: Duration,
    now: Duration,
}

impl Window {
    /// Begins without polling; never polls longer than `limit`, and not at all where that is 0.
    pub(crate) fn new(limit: Duration) -> Window {
        Window {
            limit,
            now: Duration::ZERO,
        }
    }

    /// How long to look before sleeping.
    pub(crate) fn get(&self) -> Duration {
        self.now
    }

    /// Whether it can ever be more than nothing: otherwise waits need not be timed.
    pub(crate) fn is_adaptive(&self) -> bool {
        !self.limit.is_zero()
    }

    /// Something came `waited` after there was nothing left to do.
    pub(crate) fn learn(&mut self, waited: Duration) {
        if waited <= self.now {
            return;
        }
        if waited <= self.limit {
            self.now = (self.now * 2).max(SMALLEST).min(self.limit);
        } else {
            self.now /= 2;
            if self.now < SMALLEST {
                self.now = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(64);
    const SHORT: Duration = Duration::from_micros(40);
    const LONG: Duration = Duration::from_millis(1);

    #[test]
    fn short_waits_open_the_window_until_it_covers_them() {
        let mut window = Window::new(LIMIT);
        assert!(window.get().is_zero());
        for _ in 0..10 {
            window.learn(SHORT);
        }
        assert!(window.get() >= SHORT && window.get() <= LIMIT);
        let covers = window.get();
        window.learn(SHORT);
        assert_eq!(window.get(), covers);
    }

    #[test]
    fn long_waits_close_it_and_one_of_them_does_not() {
        let mut window = Window::new(LIMIT);
        for _ in 0..10 {
            window.learn(SHORT);
        }
        window.learn(LONG);
        assert!(!window.get().is_zero());
        for _ in 0..4 {
            window.learn(LONG);
        }
        assert!(window.get().is_zero());
    }

    #[test]
    fn limit_of_nothing_never_polls() {
        let mut window = Window::new(Duration::ZERO);
        assert!(!window.is_adaptive());
        window.learn(Duration::ZERO);
        window.learn(Duration::from_nanos(1));
        assert!(window.get().is_zero());
    }

    #[test]
    fn limit_is_never_exceeded() {
        let limit = Duration::from_micros(10);
        let mut window = Window::new(limit);
        for _ in 0..10 {
            window.learn(limit);
        }
        assert_eq!(window.get(), limit);
    }
}
