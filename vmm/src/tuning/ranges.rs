//! A set of addresses, as ranges that do not touch.

use std::collections::BTreeMap;

use berth_vmm_api_types::v1::MemoryRange;

/// First address and end of each range.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub(super) fn iter(&self) -> impl Iterator<Item = MemoryRange> + '_ {
        self.0.iter().map(|(start, end)| MemoryRange {
            start: *start,
            len: end - start,
        })
    }

    pub(super) fn add(&mut self, start: u64, len: u64) {
        let (mut first, mut last) = (start, start.saturating_add(len));
        // Those that touch it become part of it.
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=last)
            .filter(|(_, end)| **end >= first)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touching {
            self.0.remove(&start);
            first = first.min(start);
            last = last.max(end);
        }
        self.0.insert(first, last);
    }

    pub(super) fn remove(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let hit: Vec<(u64, u64)> = self
            .0
            .range(..end)
            .filter(|(_, of)| **of > start)
            .map(|(first, of)| (*first, *of))
            .collect();
        for (first, of) in hit {
            self.0.remove(&first);
            if first < start {
                self.0.insert(first, start);
            }
            if of > end {
                self.0.insert(end, of);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(ranges: &Ranges) -> Vec<(u64, u64)> {
        ranges
            .iter()
            .map(|range| (range.start, range.len))
            .collect()
    }

    #[test]
    fn what_touches_is_one_and_what_is_taken_out_leaves_both_sides() {
        let mut ranges = Ranges::default();
        ranges.add(10, 10);
        ranges.add(30, 10);
        assert_eq!(pairs(&ranges), [(10, 10), (30, 10)]);
        ranges.add(20, 10);
        assert_eq!(pairs(&ranges), [(10, 30)]);
        ranges.add(12, 2);
        assert_eq!(pairs(&ranges), [(10, 30)]);
        ranges.remove(15, 5);
        assert_eq!(pairs(&ranges), [(10, 5), (20, 20)]);
        ranges.remove(0, 100);
        assert_eq!(pairs(&ranges), []);
    }

    #[test]
    fn it_is_the_set_that_a_bitmap_is() {
        let mut number = 1u64;
        let mut next = |below: u64| {
            number = number
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (number >> 33) % below
        };
        let mut ranges = Ranges::default();
        let mut bits = [false; 64];
        for _ in 0..5000 {
            let (start, adds) = (next(60), next(2) == 0);
            let len = 1 + next(64 - start);
            match adds {
                true => ranges.add(start, len),
                false => ranges.remove(start, len),
            }
            bits[start as usize..(start + len) as usize].fill(adds);
            let mut same = [false; 64];
            for (start, len) in pairs(&ranges) {
                same[start as usize..(start + len) as usize].fill(true);
            }
            assert_eq!(bits, same);
        }
    }
}
