//! Which memory has equals, from keyed hashes that the VMMs make: pure.
//!
//! Pages are chosen by their content, one of [`ONE_OF`], so that a page that is chosen in one guest is chosen in all,
//! wherever it lies. What is counted is pages with another copy in the same domain, so a run's
//! `equal / sampled` estimates how much of it would merge.

use std::collections::{BTreeMap, HashMap};

use berth_vmm_api_types::v1::{MemoryExtent, MemoryRange};

use crate::sample::Run;

/// One page of so many is hashed: of 512 in a huge page, 16.
pub const ONE_OF: u32 = 32;
/// Least size of a run: a huge page.
const HUGE: u64 = 2 << 20;
/// Runs of a guest at most, as each may be a mapping of its own in the VMM (`vm.max_map_count`).
const MOST_RUNS: u64 = 2048;

/// Hashes of the VMs of one domain.
#[derive(Debug, Default)]
pub struct Index {
    vms: BTreeMap<String, Pages>,
}

/// Pages of a VM.
#[derive(Debug, Default)]
pub struct Pages {
    /// Hashes of those that were chosen.
    pub extents: Vec<MemoryExtent>,
    /// Memory that is offered for merging already.
    pub offered: Vec<MemoryRange>,
}

impl Index {
    /// What is known of a VM from now on.
    pub fn put(&mut self, vm: &str, pages: Pages) {
        self.vms.insert(vm.to_owned(), pages);
    }

    /// Forgets VMs that are not there any more.
    pub fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.vms.retain(|name, _| is_there(name));
    }

    /// The runs of each VM that are not offered yet, with how many of their pages have equals anywhere in the domain.
    pub fn runs(&self) -> BTreeMap<String, Vec<Run>> {
        let mut copies: HashMap<u64, u32> = HashMap::new();
        for hash in self
            .vms
            .values()
            .flat_map(|of| &of.extents)
            .flat_map(|extent| &extent.hashes)
        {
            *copies.entry(*hash).or_default() += 1;
        }
        self.vms
            .iter()
            .map(|(name, pages)| (name.clone(), runs(pages, &copies)))
            .collect()
    }
}

fn runs(pages: &Pages, copies: &HashMap<u64, u32>) -> Vec<Run> {
    let bytes: u64 = pages.extents.iter().map(|extent| extent.len).sum();
    let granule = (bytes / MOST_RUNS).max(HUGE).next_power_of_two();
    let mut runs: Vec<Run> = Vec::new();
    let is_offered = |extent: &MemoryExtent| {
        let end = extent.start + extent.len;
        let mut offered = pages.offered.iter();
        offered.any(|range| range.start < end && extent.start < range.start + range.len)
    };
    for extent in pages.extents.iter().filter(|extent| !is_offered(extent)) {
        let sampled = extent.hashes.len() as u32;
        // A page of zeros has the zero page for an equal.
        let has_equal =
            |hash: &&u64| **hash == 0 || copies.get(hash).is_some_and(|count| *count > 1);
        let equal = extent.hashes.iter().filter(has_equal).count() as u32;
        match runs.last_mut() {
            Some(run)
                if run.start / granule == extent.start / granule
                    && run.start + run.len == extent.start =>
            {
                run.len += extent.len;
                run.sampled += sampled;
                run.equal += equal;
            }
            _ => runs.push(Run {
                start: extent.start,
                len: extent.len,
                sampled,
                equal,
            }),
        }
    }
    runs
}

/// The ranges of `all` without those of `out`, in pieces of at most `most` bytes.
pub fn without(all: &[MemoryRange], out: &[MemoryRange], most: u64) -> Vec<MemoryRange> {
    let mut left: Vec<MemoryRange> = all.to_vec();
    for gone in out {
        let gone_end = gone.start.saturating_add(gone.len);
        left = left
            .into_iter()
            .flat_map(|range| {
                let end = range.start.saturating_add(range.len);
                let before = (range.start, gone.start.min(end));
                let after = (gone_end.max(range.start), end);
                [before, after]
            })
            .filter(|(start, end)| start < end)
            .map(|(start, end)| MemoryRange {
                start,
                len: end - start,
            })
            .collect();
    }
    let mut pieces = Vec::new();
    for range in left {
        let mut at = 0;
        while at < range.len {
            let len = most.min(range.len - at);
            pieces.push(MemoryRange {
                start: range.start + at,
                len,
            });
            at += len;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, hashes: &[u64]) -> MemoryExtent {
        MemoryExtent {
            start,
            len: HUGE,
            present: 512,
            hashes: hashes.to_vec(),
        }
    }

    fn pages(extents: Vec<MemoryExtent>) -> Pages {
        Pages {
            extents,
            offered: Vec::new(),
        }
    }

    #[test]
    fn memory_that_is_offered_is_compared_with_and_not_offered_again() {
        let mut index = Index::default();
        let mut offered = pages(vec![extent(0, &[1, 2])]);
        offered.offered = vec![MemoryRange {
            start: 0,
            len: HUGE,
        }];
        index.put("a", offered);
        index.put("b", pages(vec![extent(0, &[1, 5])]));
        let runs = index.runs();
        assert_eq!(runs["a"], []);
        assert_eq!((runs["b"][0].equal, runs["b"][0].sampled), (1, 2));
    }

    #[test]
    fn pages_are_equal_across_vms_and_within_one_and_to_zeros() {
        let mut index = Index::default();
        index.put(
            "a",
            pages(vec![extent(0, &[1, 2, 3, 3]), extent(HUGE, &[7, 8])]),
        );
        index.put("b", pages(vec![extent(HUGE, &[2, 0, 9])]));
        let runs = index.runs();
        let counts = |name: &str| -> Vec<(u32, u32)> {
            runs[name]
                .iter()
                .map(|run| (run.equal, run.sampled))
                .collect()
        };
        assert_eq!(counts("a"), [(3, 4), (0, 2)]);
        assert_eq!(counts("b"), [(2, 3)]);
        index.keep(|name| name == "a");
        assert_eq!(index.runs()["a"][0].equal, 2);
    }

    #[test]
    fn a_large_guest_has_larger_runs() {
        let extents: Vec<_> = (0..8192).map(|at| extent(at * HUGE, &[at])).collect();
        let mut index = Index::default();
        index.put("a", pages(extents));
        let runs = &index.runs()["a"];
        assert_eq!(runs.len(), 2048);
        assert!(
            runs.iter()
                .all(|run| run.len == 4 * HUGE && run.sampled == 4)
        );
    }

    #[test]
    fn ranges_are_subtracted_and_cut() {
        let range = |start, len| MemoryRange { start, len };
        assert_eq!(
            without(&[range(0, 10)], &[], 4),
            [range(0, 4), range(4, 4), range(8, 2)]
        );
        assert_eq!(
            without(
                &[range(0, 10), range(20, 5)],
                &[range(2, 3), range(20, 9)],
                100
            ),
            [range(0, 2), range(5, 5)]
        );
        assert_eq!(without(&[range(5, 5)], &[range(0, 100)], 100), []);
    }
}
