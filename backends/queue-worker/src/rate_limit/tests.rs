//! Buckets on a clock of the tests' own; the last story waits for a real timer.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::*;
use crate::sys;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

fn limiter(text: &str) -> RateLimiter {
    RateLimiter::new(&text.parse().unwrap())
}

#[test]
fn a_full_bucket_is_spent_at_once_and_then_paid_by_the_clock() {
    let limiter = limiter("ops_size=10,ops_refill_time=1000");
    for _ in 0..10 {
        assert_eq!(limiter.reserve(4096, 0), 0);
    }
    // One every 100 ms from here on, in the order in which they came.
    assert_eq!(limiter.reserve(4096, 0), 100 * MS);
    assert_eq!(limiter.reserve(4096, 0), 200 * MS);
    assert_eq!(limiter.reserve(4096, 50 * MS), 300 * MS);
    // Idle for long: full again, and no fuller.
    let later = 100 * SECOND;
    for _ in 0..10 {
        assert_eq!(limiter.reserve(4096, later), later);
    }
    assert_eq!(limiter.reserve(4096, later), later + 100 * MS);
}

#[test]
fn the_burst_is_spent_first_and_once() {
    let limiter = limiter("bw_size=1000,bw_one_time_burst=5000,bw_refill_time=1000");
    assert_eq!(limiter.reserve(4000, 0), 0);
    // 1000 of the burst and the whole bucket.
    assert_eq!(limiter.reserve(2000, 0), 0);
    assert_eq!(limiter.reserve(1, 0), MS);
    let later = 100 * SECOND;
    assert_eq!(limiter.reserve(1000, later), later);
    assert_eq!(limiter.reserve(1000, later), later + SECOND);
}

#[test]
fn a_request_larger_than_the_bucket_waits_until_it_is_paid() {
    let limiter = limiter("bw_size=1M,bw_refill_time=100");
    assert_eq!(limiter.reserve(4 << 20, 0), 300 * MS);
    assert_eq!(limiter.reserve(1 << 20, 0), 400 * MS);
}

#[test]
fn both_buckets_hold_and_the_slower_one_decides() {
    let limiter = limiter("bw_size=1000,bw_refill_time=1000,ops_size=2,ops_refill_time=1000");
    assert_eq!(limiter.reserve(100, 0), 0);
    assert_eq!(limiter.reserve(900, 0), 0);
    // Operations: at 500 ms; bytes: from then on, 500 of 1000 are there.
    assert_eq!(limiter.reserve(500, 0), 500 * MS);
    assert_eq!(limiter.reserve(1000, 0), 1500 * MS);
    // A flush has no bytes: operations only, which are at 1500 ms by now.
    assert_eq!(limiter.reserve(0, 0), 1500 * MS);
}

#[test]
fn costs_round_up_so_that_a_fast_bucket_is_not_exceeded() {
    // 3 tokens a millisecond does not divide.
    let limiter = limiter("ops_size=3,ops_refill_time=1");
    let mut last = 0;
    for _ in 0..3003 {
        last = limiter.reserve(1, 0);
    }
    assert!((1000 * MS..1000 * MS + 1000).contains(&last), "{last}");
}

#[test]
fn absurd_numbers_saturate() {
    let limiter = limiter("bw_size=1,bw_refill_time=86400000,ops_size=1,ops_refill_time=86400000");
    let far = limiter.reserve(u64::MAX, 0);
    assert!(far > 9 * 365 * 24 * 3600 * 1_000_000_000 / 2);
    assert!(limiter.reserve(u64::MAX, u64::MAX >> 8) >= far);
    let roomy = RateLimiter::new(&RateLimit {
        bandwidth: Some(Bucket {
            size: u64::MAX,
            one_time_burst: u64::MAX,
            refill_time_ms: 1,
        }),
        operations: None,
    });
    assert_eq!(roomy.reserve(u64::MAX, 5), 5);
    assert_eq!(roomy.reserve(u64::MAX, 5), 5);
}

/// Threads that reserve against one limiter, each on a virtual clock that jumps to when it may go.
/// At no time has more gone than the budget of that time.
#[test]
fn threads_together_never_exceed_the_budget_of_any_moment() {
    const THREADS: u64 = 4;
    const EACH: u64 = 5000;
    let limiter = limiter("bw_size=64K,bw_one_time_burst=100000,bw_refill_time=10");
    let mut gone: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let limiter = &limiter;
        let reserve_all = move |thread: u64| {
            let mut now = 0;
            let one = |n: u64| {
                let bytes = 512 + (n * 7919 + thread * 104_729) % 8192;
                now = limiter.reserve(bytes, now);
                (now, bytes)
            };
            (0..EACH).map(one).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || reserve_all(thread)))
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    gone.sort_unstable();
    assert_eq!(gone.len() as u64, THREADS * EACH);
    let mut total = 0;
    for (now, bytes) in &gone {
        total += bytes;
        let budget = 100_000 + 65_536 + 65_536 * u128::from(*now) / u128::from(10 * MS);
        assert!(u128::from(total) <= budget, "{total} at {now} ns");
    }
    // And not much less: the last one went when it was paid for.
    let (end, _) = gone[gone.len() - 1];
    let paid = u128::from(total - 165_536) * u128::from(10 * MS) / 65_536;
    let slack = u128::from(THREADS * EACH);
    assert!(u128::from(end) <= paid + slack, "{end} against {paid}");
}

#[test]
fn the_timer_wakes_what_waits_and_it_goes() {
    let limiter = Arc::new(limiter("ops_size=1,ops_refill_time=20"));
    let mut throttle = Throttle::new(Arc::clone(&limiter)).unwrap();
    // The first goes at once; on a slow machine the bucket may be full again for some more.
    while throttle.charge(512).unwrap() {
        assert!(!throttle.is_waiting());
    }
    while !throttle.release().unwrap() {
        assert!(throttle.is_waiting());
        let mut slots = [sys::poll_slot(throttle.timer.as_raw_fd(), libc::POLLIN)];
        sys::poll(&mut slots, 20_000).unwrap();
        assert_ne!(slots[0].revents, 0, "the timer did not fire");
    }
    assert!(!throttle.is_waiting());
    assert!(throttle.release().unwrap(), "nothing waits");
}
