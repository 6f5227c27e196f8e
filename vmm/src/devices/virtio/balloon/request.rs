//! What the guest writes into buffers, read. Pure.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::PAGE;
use super::state::Stats;

/// Bytes of a statistic: a 16-bit tag and a 64-bit value, packed (virtio 1.2, 5.5.6.3).
pub(super) const STAT_LEN: usize = 10;

/// Guest physical ranges of pages: sorted, merged, each page once.
pub(super) fn ranges(pfns: &mut [u32]) -> Vec<Range<u64>> {
    pfns.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for pfn in pfns {
        let start = u64::from(*pfn) * PAGE;
        match ranges.last_mut() {
            Some(last) if start <= last.end => last.end = start + PAGE,
            _ => ranges.push(start..start + PAGE),
        }
    }
    ranges
}

/// Page frame numbers of a buffer; bytes after the last whole one are none.
pub(super) fn pfns(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let (numbers, _) = bytes.as_chunks();
    numbers.iter().copied().map(u32::from_le_bytes)
}

/// Statistics of a buffer; tags that are not known are left out, and of two with one tag the last counts.
pub(super) fn stats(bytes: &[u8]) -> Stats {
    let mut stats = Stats::default();
    let (records, _) = bytes.as_chunks::<STAT_LEN>();
    for [t0, t1, value @ ..] in records {
        stats.set(u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(*value));
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_any_order_become_few_ranges() {
        let mut numbers = [7, 3, 5, 4, 4, 1_000_000];
        let expected = [0x3000..0x6000, 0x7000..0x8000, 0xf424_0000..0xf424_1000];
        assert_eq!(ranges(&mut numbers), expected);
        assert_eq!(ranges(&mut []), []);
        let last = u64::from(u32::MAX) * PAGE;
        let end = last + PAGE;
        assert_eq!(ranges(&mut [u32::MAX]).first(), Some(&(last..end)));
    }

    #[test]
    fn half_a_number_is_none() {
        let bytes = [1, 0, 0, 0, 2, 1, 0, 0, 3];
        assert_eq!(pfns(&bytes).collect::<Vec<_>>(), [1, 0x102]);
    }

    #[test]
    fn statistics_are_told_by_their_tags() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 7u64), (0xbeef, 1), (15, 9), (4, 8)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([0; 9]);
        let named: Vec<_> = stats(&bytes).named().collect();
        assert_eq!(named, [("free_memory", 8), ("direct_reclaim", 9)]);
    }
}
