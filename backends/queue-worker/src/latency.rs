//! How long the device holds a request: from the pop of its chain to the used entry that the
//! driver can see.
//!
//! ```text
//!   pop ─▶ started[head] = now of the batch     push_used ─▶ run of equal starts
//!                                               publish ─▶ one clock read, runs ─▶ histogram
//! ```
//!
//! The clock is read at most twice in a batch: at its first pop and when it is published. Chains
//! that were popped and used together are one run, so a packet costs no more than an addition.
//! For a receive queue it is the time that a buffer waited for its packet. Owned by the worker
//! thread, as the ring is.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use crate::metrics::{Counter, QueueCounters};

/// Buckets with a bound: 1 µs, 2 µs, 4 µs, … 8.4 s.
const BOUNDS: usize = 24;

/// Durations in buckets, each twice as wide as the one before. One writer, many readers.
#[derive(Debug, Default)]
pub struct Histogram {
    /// The last one has no bound.
    buckets: [Counter; BOUNDS + 1],
    sum_ns: Counter,
}

impl Histogram {
    /// Counts `n` durations of `ns` nanoseconds. To be called by the one writer only.
    pub fn record(&self, ns: u64, n: u64) {
        // The bound of bucket k is 1000 << k, and belongs to it.
        let micros = ns.saturating_sub(1) / 1000;
        let index = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[index.min(BOUNDS)].add(n);
        self.sum_ns.add(ns.saturating_mul(n));
    }

    /// Sum of all durations in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns.get()
    }

    /// How many durations there are in this bucket and those below it, by ascending bound in
    /// microseconds; the last one has none, and so counts all.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let mut count = 0;
        self.buckets.iter().enumerate().map(move |(k, bucket)| {
            count += bucket.get();
            ((k < BOUNDS).then(|| 1 << k), count)
        })
    }
}

/// The stopwatch of one ring.
#[derive(Debug)]
pub(crate) struct Latency {
    base: Instant,
    /// Nanoseconds since `base` of this batch's first pop, plus 1; 0 before it.
    now: u64,
    /// By head: when it was popped.
    started: Box<[u64]>,
    /// Used and not yet published: when popped, and how many.
    runs: Vec<(u64, u64)>,
    counters: Arc<QueueCounters>,
}

impl Latency {
    pub(crate) fn new(size: u16, counters: Arc<QueueCounters>) -> Latency {
        Latency {
            base: Instant::now(),
            now: 0,
            started: vec![0; usize::from(size)].into(),
            runs: Vec::new(),
            counters,
        }
    }

    fn clock(&self) -> u64 {
        // Five centuries of uptime fit.
        self.base.elapsed().as_nanos() as u64 + 1
    }

    pub(crate) fn begin_batch(&mut self) {
        self.now = 0;
    }

    pub(crate) fn popped(&mut self, head: u16) {
        if self.now == 0 {
            self.now = self.clock();
        }
        if let Some(started) = self.started.get_mut(usize::from(head)) {
            *started = self.now;
        }
    }

    pub(crate) fn used(&mut self, head: u16) {
        let started = self.started.get(usize::from(head)).copied().unwrap_or(0);
        match self.runs.last_mut() {
            Some((start, n)) if *start == started => *n += 1,
            _ => self.runs.push((started, 1)),
        }
    }

    pub(crate) fn published(&mut self) {
        let now = self.clock();
        for (started, n) in self.runs.drain(..) {
            // 0: not popped by this ring, but by one before it.
            if started != 0 {
                self.counters.latency.record(now.saturating_sub(started), n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn duration_is_counted_in_every_bucket_whose_bound_it_does_not_exceed() {
        let counts_of = |ns| {
            let histogram = Histogram::default();
            histogram.record(ns, 3);
            let within = histogram.cumulative().filter(|(_, count)| *count == 3);
            let first = within.map(|(bound, _)| bound).next().unwrap();
            let (last_bound, all) = histogram.cumulative().last().unwrap();
            assert_eq!((last_bound, all), (None, 3));
            first
        };
        for (ns, bound) in [
            (0, Some(1)),
            (1000, Some(1)),
            (1001, Some(2)),
            (4000, Some(4)),
            (4001, Some(8)),
            (8_388_608_000, Some(8_388_608)),
            (8_388_608_001, None),
            (u64::MAX, None),
        ] {
            assert_eq!(counts_of(ns), bound, "{ns} ns");
        }
    }

    #[test]
    fn each_request_is_counted_once_it_is_published_from_its_own_pop() {
        let counters = Arc::new(QueueCounters::default());
        let mut latency = Latency::new(4, Arc::clone(&counters));
        let count = || counters.latency.cumulative().last().unwrap().1;
        // The first batch was an hour ago.
        latency.base -= Duration::from_secs(3600);
        latency.now = 1;
        latency.popped(1);
        latency.popped(2);
        latency.begin_batch();
        latency.popped(3);
        latency.used(1);
        latency.used(3);
        assert_eq!(count(), 0);
        latency.published();
        assert_eq!(count(), 2);
        assert!(counters.latency.sum_ns() >= 3_600_000_000_000);
        let (_, short) = counters.latency.cumulative().nth(BOUNDS - 1).unwrap();
        assert_eq!(short, 1, "only head 1 took an hour: {:?}", counters.latency);
        latency.used(2);
        latency.used(9);
        latency.published();
        assert_eq!(
            count(),
            3,
            "a head outside of the ring is not one of its requests"
        );
    }
}
