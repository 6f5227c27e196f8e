//! Guest memory as registered buffers of a ring: pinned and mapped once, not for each transfer.
//!
//! ```text
//!   region ──▶ pieces of at most 1 GiB, a slot of the ring's table each
//!   guest memory grew: the new pieces are added     drained: everything is let go
//! ```
//!
//! A registered buffer is the pages that were there when it was registered. What the guest or the
//! frontend discards afterwards lives on in the table, and transfers go to the dead page: silent
//! corruption, so this is only for guests that never discard (`--fixed-buffers`).
//!
//! Invariant: an entry's address range is mapped by the region that it was made from. Regions that
//! a table of memory still holds keep their addresses, and before one is taken away the queue is
//! drained, which clears this. On the queue's thread. Spec: io_uring_register(2),
//! IORING_REGISTER_BUFFERS2, IORING_REGISTER_BUFFERS_UPDATE.
#![expect(unsafe_code, reason = "registers memory by address")]

use std::io;

use berth_queue_worker::GuestMemory;
use io_uring::Submitter;

/// Most that one buffer may have.
const MAX_LEN: usize = 1 << 30;
/// Slots of the table; what does not fit goes the ordinary way.
const SLOTS: u32 = 1024;

/// IORING_REGISTER_BUFFERS2 and IORING_REGISTER_BUFFERS_UPDATE: what the ring must allow.
pub(super) const REGISTER_OPS: [u8; 2] = [15, 16];

/// What is registered with one ring.
#[derive(Debug, Default)]
pub(super) struct FixedBuffers {
    /// By address; disjoint.
    entries: Vec<Entry>,
    /// The ring has a table.
    table: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    addr: usize,
    len: usize,
    slot: u16,
}

impl FixedBuffers {
    /// Registers what of `memory` is not yet. After an error, part of it is.
    pub(super) fn add(&mut self, ring: &Submitter, memory: &GuestMemory) -> io::Result<()> {
        if !self.table {
            ring.register_buffers_sparse(SLOTS)?;
            self.table = true;
        }
        for region in memory.regions() {
            let slice = region.as_slice();
            for (addr, len) in split(slice.host_addr(), slice.len()) {
                self.add_piece(ring, addr, len)?;
            }
        }
        Ok(())
    }

    fn add_piece(&mut self, ring: &Submitter, addr: usize, len: usize) -> io::Result<()> {
        let at = self.entries.partition_point(|entry| entry.addr < addr);
        if self.entries.get(at).is_some_and(|entry| entry.addr == addr) {
            return Ok(());
        }
        // Slots are given back all at once, so as many as there are entries are taken.
        let slot = self.entries.len() as u32;
        if slot >= SLOTS {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let piece = libc::iovec {
            iov_base: addr as *mut _,
            iov_len: len,
        };
        // SAFETY: the range is mapped by a region of guest memory. The kernel holds its pages, not
        // its addresses, so that nothing goes wrong for it when the region is unmapped.
        unsafe { ring.register_buffers_update(slot, &[piece], None) }?;
        // Below SLOTS.
        let slot = slot as u16;
        self.entries.insert(at, Entry { addr, len, slot });
        Ok(())
    }

    /// Lets go of everything; no transfer is in flight.
    pub(super) fn clear(&mut self, ring: &Submitter) -> io::Result<()> {
        self.entries.clear();
        if std::mem::take(&mut self.table) {
            ring.unregister_buffers()?;
        }
        Ok(())
    }

    /// The slot of the buffer that holds all of `part`.
    pub(super) fn slot_of(&self, part: &libc::iovec) -> Option<u16> {
        let addr = part.iov_base as usize;
        let after = self.entries.partition_point(|entry| entry.addr <= addr);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let offset = addr - entry.addr;
        (offset <= entry.len && part.iov_len <= entry.len - offset).then_some(entry.slot)
    }
}

/// Cuts a range into pieces that can be registered.
fn split(addr: usize, len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len)
        .step_by(MAX_LEN)
        .map(move |at| (addr + at, (len - at).min(MAX_LEN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovec(addr: usize, len: usize) -> libc::iovec {
        libc::iovec {
            iov_base: addr as *mut _,
            iov_len: len,
        }
    }

    #[test]
    fn a_region_above_the_limit_is_several_buffers() {
        let pieces: Vec<_> = split(0x1000, (2 << 30) + 5).collect();
        let expected = [
            (0x1000, 1 << 30),
            (0x1000 + (1 << 30), 1 << 30),
            (0x1000 + (2 << 30), 5),
        ];
        assert_eq!(pieces, expected);
        assert_eq!(split(0x1000, 1 << 30).count(), 1);
    }

    #[test]
    fn only_what_lies_in_one_buffer_has_a_slot() {
        let buffers = FixedBuffers {
            entries: vec![
                Entry {
                    addr: 0x1000,
                    len: 0x1000,
                    slot: 1,
                },
                Entry {
                    addr: 0x2000,
                    len: 0x1000,
                    slot: 0,
                },
            ],
            table: true,
        };
        let slot = |addr, len| buffers.slot_of(&iovec(addr, len));
        assert_eq!(slot(0x1000, 0x1000), Some(1));
        assert_eq!(slot(0x1fff, 1), Some(1));
        assert_eq!(slot(0x2000, 1), Some(0));
        assert_eq!(slot(0x2001, 0xfff), Some(0));
        for (addr, len) in [
            (0xfff, 1),
            (0x1fff, 2),
            (0x1000, 0x1001),
            (0x2001, 0x1000),
            (0x3001, 1),
            (0x1800, usize::MAX),
        ] {
            assert_eq!(slot(addr, len), None, "{addr:#x}+{len:#x}");
        }
    }
}
