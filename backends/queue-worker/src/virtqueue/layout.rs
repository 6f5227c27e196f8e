//! Where the three parts of a split ring are. Spec: virtio 1.3, 2.7.

use super::DESC_SIZE;
use crate::guest_memory::{GuestMemory, MemoryError, RawSlice};

/// Where the frontend placed a ring, as in SET_VRING_ADDR, and how large it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of entries, a power of two.
    pub size: u16,
    /// Frontend address of the descriptor table.
    pub desc_uva: u64,
    /// Frontend address of the available ring.
    pub avail_uva: u64,
    /// Frontend address of the used ring.
    pub used_uva: u64,
}

/// The three parts of a ring, translated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    pub(super) desc: RawSlice,
    pub(super) avail: RawSlice,
    pub(super) used: RawSlice,
}

impl Parts {
    pub(super) fn translate(
        layout: &RingLayout,
        memory: &GuestMemory,
    ) -> Result<Parts, MemoryError> {
        let size = usize::from(layout.size);
        let part = |uva: u64, len: usize, align: usize| {
            let slice = memory.slice_uva(uva, len)?;
            if !slice.host_addr().is_multiple_of(align) {
                return Err(MemoryError::Misaligned { offset: 0 });
            }
            Ok(slice.raw())
        };
        Ok(Parts {
            desc: part(layout.desc_uva, DESC_SIZE * size, 8)?,
            // flags, idx, ring[size], used_event
            avail: part(layout.avail_uva, 6 + 2 * size, 2)?,
            // flags, idx, ring[size] of 8 bytes, avail_event
            used: part(layout.used_uva, 6 + 8 * size, 4)?,
        })
    }
}
