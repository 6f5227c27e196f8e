//! The backend's side of a shadow queue, in a few lines, for tests and the fuzz target.
#![allow(
    clippy::unwrap_used,
    reason = "the bounce memory is there, whatever the guest does"
)]

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ring::{DESC, Desc, INDIRECT, Layout, NEXT};

pub(super) struct Backend {
    pub(super) memory: GuestMemoryMmap,
    at: Layout,
    next_avail: u16,
    used: u16,
}

impl Backend {
    pub(super) fn new(memory: GuestMemoryMmap, at: Layout) -> Self {
        Self {
            memory,
            at,
            next_avail: 0,
            used: 0,
        }
    }

    fn load(&self, at: u64) -> u16 {
        self.memory
            .load(GuestAddress(at), Ordering::Acquire)
            .unwrap()
    }

    /// The next request: its id and its buffers.
    pub(super) fn take(&mut self) -> Option<(u16, Vec<Desc>)> {
        if self.load(self.at.avail + 2) == self.next_avail {
            return None;
        }
        let slot = u64::from(self.next_avail % self.at.size);
        self.next_avail = self.next_avail.wrapping_add(1);
        let head = self.load(self.at.avail + 4 + 2 * slot);
        let mut buffers = Vec::new();
        let mut index = head;
        loop {
            let desc = Desc::read(&self.memory, self.at.desc_at(index)).unwrap();
            if desc.flags & INDIRECT != 0 {
                let entries = u64::from(desc.len) / DESC;
                let at = (0..entries).map(|entry| desc.addr + DESC * entry);
                buffers.extend(at.map(|at| Desc::read(&self.memory, at).unwrap()));
                return Some((head, buffers));
            }
            buffers.push(desc);
            if desc.flags & NEXT == 0 {
                return Some((head, buffers));
            }
            index = desc.next;
        }
    }

    /// Writes a used entry.
    pub(super) fn give(&mut self, id: u32, len: u32) {
        let slot = u64::from(self.used % self.at.size);
        let entry = u64::from(id) | u64::from(len) << 32;
        let at = GuestAddress(self.at.used + 4 + 8 * slot);
        self.memory.write_slice(&entry.to_le_bytes(), at).unwrap();
        self.used = self.used.wrapping_add(1);
        self.publish(self.used);
    }

    /// Says that it is at that index.
    pub(super) fn publish(&self, index: u16) {
        let at = GuestAddress(self.at.used + 2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }
}
