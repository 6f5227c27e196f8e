//! A little memory of a device's own for each queue, beside its marks in the in-flight region: what
//! a successor must know of what the driver has set, and can learn nowhere else.
//!
//! ```text
//!   part of a queue in the region:  │ header │ marks … │ (room) │ slot 0 │ slot 1 │
//!   slot: { sequence u32, length u32, check u64, bytes }
//! ```
//!
//! The two slots are written in turn, so the last state but one is whole whenever the process is
//! killed; the check tells a slot that is whole from one that is not. A region that another
//! backend made may have no room for slots: nothing is kept then. The bytes are foreign to whoever
//! reads them; so is what they say.
//!
//! Threads: the queue's. Spec: none; vhost-user leaves the region behind the marks to the backend.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::guest_memory::{MemoryError, RawSlice};
use crate::inflight::InflightRegion;

/// Most bytes of a state.
pub const MAX_STATE: usize = SLOT_SIZE - HEADER_SIZE;

/// Bytes of both slots.
pub(crate) const AREA_SIZE: usize = 2 * SLOT_SIZE;

const SLOT_SIZE: usize = 2048;
const HEADER_SIZE: usize = 16;

/// Offsets in a slot.
mod at {
    pub(super) const SEQUENCE: usize = 0;
    pub(super) const LENGTH: usize = 4;
    pub(super) const CHECK: usize = 8;
}

/// The slots of one queue.
#[derive(Debug)]
pub(crate) struct SavedState {
    region: Arc<InflightRegion>,
    area: RawSlice,
}

/// A slot that is whole.
struct Slot {
    sequence: u32,
    bytes: Vec<u8>,
}

impl SavedState {
    /// The slots of `queue`, whose ring has `size` entries, where the region has room for them.
    pub(crate) fn of(region: &Arc<InflightRegion>, queue: u16, size: u16) -> Option<SavedState> {
        Some(SavedState {
            area: region.state_area(queue, size)?,
            region: Arc::clone(region),
        })
    }

    /// What was saved last; nothing where nothing was.
    pub(crate) fn load(&self) -> Result<Vec<u8>, MemoryError> {
        Ok(self.newest()?.map_or_else(Vec::new, |slot| slot.bytes))
    }

    /// Saves this instead, `MAX_STATE` bytes at most.
    pub(crate) fn save(&self, bytes: &[u8]) -> Result<(), MemoryError> {
        let sequence = self
            .newest()?
            .map_or(0, |slot| slot.sequence.wrapping_add(1));
        let area = self.area.bind(&*self.region);
        let slot = area.sub(SLOT_SIZE * (sequence as usize % 2), SLOT_SIZE)?;
        // Not whole from here on.
        slot.store(at::CHECK, 0_u64)?;
        slot.store(at::SEQUENCE, sequence)?;
        slot.store(at::LENGTH, bytes.len() as u32)?;
        slot.write(HEADER_SIZE, bytes)?;
        slot.store(at::CHECK, check(sequence, bytes))
    }

    fn newest(&self) -> Result<Option<Slot>, MemoryError> {
        let slots = [self.slot(0)?, self.slot(1)?];
        let newer = |a: &Slot, b: &Slot| a.sequence.wrapping_sub(b.sequence) < u32::MAX / 2;
        Ok(slots
            .into_iter()
            .flatten()
            .reduce(|a, b| if newer(&a, &b) { a } else { b }))
    }

    fn slot(&self, index: usize) -> Result<Option<Slot>, MemoryError> {
        let area = self.area.bind(&*self.region);
        let slot = area.sub(SLOT_SIZE * index, SLOT_SIZE)?;
        let sequence = slot.load(at::SEQUENCE)?;
        let length = slot.load::<u32>(at::LENGTH)? as usize;
        if length > MAX_STATE {
            return Ok(None);
        }
        let mut bytes = vec![0; length];
        slot.read(HEADER_SIZE, &mut bytes)?;
        let whole = slot.load::<u64>(at::CHECK)? == check(sequence, &bytes);
        Ok(whole.then_some(Slot { sequence, bytes }))
    }
}

/// Never 0 (FNV-1a, with a bit set).
fn check(sequence: u32, bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ u64::from(sequence);
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(mix(start, &1), mix) | 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inflight;

    fn region(queues: u16, entries: u16) -> Arc<InflightRegion> {
        let (file, info) = inflight::allocate(queues, entries).unwrap();
        Arc::new(InflightRegion::map(info, &file).unwrap())
    }

    #[test]
    fn what_was_saved_last_is_what_a_successor_finds() {
        let region = region(3, 256);
        let saved = |queue| SavedState::of(&region, queue, 256).unwrap();
        assert_eq!(saved(2).load().unwrap(), b"");
        for n in 0..5 {
            saved(2).save(&[n; 1000]).unwrap();
            assert_eq!(saved(2).load().unwrap(), [n; 1000]);
        }
        saved(2).save(b"").unwrap();
        assert_eq!(saved(2).load().unwrap(), b"");
        assert_eq!(saved(1).load().unwrap(), b"", "another queue's is its own");
        let long = vec![7; MAX_STATE + 1];
        assert!(saved(2).save(&long).is_err());
    }

    #[test]
    fn a_save_that_was_cut_short_leaves_the_one_before() {
        // Arrange
        let region = region(1, 16);
        let saved = SavedState::of(&region, 0, 16).unwrap();
        saved.save(b"first").unwrap();
        saved.save(b"second").unwrap();
        // Act: the third began, and got as far as this
        let area = saved.area.bind(&*region);
        area.store(at::SEQUENCE, 2_u32).unwrap();
        area.write(HEADER_SIZE, b"thi").unwrap();
        // Assert
        assert_eq!(saved.load().unwrap(), b"second");
        saved.save(b"third").unwrap();
        assert_eq!(saved.load().unwrap(), b"third");
    }

    #[test]
    fn marks_and_state_do_not_overlap() {
        let region = region(2, 64);
        let saved = SavedState::of(&region, 0, 64).unwrap();
        let mut next = inflight::Tracker::new(Arc::clone(&region), 1, 64).unwrap();
        next.recover(5).unwrap();
        next.take(63, 63).unwrap();
        saved.save(&[0xff; MAX_STATE]).unwrap();
        let mut next = inflight::Tracker::new(Arc::clone(&region), 1, 64).unwrap();
        assert_eq!(next.recover(5).unwrap(), Some(vec![63]));
    }
}
