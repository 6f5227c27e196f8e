//! From ranges that the guest gives to pages that the host can take. Pure.
//!
//! ```text
//!  guest's pages of 4 KiB   ■■■■■□■■│■■■■■■■■│■■□□□□□□
//!  host's pages             kept    │given   │kept, until the guest gives the rest
//! ```
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::PAGE;

/// The parts of a range that are RAM.
pub(super) fn in_ram(memory: &GuestMemoryMmap, range: &Range<u64>) -> Vec<Range<u64>> {
    let parts = memory.iter().filter_map(|region| {
        let start = region.start_addr().raw_value();
        let part = start.max(range.start)..start.saturating_add(region.len()).min(range.end);
        (part.start < part.end).then_some(part)
    });
    parts.collect()
}

/// The whole pages of `granule` bytes in a range; perhaps none.
pub(super) fn whole(range: &Range<u64>, granule: u64) -> Option<Range<u64>> {
    let start = range.start.checked_next_multiple_of(granule)?;
    let end = range.end - range.end % granule;
    (start < end).then_some(start..end)
}

/// Huge pages of which the guest has given something: a bit for each of their small ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blocks(BTreeMap<u64, Vec<u64>>);

impl Blocks {
    /// The guest gave a range of RAM: adds the huge pages of which it has now given all to `whole`.
    pub(super) fn fill(&mut self, range: &Range<u64>, granule: u64, whole: &mut Vec<Range<u64>>) {
        for (block, pages) in parts(range, granule) {
            let bits = self.0.entry(block).or_default();
            bits.resize((granule / PAGE).div_ceil(64) as usize, 0);
            for page in pages {
                bits[(page / 64) as usize] |= 1 << (page % 64);
            }
            let given: u64 = bits.iter().map(|bits| u64::from(bits.count_ones())).sum();
            if given == granule / PAGE {
                push(whole, block * granule..(block + 1) * granule);
            }
        }
    }

    /// The guest took a range back.
    pub(super) fn clear(&mut self, range: &Range<u64>, granule: u64) {
        for (block, pages) in parts(range, granule) {
            let Some(bits) = self.0.get_mut(&block) else {
                continue;
            };
            for page in pages {
                bits[(page / 64) as usize] &= !(1 << (page % 64));
            }
            if bits.iter().all(|bits| *bits == 0) {
                self.0.remove(&block);
            }
        }
    }
}

/// Adds a range that follows the last one, or begins another.
fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Numbers of the huge pages that a range touches, and of the small ones in each.
fn parts(range: &Range<u64>, granule: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    let range = range.clone();
    let blocks = range.start / granule..range.end.div_ceil(granule);
    blocks.map(move |block| {
        let base = block * granule;
        let start = range.start.max(base) - base;
        let end = range.end.min(base + granule) - base;
        (block, start / PAGE..end.div_ceil(PAGE))
    })
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    const HUGE: u64 = 2 << 20;

    #[test]
    fn holes_between_ram_are_left_out() {
        let ram = [(GuestAddress(0), 0x4000), (GuestAddress(0x1_0000), 0x4000)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ram).unwrap();
        let ram = |range| in_ram(&memory, &range);
        assert_eq!(ram(0x2000..0x1_2000), [0x2000..0x4000, 0x1_0000..0x1_2000]);
        assert_eq!(ram(0x4000..0x1_0000), []);
        assert_eq!(ram(0x1_3000..u64::MAX), [0x1_3000..0x1_4000]);
    }

    #[test]
    fn what_is_not_whole_is_kept() {
        assert_eq!(whole(&(0x1000..0x3000), PAGE), Some(0x1000..0x3000));
        assert_eq!(whole(&(0x1001..0x3fff), PAGE), Some(0x2000..0x3000));
        assert_eq!(whole(&(0x1000..HUGE), HUGE), None);
        assert_eq!(whole(&(1..3 * HUGE + 1), HUGE), Some(HUGE..3 * HUGE));
        assert_eq!(whole(&(u64::MAX - 1..u64::MAX), HUGE), None);
    }

    #[test]
    fn a_huge_page_is_given_when_its_last_small_one_is() {
        let mut blocks = Blocks::default();
        let mut fill = |range: Range<u64>| {
            let mut whole = Vec::new();
            blocks.fill(&range, HUGE, &mut whole);
            whole
        };
        assert_eq!(fill(PAGE..HUGE), []);
        assert_eq!(fill(HUGE..HUGE + PAGE), []);
        assert_eq!(fill(0..PAGE), [0..HUGE]);
        assert_eq!(fill(HUGE + PAGE..3 * HUGE), [HUGE..3 * HUGE]);
        blocks.clear(&(0..PAGE), HUGE);
        let mut whole = Vec::new();
        blocks.fill(&(PAGE..2 * PAGE), HUGE, &mut whole);
        assert_eq!(whole, []);
        blocks.fill(&(0..PAGE), HUGE, &mut whole);
        assert_eq!(whole, [0..HUGE]);
        blocks.clear(&(0..4 * HUGE), HUGE);
        assert_eq!(blocks, Blocks::default());
    }
}
