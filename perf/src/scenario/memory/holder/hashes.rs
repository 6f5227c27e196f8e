//! `PUT vm.memory-sample` as `berth-vmm` answers it: keyed hashes of pages that are chosen by a few of their words, so
//! that what the tuner asks for costs here what it costs there.

use std::hash::Hasher;
use std::io;

use berth_vmm_api_types::v1::{MemoryExtent, MemoryRange};
use siphasher::sip::SipHasher24;

use super::region::{HUGE, Region};
use crate::scenario::memory::dumps::store::PAGE;

/// Words of a page that are looked at first: two at each, in cache lines of their own.
const PROBES: [usize; 4] = [0x108 / 8, 0x4d8 / 8, 0x9a8 / 8, 0xe58 / 8];
const WORDS: usize = PAGE / 8;

/// Hashes of a range that is inside of the memory.
pub(super) fn of(
    region: &Region,
    range: &MemoryRange,
    key: [u8; 16],
    one_of: u32,
) -> io::Result<Vec<MemoryExtent>> {
    let end = range.start + range.len;
    let mut extents = Vec::new();
    let mut start = range.start;
    while start < end {
        let len = ((start / HUGE as u64 + 1) * HUGE as u64).min(end) - start;
        let mut extent = MemoryExtent {
            start,
            len,
            ..MemoryExtent::default()
        };
        let present = region.present(start, len)?;
        for (at, _) in present.iter().enumerate().filter(|(_, there)| **there) {
            extent.present += 1;
            let page = start as usize / PAGE + at;
            extent.hashes.extend(chosen(region, page, key, one_of));
        }
        if extent.present > 0 {
            extents.push(extent);
        }
        start += len;
    }
    Ok(extents)
}

fn chosen(region: &Region, page: usize, key: [u8; 16], one_of: u32) -> Option<u64> {
    let mut probes = [0; 16 * PROBES.len()];
    for (probe, word) in probes.chunks_mut(16).zip(PROBES) {
        region.copy(page * WORDS + word, probe);
    }
    let is_one = |hash: u64| hash.is_multiple_of(one_of.into());
    let seems_zero = probes.iter().all(|byte| *byte == 0);
    if !seems_zero && !is_one(hash(key, &probes)) {
        return None;
    }
    let mut whole = [0; PAGE];
    region.copy(page * WORDS, &mut whole);
    if whole.iter().all(|byte| *byte == 0) {
        return is_one(page as u64).then_some(0);
    }
    let whole = hash(key, &whole).max(1);
    (!seems_zero || is_one(whole)).then_some(whole)
}

fn hash(key: [u8; 16], bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new_with_key(&key);
    hasher.write(bytes);
    hasher.finish()
}
