//! Latencies in buckets of at most 1.6 % width, so that a run of any length takes 30 KiB.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Buckets per power of two.
const STEPS: u64 = 64;
const STEPS_LOG2: u32 = 6;
/// Up to 2^40 ns, 18 minutes; what is longer counts as that.
const POWERS: u64 = 40;

/// Counts per latency.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: vec![0; (STEPS * POWERS) as usize],
            total: 0,
        }
    }
}

/// Below STEPS one bucket per nanosecond, above it STEPS buckets per power of two.
fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let shift = ns.ilog2() - STEPS_LOG2;
    let step = (ns >> shift) - STEPS;
    let index = STEPS * (u64::from(shift) + 1) + step;
    index.min(STEPS * POWERS - 1) as usize
}

/// The smallest latency of a bucket.
fn floor(index: usize) -> u64 {
    let index = index as u64;
    if index < STEPS {
        return index;
    }
    (STEPS + index % STEPS) << (index / STEPS - 1)
}

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)] += 1;
        self.total += 1;
    }

    /// Adds all that another one has.
    pub fn add(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The latency in microseconds that `share` (0 to 1) of all stay at or below.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return floor(index) as f64 / 1000.0;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_narrow() {
        let mut last = 0;
        for ns in (0..5000).chain((5000..50_000_000).step_by(997)) {
            let index = bucket(ns);
            assert!(index == last || index == last + 1 || ns > 5000 && index > last);
            assert!(floor(index) <= ns && ns as f64 <= floor(index) as f64 * 1.016 + 1.0);
            last = index;
        }
        assert_eq!(bucket(u64::MAX), (STEPS * POWERS - 1) as usize);
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut histogram = Histogram::default();
        for us in 1..=1000 {
            histogram.record(Duration::from_micros(us));
        }
        assert_eq!(histogram.count(), 1000);
        for (share, us) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = histogram.quantile_us(share);
            assert!((found - us).abs() <= us * 0.016, "{share}: {found}");
        }
    }
}
