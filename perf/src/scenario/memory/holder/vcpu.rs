//! What a guest does with its memory while nothing special happens, on a thread that sleeps between bursts of work.
//!
//! Every [`PERIOD`] it reads words of its working set at random, writes to pages of its own, and now and then to a page
//! that others have too, as a guest does that uses a page of its cache anew. What a burst takes in CPU time shows the
//! price of lost huge pages and of copies; single accesses are timed for their latency.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::region::Region;
use crate::histogram::Histogram;
use crate::scenario::memory::dumps::store::{FIRST, PAGE};
use crate::sys;

/// Between two bursts of work.
const PERIOD: Duration = Duration::from_millis(10);
/// Reads of a burst.
const READS: u32 = 1200;
/// Writes of a burst to pages of its own.
const WRITES: u32 = 40;
/// Bursts for each write to a page that others have.
const SHARED_WRITE: u64 = 16;
/// One access of so many is timed.
const TIMED: u32 = 8;
/// One page of so many is in the working set.
const HOT: usize = 3;
const WORDS: usize = PAGE / 8;

/// Which page the guest has where, by its number in the set of dumps.
#[derive(Debug)]
pub(super) struct Contents {
    numbers: Vec<AtomicU32>,
    /// By number: whether no other guest ever has it.
    own: Vec<bool>,
}

impl Contents {
    pub(super) fn new(pages: usize, own: Vec<bool>) -> Self {
        Self {
            numbers: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            own,
        }
    }

    pub(super) fn get(&self, page: usize) -> u32 {
        self.numbers[page].load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, page: usize, number: u32) {
        self.numbers[page].store(number, Ordering::Relaxed);
    }

    fn is_own(&self, number: u32) -> bool {
        self.own.get(number as usize).copied().unwrap_or(false)
    }
}

/// What the work took since the last look.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Work {
    /// Bursts.
    pub(crate) bursts: u64,
    /// CPU time of the median burst, in nanoseconds.
    pub(crate) median_ns: u64,
    /// CPU time of all, in nanoseconds.
    pub(crate) cpu_ns: u64,
    /// Latencies of single accesses, in microseconds.
    pub(crate) p50_us: f64,
    /// The same.
    pub(crate) p99_us: f64,
    /// The same.
    pub(crate) p999_us: f64,
}

#[derive(Debug, Default)]
struct Tally {
    bursts: Vec<u64>,
    latencies: Histogram,
}

/// The work and what it took.
#[derive(Debug, Default)]
pub(super) struct Vcpu {
    tally: Mutex<Tally>,
}

impl Vcpu {
    /// Works until the process ends.
    pub(super) fn run(&self, region: &Region, contents: &Contents) {
        let mut random = Random(u64::from(std::process::id()) | 1);
        let mut latencies = Histogram::default();
        let mut count = 0;
        loop {
            let began = Instant::now();
            let before = sys::thread_cpu().unwrap_or_default();
            let did = burst(region, contents, &mut random, &mut latencies, count);
            let took = sys::thread_cpu().unwrap_or_default().saturating_sub(before);
            count += 1;
            if did {
                let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.bursts.push(took.as_nanos() as u64);
                tally.latencies.add(&latencies);
                latencies = Histogram::default();
            }
            std::thread::sleep(PERIOD.saturating_sub(began.elapsed()));
        }
    }

    /// What it took since the last time that this was asked.
    pub(super) fn take(&self) -> Work {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let Tally {
            mut bursts,
            latencies,
        } = std::mem::take(&mut *tally);
        drop(tally);
        bursts.sort_unstable();
        Work {
            bursts: bursts.len() as u64,
            median_ns: bursts.get(bursts.len() / 2).copied().unwrap_or(0),
            cpu_ns: bursts.iter().sum(),
            p50_us: latencies.quantile_us(0.5),
            p99_us: latencies.quantile_us(0.99),
            p999_us: latencies.quantile_us(0.999),
        }
    }
}

/// False before there is memory to work with.
fn burst(
    region: &Region,
    contents: &Contents,
    random: &mut Random,
    latencies: &mut Histogram,
    count: u64,
) -> bool {
    let pages = contents.numbers.len();
    let mut page = |wanted: &dyn Fn(usize, u32) -> bool| {
        // A guest that has hardly begun has few pages.
        (0..64).find_map(|_| {
            let page = random.below(pages);
            let number = contents.get(page);
            let word = page * WORDS + page % WORDS;
            (number >= FIRST && wanted(page, number)).then_some(word)
        })
    };
    let Some(mut last) = page(&|page, _| page % HOT == 0) else {
        return false;
    };
    for turn in 0..READS {
        if let Some(word) = page(&|page, _| page % HOT == 0) {
            last = word;
        }
        timed(turn, latencies, || {
            std::hint::black_box(region.read(last));
        });
    }
    for turn in 0..WRITES {
        if let Some(word) = page(&|page, number| page % HOT == 0 && contents.is_own(number)) {
            timed(turn, latencies, || {
                region.write(word, region.read(word).wrapping_add(1));
            });
        }
    }
    if count.is_multiple_of(SHARED_WRITE)
        && let Some(word) = page(&|_, number| !contents.is_own(number))
    {
        timed(0, latencies, || region.write(word, region.read(word)));
    }
    true
}

fn timed(turn: u32, latencies: &mut Histogram, access: impl FnOnce()) {
    if !turn.is_multiple_of(TIMED) {
        return access();
    }
    let began = Instant::now();
    access();
    latencies.record(began.elapsed());
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_changes_its_own_pages_and_no_others() {
        let region = Region::new(2 << 20).unwrap();
        let contents = Contents::new(512, vec![false, false, false, true]);
        let (mut random, mut latencies) = (Random(5), Histogram::default());
        assert!(!burst(&region, &contents, &mut random, &mut latencies, 0));
        for page in 0..512 {
            contents.set(page, 2 + (page as u32 % 2));
            region.write_page(page, &[1; PAGE]);
        }
        for count in 0..100 {
            assert!(burst(
                &region,
                &contents,
                &mut random,
                &mut latencies,
                count
            ));
        }
        let one = u64::from_ne_bytes([1; 8]);
        let changed = |page: usize| region.read(page * WORDS + page % WORDS) != one;
        assert!((0..512).step_by(2).all(|page| !changed(page)));
        assert!((0..512).any(changed));
        assert!(latencies.count() > 1000);
    }
}
