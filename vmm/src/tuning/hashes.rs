//! Keyed hashes of some pages, chosen by what is in them.
//!
//! A page is chosen by a hash of a few of its words, so that a page that is chosen in one guest is chosen in every guest with
//! the same key, wherever it lies, and most pages cost four cache lines and no more. Pages that are zero in those words
//! are read whole, as many a page is zero there and nowhere else. Pages that are not in memory are left as they are:
//! looking at one would bring it there.
//!
//! The key makes the hashes useless to who does not hold it: SipHash is a pseudo-random function.

use std::hash::Hasher;

use berth_vmm_api_types::v1::{MemoryExtent, MemoryRange};
use siphasher::sip::SipHasher24;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::PAGE;
use crate::memory::GuestRam;

/// What is answered in one piece: a huge page.
const EXTENT: u64 = 2 << 20;
/// Where a page is looked at first: 16 bytes at each, in cache lines of their own.
const PROBES: [usize; 4] = [0x108, 0x4d8, 0x9a8, 0xe58];
const PROBE: usize = 16;

type Key = [u8; 16];

/// Why pages could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Which are there.
    #[error("cannot find out which pages are in memory")]
    Present(#[from] std::io::Error),
    /// Guest memory.
    #[error("cannot read guest memory")]
    Read(#[from] GuestMemoryError),
}

/// A key from 32 hexadecimal digits.
pub(super) fn key(text: &str) -> Option<Key> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

/// Hashes of a range that was checked. Extents without a page in memory are left out.
pub(super) fn of(
    ram: &GuestRam,
    range: &MemoryRange,
    key: Key,
    one_of: u32,
) -> Result<Vec<MemoryExtent>, Error> {
    let end = range.start + range.len;
    let mut extents = Vec::new();
    let mut start = range.start;
    while start < end {
        let len = (start / EXTENT + 1) * EXTENT - start;
        let len = len.min(end - start);
        let extent = extent(ram, start, len, (key, one_of))?;
        if extent.present > 0 {
            extents.push(extent);
        }
        start += len;
    }
    Ok(extents)
}

fn extent(
    ram: &GuestRam,
    start: u64,
    len: u64,
    (key, one_of): (Key, u32),
) -> Result<MemoryExtent, Error> {
    let mut extent = MemoryExtent {
        start,
        len,
        ..MemoryExtent::default()
    };
    let present = ram.present(start, len)?;
    for (page, _) in (0..).zip(present).filter(|(_, present)| *present) {
        extent.present += 1;
        extent
            .hashes
            .extend(chosen(ram, start + page * PAGE, key, one_of)?);
    }
    Ok(extent)
}

/// The hash of a page, if it is one of those that are chosen.
fn chosen(ram: &GuestRam, gpa: u64, key: Key, one_of: u32) -> Result<Option<u64>, Error> {
    let memory = ram.memory();
    let mut probes = [0; PROBE * PROBES.len()];
    for (probe, offset) in probes.chunks_mut(PROBE).zip(PROBES) {
        memory.read_slice(probe, GuestAddress(gpa + offset as u64))?;
    }
    let is_one = |hash: u64| hash.is_multiple_of(one_of.into());
    let seems_zero = probes.iter().all(|byte| *byte == 0);
    if !seems_zero && !is_one(hash(key, &probes)) {
        return Ok(None);
    }
    let mut page = [0; PAGE as usize];
    memory.read_slice(&mut page, GuestAddress(gpa))?;
    if page.iter().all(|byte| *byte == 0) {
        // All of them are equal: as many as of others, by where they are.
        return Ok(is_one(gpa / PAGE).then_some(0));
    }
    let whole = hash(key, &page).max(1);
    Ok((!seems_zero || is_one(whole)).then_some(whole))
}

fn hash(key: Key, bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new_with_key(&key);
    hasher.write(bytes);
    hasher.finish()
}
