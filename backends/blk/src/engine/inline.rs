//! When to do an operation on the spot instead of through the ring.
//!
//! io_uring tries an operation without blocking first. Where a file cannot promise not to block
//! (zram and other devices that work on bios, FUSE, buffered writes of ext4), it does not try: it
//! hands every operation to a worker thread of its own. On a medium as fast as memory that costs
//! several times the operation, and the worker takes a CPU from somebody. So where the kernel would
//! hand over anyway, and as long as the medium is fast, the queue's thread does the operation
//! itself, as the worker would have done:
//!
//! ```text
//!            completed in the ring within FAST_RING
//!   ring ───────────────────────────────────────────▶ trial ─▶ inline (each time is measured)
//!     ▲                                                          │ slower than it may be
//!     └──────────────── for a while, twice as long each time ────┘
//! ```
//!
//! An operation may take [`CHEAP`] at any depth (a handover costs as much), and [`ALONE`] where
//! nothing else is to be done meanwhile; otherwise the ring has it, and overlaps.
//!
//! Pure: times are the caller's. One for each direction of a queue.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Longest operation that is tried at all, in bytes.
const MAX_LEN: usize = 32 << 10;
/// A medium that took longer than this for an operation in the ring is not tried.
const FAST_RING: Duration = Duration::from_millis(1);
/// What an operation may take at any depth.
const CHEAP: Duration = Duration::from_micros(8);
/// What an operation may take that has the engine to itself.
const ALONE: Duration = Duration::from_micros(40);
/// What no operation may take: the queue stands still meanwhile.
const INTOLERABLE: Duration = Duration::from_millis(10);
/// Operations through the ring after one was too slow: from, and up to.
const BACKOFF: std::ops::Range<u32> = 256..1 << 16;
/// One of so many operations is timed where the others are not.
const SAMPLE: u32 = 16;

/// Where an operation goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// On the spot.
    Here,
    /// On the spot if there is nothing else to do, otherwise into the ring.
    HereIfAlone,
    /// Into the ring.
    Ring,
    /// Into the ring, and [`Policy::ring_took`] wants to know how long it was there.
    RingTimed,
}

/// The policy for one direction.
#[derive(Debug)]
pub(crate) struct Policy {
    /// The kernel would hand operations to a worker.
    handed_over: bool,
    /// The ring has shown that the medium is fast.
    trusted: bool,
    /// Operations to go before the ring, or the spot, is timed again.
    until_sample: u32,
    backoff: u32,
    /// Moving average of what operations took here.
    average: Duration,
}

impl Policy {
    /// `handed_over`: whether the kernel hands this direction over; otherwise all goes to the ring.
    pub(crate) fn new(handed_over: bool) -> Policy {
        Policy {
            handed_over,
            trusted: false,
            until_sample: 0,
            backoff: BACKOFF.start,
            average: Duration::ZERO,
        }
    }

    /// Where the next operation, of `len` bytes, goes.
    pub(crate) fn place(&mut self, len: usize) -> Place {
        if !self.handed_over || len > MAX_LEN {
            return Place::Ring;
        }
        if self.trusted && self.average <= CHEAP {
            return Place::Here;
        }
        let due = self.until_sample == 0;
        self.until_sample = if due { SAMPLE } else { self.until_sample - 1 };
        match (self.trusted, due) {
            (true, true) => Place::Here,
            (true, false) => Place::HereIfAlone,
            (false, true) => Place::RingTimed,
            (false, false) => Place::Ring,
        }
    }

    /// The ring took so long for an operation.
    pub(crate) fn ring_took(&mut self, time: Duration) {
        if time <= FAST_RING {
            self.trusted = true;
            self.average = Duration::ZERO;
        } else {
            self.step_back();
        }
    }

    /// It took so long here.
    pub(crate) fn took(&mut self, time: Duration) {
        // One that took long may have lost its CPU to somebody, several in a row have not.
        let counted = time.min(4 * ALONE);
        self.average = self.average - self.average / 8 + counted / 8;
        if time > INTOLERABLE || self.average > ALONE {
            self.step_back();
        } else if self.average <= CHEAP {
            self.backoff = (self.backoff - 1).max(BACKOFF.start);
        }
    }

    fn step_back(&mut self) {
        self.trusted = false;
        self.until_sample = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_micros(3);
    const SLOW: Duration = Duration::from_micros(20);
    const LEN: usize = 4096;

    /// Places `count` operations that take `time` each here, or are slower than the ring may be.
    fn run(policy: &mut Policy, time: Duration, count: usize) -> Vec<Place> {
        let places: Vec<Place> = (0..count)
            .map(|_| {
                let place = policy.place(LEN);
                match place {
                    Place::Here | Place::HereIfAlone => policy.took(time),
                    Place::RingTimed => policy.ring_took(time),
                    Place::Ring => {}
                }
                place
            })
            .collect();
        places
    }

    fn count(places: &[Place], place: Place) -> usize {
        places.iter().filter(|p| **p == place).count()
    }

    #[test]
    fn what_the_kernel_does_not_hand_over_goes_to_the_ring() {
        let places = run(&mut Policy::new(false), FAST, 1000);
        assert_eq!(count(&places, Place::Ring), 1000);
    }

    #[test]
    fn fast_medium_is_used_on_the_spot_once_the_ring_has_shown_it() {
        let mut policy = Policy::new(true);
        let places = run(&mut policy, FAST, 1000);
        assert_eq!(places[0], Place::RingTimed);
        assert_eq!(count(&places, Place::Here), 999);
        assert_eq!(policy.place(MAX_LEN + 1), Place::Ring);
    }

    #[test]
    fn slower_one_only_where_nothing_waits() {
        let places = run(&mut Policy::new(true), SLOW, 1000);
        assert!(count(&places, Place::HereIfAlone) > 900, "{places:?}");
    }

    #[test]
    fn slow_medium_is_left_to_the_ring_ever_longer() {
        let places = run(&mut Policy::new(true), Duration::from_millis(20), 100_000);
        assert_eq!(count(&places, Place::Here), 0);
        assert!(count(&places, Place::RingTimed) < 12, "{places:?}");
    }

    #[test]
    fn medium_that_becomes_slow_is_left_and_found_again_when_fast() {
        let mut policy = Policy::new(true);
        run(&mut policy, FAST, 1000);
        let places = run(&mut policy, Duration::from_millis(20), 1000);
        assert!(count(&places, Place::Here) <= 1, "{places:?}");
        let places = run(&mut policy, FAST, BACKOFF.end as usize);
        assert_eq!(places.last(), Some(&Place::Here));
    }

    #[test]
    fn one_that_lost_its_cpu_changes_little() {
        let mut policy = Policy::new(true);
        run(&mut policy, FAST, 1000);
        policy.took(Duration::from_millis(4));
        let places = run(&mut policy, FAST, 100);
        assert!(count(&places, Place::Here) > 70, "{places:?}");
        assert_eq!(count(&places, Place::Ring), 0);
    }
}
