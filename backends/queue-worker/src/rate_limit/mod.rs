//! Rate limits by token buckets, shared by all queues of a device.
//!
//! ```text
//!   --rate-limit … ──▶ RateLimit ──▶ RateLimiter ── bandwidth bucket (bytes)
//!                      (config)      one a device └─ operations bucket (requests)
//!                                        ▲ reserve(bytes, now) ─▶ when it may go
//!   queue thread ─ Throttle ─────────────┘   a timerfd wakes the queue at that time
//! ```
//!
//! The buckets are those of Firecracker and Cloud Hypervisor: `size` tokens at the start, refilled
//! evenly at `size` per `refill_time`, and a `one_time_burst` that is spent first and never comes
//! back. What differs is what happens at the limit: a request does not poll for tokens, it
//! *reserves* them and is told the time at which they will be there. So queues are served first
//! come, first served, none can starve another, and a request larger than the whole bucket waits
//! until it has been paid for rather than going ahead on credit.
//!
//! Invariant, whatever the number of threads: by time `t` after its start, a bucket has let go of
//! at most `one_time_burst + size + size * t / refill_time` tokens.
//!
//! A bucket is one number, the time at which it will be full, moved forward by compare-and-swap:
//! no lock, and no thread that refills. Time comes in from outside, so tests bring their own.
#![forbid(unsafe_code)]

mod config;
mod throttle;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub use config::{Bucket, RateLimit};
pub use throttle::Throttle;

/// Time in buckets is counted in 1/64 ns: the cost of a small request at tens of GB/s keeps its
/// precision, and the count lasts for 9 years.
const TICKS_PER_NS_SHIFT: u32 = 6;
const TICKS_PER_MS: u64 = 1_000_000 << TICKS_PER_NS_SHIFT;

/// One token bucket. Any number of threads.
#[derive(Debug)]
struct TokenBucket {
    size: u64,
    refill_ticks: u64,
    /// When the bucket will be full; in the past: it is full.
    full_at: AtomicU64,
    /// Tokens left of the one-time burst.
    burst: AtomicU64,
}

impl TokenBucket {
    fn new(bucket: &Bucket) -> TokenBucket {
        TokenBucket {
            size: bucket.size,
            refill_ticks: bucket.refill_time_ms.saturating_mul(TICKS_PER_MS),
            full_at: AtomicU64::new(0),
            burst: AtomicU64::new(bucket.one_time_burst),
        }
    }

    /// Reserves tokens at `now`; the time, in ticks, at which they are there.
    fn reserve(&self, tokens: u64, now: u64) -> u64 {
        let tokens = tokens - self.take_burst(tokens);
        if tokens == 0 {
            return now;
        }
        let cost = self.refill_time_of(tokens);
        // The only thing shared is the number itself, so no ordering is needed.
        let pay = |full_at: u64| Some(full_at.max(now).saturating_add(cost));
        let before = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay);
        let before = before.unwrap_or_else(|full_at| full_at);
        let full_at = before.max(now).saturating_add(cost);
        // The bucket holds as much as `refill_ticks` bring: so much may be spent ahead of time.
        full_at.saturating_sub(self.refill_ticks).max(now)
    }

    /// Takes up to `tokens` of the one-time burst; how many there were.
    fn take_burst(&self, tokens: u64) -> u64 {
        let mut left = self.burst.load(Ordering::Relaxed);
        while left != 0 {
            let taken = left.min(tokens);
            let swapped = self.burst.compare_exchange_weak(
                left,
                left - taken,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => return taken,
                Err(now_left) => left = now_left,
            }
        }
        0
    }

    /// How long `tokens` take to come in, rounded up.
    fn refill_time_of(&self, tokens: u64) -> u64 {
        let ticks = u128::from(tokens) * u128::from(self.refill_ticks);
        u64::try_from(ticks.div_ceil(u128::from(self.size))).unwrap_or(u64::MAX)
    }
}

/// The limits of one device, or of one direction of it, in force.
#[derive(Debug)]
pub struct RateLimiter {
    start: Instant,
    bandwidth: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    /// No wait shorter than this is worth waking up for, in ns.
    granularity_ns: u64,
}

impl RateLimiter {
    /// Full buckets.
    pub fn new(limit: &RateLimit) -> RateLimiter {
        let buckets = [limit.bandwidth, limit.operations];
        let refill_ns = |bucket: Bucket| bucket.refill_time_ms.saturating_mul(1_000_000);
        let shortest = buckets.into_iter().flatten().map(refill_ns).min();
        RateLimiter {
            start: Instant::now(),
            bandwidth: limit.bandwidth.as_ref().map(TokenBucket::new),
            operations: limit.operations.as_ref().map(TokenBucket::new),
            granularity_ns: (shortest.unwrap_or(0) / 4).min(1_000_000),
        }
    }

    /// Reserves one operation of `bytes` bytes at `now_ns`; the time from which it may go. It
    /// *has* been charged: the caller waits, and does not ask again.
    ///
    /// A request that waits for one bucket has paid the other one already.
    pub fn reserve(&self, bytes: u64, now_ns: u64) -> u64 {
        let now = now_ns << TICKS_PER_NS_SHIFT;
        let after_ops = match &self.operations {
            Some(bucket) => bucket.reserve(1, now),
            None => now,
        };
        let go = match &self.bandwidth {
            Some(bucket) if bytes != 0 => bucket.reserve(bytes, after_ops),
            _ => after_ops,
        };
        go.div_ceil(1 << TICKS_PER_NS_SHIFT)
    }

    /// The limiter's clock: nanoseconds since it was made.
    pub fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests;
