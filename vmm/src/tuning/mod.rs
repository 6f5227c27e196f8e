//! What a tuner may do with this guest's memory: have it merged, and learn keyed hashes of its pages.
//!
//! ```text
//!   PUT vm.memory-advice ─┐                         ┌─▶ madvise(MADV_MERGEABLE …) in this process, which owns the memory
//!   PUT vm.memory-sample ─┼─▶ Tuning: the domain? ──┤
//!   GET vm.memory-sample ─┘           the range?    └─▶ SipHash of pages chosen by content
//! ```
//!
//! `--memory mergeable=on` makes memory eligible and has nothing merged. A request must name the VM's own trust domain
//! (`--platform trust_domain=`), so that a tuner of another domain, or one that knows of none, is refused. Why: docs/threat-model.md.
//!
//! Threads: `advice` serves, one thread for each request and a few at a time; the lock of `offered` is held while the kernel is
//! told, so that the list says what was done. The memory stays mapped for as long as a request needs it. Linux:
//! admin-guide/mm/ksm.rst, madvise(2).
#![forbid(unsafe_code)]

mod hashes;
mod ranges;

use std::sync::{Arc, Mutex, PoisonError};

use berth_vmm_api_types::v1 as wire;

use self::ranges::Ranges;
use crate::config::Mergeable;
use crate::memory::{Advice, GuestRam};

/// A page.
const PAGE: u64 = 4096;
/// Most bytes that are hashed at a time.
const MOST_HASHED: u64 = 1 << 30;
/// Most requests that are served at a time, each by a thread.
const MOST_AT_A_TIME: usize = 8;
/// Least pages of which one is chosen, at most.
const MOST_OF: u32 = 4096;

/// Why a tuner gets nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody may.
    #[error(
        "this VM names no trust domain (--platform trust_domain=), so nobody may tune its memory"
    )]
    NoDomain,
    /// Not this one.
    #[error("this VM is not of trust domain {0:?}")]
    OtherDomain(String),
    /// None of its memory.
    #[error("no memory of this VM can be merged (--memory mergeable=on makes it so)")]
    NotMergeable,
    /// Not this memory.
    #[error("{len:#x} bytes at {start:#x} are not whole pages of memory that can be merged")]
    Range {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// More than is done at a time.
    #[error("{len:#x} bytes at {start:#x} are more than 1 GiB, the most that is hashed at a time")]
    TooMuch {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// The key.
    #[error("key is not 32 hexadecimal digits")]
    Key,
    /// How many pages.
    #[error("one_of={0} is not from 1 to 4096")]
    OneOf(u32),
    /// Too many requests.
    #[error("{MOST_AT_A_TIME} requests of tuners are under way")]
    Busy,
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// What is wanted.
#[derive(Debug, Clone)]
pub enum Request {
    /// To know what there is.
    Look,
    /// The kernel to be told.
    Advise(wire::MemoryAdvice),
    /// Hashes.
    Hash(wire::MemorySample),
}

/// What comes of it.
#[derive(Debug)]
pub enum Outcome {
    /// What there is.
    Seen(wire::MemoryMergeable),
    /// It is done.
    Advised,
    /// Hashes.
    Hashed(wire::MemoryHashes),
}

/// The memory of one boot, as a tuner sees it.
#[derive(Debug)]
pub struct Tuning {
    ram: GuestRam,
    domain: Option<String>,
    offered: Mutex<Ranges>,
}

impl Tuning {
    /// Memory as it was just made.
    pub fn new(ram: &GuestRam, domain: Option<String>, mergeable: Mergeable) -> Self {
        let mut offered = Ranges::default();
        if mergeable == Mergeable::Always {
            for range in ram.mergeable_ranges() {
                offered.add(range.gpa, range.len);
            }
        }
        Self {
            ram: ram.clone(),
            domain,
            offered: Mutex::new(offered),
        }
    }

    /// For one more request, unless there are too many: a client that hangs up leaves what it asked for behind.
    pub fn one_more(self: &Arc<Self>) -> Result<Arc<Self>, Refusal> {
        // One is the machine's.
        match Arc::strong_count(self) <= MOST_AT_A_TIME {
            true => Ok(Arc::clone(self)),
            false => Err(Refusal::Busy),
        }
    }

    /// Does what is wanted. All of it may take long: also to look, while the kernel is told something.
    pub fn serve(&self, request: &Request) -> Result<Outcome, Refusal> {
        match request {
            Request::Look => Ok(Outcome::Seen(self.look())),
            Request::Advise(advice) => self.advise(advice).map(|()| Outcome::Advised),
            Request::Hash(sample) => self.hash(sample).map(Outcome::Hashed),
        }
    }

    fn look(&self) -> wire::MemoryMergeable {
        let offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        wire::MemoryMergeable {
            trust_domain: self.domain.clone(),
            mergeable: self.mergeable(),
            offered: offered.iter().collect(),
        }
    }

    fn mergeable(&self) -> Vec<wire::MemoryRange> {
        let ranges = self.ram.mergeable_ranges();
        ranges
            .map(|range| wire::MemoryRange {
                start: range.gpa,
                len: range.len,
            })
            .collect()
    }

    fn check_domain(&self, named: &str) -> Result<(), Refusal> {
        match &self.domain {
            None => Err(Refusal::NoDomain),
            Some(domain) if domain != named => Err(Refusal::OtherDomain(named.to_owned())),
            Some(_) => Ok(()),
        }
    }

    /// All ranges are looked at before the first is advised, so that a request that is wrong changes nothing.
    fn advise(&self, wanted: &wire::MemoryAdvice) -> Result<(), Refusal> {
        self.check_domain(&wanted.trust_domain)?;
        let all = self.mergeable();
        if all.is_empty() {
            return Err(Refusal::NotMergeable);
        }
        let ranges = match wanted.ranges.is_empty() {
            true => &all,
            false => &wanted.ranges,
        };
        for range in ranges {
            check_range(range, &all)?;
        }
        let advice = match wanted.advice {
            wire::Advice::Mergeable => Advice::Mergeable,
            wire::Advice::Unmergeable => Advice::Unmergeable,
            wire::Advice::Thp => Advice::Thp,
            wire::Advice::NoThp => Advice::NoThp,
        };
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        for range in ranges {
            let told = self.ram.advise(range.start, range.len, advice);
            told.map_err(|error| failed(&error))?;
            match advice {
                Advice::Mergeable => offered.add(range.start, range.len),
                Advice::Unmergeable => offered.remove(range.start, range.len),
                Advice::Thp | Advice::NoThp => {}
            }
        }
        tracing::debug!(?advice, ranges = ranges.len(), "memory was advised");
        Ok(())
    }

    fn hash(&self, wanted: &wire::MemorySample) -> Result<wire::MemoryHashes, Refusal> {
        self.check_domain(&wanted.trust_domain)?;
        let key = hashes::key(&wanted.key).ok_or(Refusal::Key)?;
        if !(1..=MOST_OF).contains(&wanted.one_of) {
            return Err(Refusal::OneOf(wanted.one_of));
        }
        let all = self.mergeable();
        if all.is_empty() {
            return Err(Refusal::NotMergeable);
        }
        let range = &wanted.range;
        check_range(range, &all)?;
        if range.len > MOST_HASHED {
            let (start, len) = (range.start, range.len);
            return Err(Refusal::TooMuch { start, len });
        }
        let extents = hashes::of(&self.ram, range, key, wanted.one_of);
        Ok(wire::MemoryHashes {
            extents: extents.map_err(|error| failed(&error))?,
        })
    }
}

fn check_range(range: &wire::MemoryRange, all: &[wire::MemoryRange]) -> Result<(), Refusal> {
    let (start, len) = (range.start, range.len);
    let pages = len > 0 && start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
    let inside = |of: &wire::MemoryRange| {
        let end = start.checked_add(len);
        of.start <= start && end.is_some_and(|end| end <= of.start + of.len)
    };
    match pages && all.iter().any(inside) {
        true => Ok(()),
        false => Err(Refusal::Range { start, len }),
    }
}

fn failed(error: &dyn std::error::Error) -> Refusal {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Refusal::Failed(text)
}

#[cfg(test)]
mod tests;
