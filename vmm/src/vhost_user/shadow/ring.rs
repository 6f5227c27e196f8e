//! The two split rings of a shadow queue (virtio 1.3, 2.7), each from the side that the VMM has of it.
//!
//! ```text
//!  guest's driver ──▶ GuestRing: we are its device       BackendRing: we are its driver ──▶ backend
//! ```
//!
//! Both are memory that somebody else writes at any time: each field is read once, into a value of ours, and checked
//! where it is used. Indexes are published with release and read with acquire, so that who sees an index sees what it
//! is about; a full fence is between what one side publishes and its look at the other's wish for events (2.7.7, 2.7.10).
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Fault;

pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Bytes of a descriptor.
pub(super) const DESC: u64 = 16;

/// Where a ring is, in the memory it is in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) size: u16,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// A descriptor, read or to be written at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Desc {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Desc {
    pub(super) fn read(memory: &GuestMemoryMmap, at: u64) -> Result<Self, Fault> {
        let mut bytes = [0; DESC as usize];
        let read = memory.read_slice(&mut bytes, GuestAddress(at));
        read.map_err(|_| Fault::Memory(at))?;
        let value = u128::from_le_bytes(bytes);
        Ok(Self {
            addr: value as u64,
            len: (value >> 64) as u32,
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        })
    }

    pub(super) fn write(self, memory: &GuestMemoryMmap, at: u64) -> Result<(), Fault> {
        let value = u128::from(self.addr)
            | u128::from(self.len) << 64
            | u128::from(self.flags) << 96
            | u128::from(self.next) << 112;
        let written = memory.write_slice(&value.to_le_bytes(), GuestAddress(at));
        written.map_err(|_| Fault::Memory(at))
    }
}

fn load(memory: &GuestMemoryMmap, at: u64, order: Ordering) -> Result<u16, Fault> {
    let value = memory.load(GuestAddress(at), order);
    value.map(u16::from_le).map_err(|_| Fault::Memory(at))
}

fn store(memory: &GuestMemoryMmap, at: u64, value: u16, order: Ordering) -> Result<(), Fault> {
    let stored = memory.store(value.to_le(), GuestAddress(at), order);
    stored.map_err(|_| Fault::Memory(at))
}

/// Whether an index went past the one that the other side waits for (virtio 1.3, 2.7.10).
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl Layout {
    /// Index of an avail or used area, behind its flags.
    const INDEX: u64 = 2;
    /// Entries, behind the index.
    const ENTRIES: u64 = 4;

    pub(super) fn desc_at(&self, index: u16) -> u64 {
        self.desc + DESC * u64::from(index)
    }

    fn avail_entry(&self, position: u16) -> u64 {
        self.avail + Self::ENTRIES + 2 * u64::from(position % self.size)
    }

    fn used_entry(&self, position: u16) -> u64 {
        self.used + Self::ENTRIES + 8 * u64::from(position % self.size)
    }

    /// Behind the avail entries: the used index that the driver wants to hear of.
    fn used_event(&self) -> u64 {
        self.avail + Self::ENTRIES + 2 * u64::from(self.size)
    }

    /// Behind the used entries: the avail index that the device wants to hear of.
    fn avail_event(&self) -> u64 {
        self.used + Self::ENTRIES + 8 * u64::from(self.size)
    }
}

/// The guest's own ring, of which we are the device.
pub(super) struct GuestRing {
    pub(super) memory: GuestMemoryMmap,
    pub(super) at: Layout,
    event_idx: bool,
    next_avail: u16,
    /// What the driver had published when it was last looked at.
    seen_avail: u16,
    next_used: u16,
    /// The used index that was last published.
    published: u16,
    /// Whether kicks are asked for.
    kicks: bool,
}

impl GuestRing {
    pub(super) fn new(memory: GuestMemoryMmap, at: Layout, event_idx: bool) -> Self {
        Self {
            memory,
            at,
            event_idx,
            next_avail: 0,
            seen_avail: 0,
            next_used: 0,
            published: 0,
            kicks: true,
        }
    }

    /// Head of the next chain that the driver made available; it stays there until [`Self::advance`].
    pub(super) fn peek(&mut self) -> Result<Option<u16>, Fault> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(None);
        }
        let at = self.at.avail_entry(self.next_avail);
        let head = load(&self.memory, at, Ordering::Relaxed)?;
        if head >= self.at.size {
            let size = self.at.size;
            return Err(Fault::Head { head, size });
        }
        Ok(Some(head))
    }

    /// That chain is taken.
    pub(super) fn advance(&mut self) {
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Whether there is more than was taken.
    fn look(&mut self) -> Result<bool, Fault> {
        let index = load(
            &self.memory,
            self.at.avail + Layout::INDEX,
            Ordering::Acquire,
        )?;
        let more = index.wrapping_sub(self.next_avail);
        let size = self.at.size;
        if more > size {
            return Err(Fault::AvailIndex { index, size });
        }
        self.seen_avail = index;
        Ok(more > 0)
    }

    /// Asks for no kicks while the ring is looked at anyway. A driver that counts events gets none as it is.
    pub(super) fn silence(&mut self) -> Result<(), Fault> {
        if !self.event_idx && self.kicks {
            let no_notify = VRING_USED_F_NO_NOTIFY as u16;
            store(&self.memory, self.at.used, no_notify, Ordering::Relaxed)?;
            self.kicks = false;
        }
        Ok(())
    }

    /// Asks for a kick with the next chain; returns whether there is one already.
    pub(super) fn listen(&mut self) -> Result<bool, Fault> {
        if self.event_idx {
            let at = self.at.avail_event();
            store(&self.memory, at, self.next_avail, Ordering::Relaxed)?;
        } else if !self.kicks {
            store(&self.memory, self.at.used, 0, Ordering::Relaxed)?;
            self.kicks = true;
        }
        // The wish is written before the index is read: else both sides could wait for each other.
        fence(Ordering::SeqCst);
        self.look()
    }

    /// Writes a used entry, which the driver sees once it is published.
    pub(super) fn push(&mut self, head: u16, len: u32) -> Result<(), Fault> {
        let at = self.at.used_entry(self.next_used);
        let entry = u64::from(head) | u64::from(len) << 32;
        let written = self
            .memory
            .write_slice(&entry.to_le_bytes(), GuestAddress(at));
        written.map_err(|_| Fault::Memory(at))?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Publishes the used entries all at once; returns whether the driver is to be interrupted.
    pub(super) fn publish(&mut self) -> Result<bool, Fault> {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Ok(false);
        }
        let index = self.at.used + Layout::INDEX;
        store(&self.memory, index, new, Ordering::Release)?;
        self.published = new;
        // The index is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = load(&self.memory, self.at.used_event(), Ordering::Relaxed)?;
            return Ok(passed(event, old, new));
        }
        let flags = load(&self.memory, self.at.avail, Ordering::Relaxed)?;
        Ok(flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }
}

/// The ring that the backend has, of which we are the driver.
pub(super) struct BackendRing {
    pub(super) memory: GuestMemoryMmap,
    pub(super) at: Layout,
    event_idx: bool,
    next_avail: u16,
    published: u16,
    next_used: u16,
    seen_used: u16,
}

impl BackendRing {
    /// An empty ring; what was in its memory before is cleared.
    pub(super) fn new(memory: GuestMemoryMmap, at: Layout, event_idx: bool) -> Result<Self, Fault> {
        let size = usize::from(at.size);
        let areas = [
            (at.desc, 16 * size),
            (at.avail, 6 + 2 * size),
            (at.used, 6 + 8 * size),
        ];
        for (start, len) in areas {
            let cleared = memory.write_slice(&vec![0; len], GuestAddress(start));
            cleared.map_err(|_| Fault::Memory(start))?;
        }
        Ok(Self {
            memory,
            at,
            event_idx,
            next_avail: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
        })
    }

    pub(super) fn write_desc(&self, index: u16, desc: Desc) -> Result<(), Fault> {
        desc.write(&self.memory, self.at.desc_at(index))
    }

    /// Makes a chain available, which the backend sees once it is published.
    pub(super) fn push(&mut self, head: u16) -> Result<(), Fault> {
        let at = self.at.avail_entry(self.next_avail);
        store(&self.memory, at, head, Ordering::Relaxed)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Publishes the chains all at once; returns whether the backend is to be kicked.
    pub(super) fn publish(&mut self) -> Result<bool, Fault> {
        let (old, new) = (self.published, self.next_avail);
        if old == new {
            return Ok(false);
        }
        let index = self.at.avail + Layout::INDEX;
        store(&self.memory, index, new, Ordering::Release)?;
        self.published = new;
        // The index is written before the backend's wish is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = load(&self.memory, self.at.avail_event(), Ordering::Relaxed)?;
            return Ok(passed(event, old, new));
        }
        let flags = load(&self.memory, self.at.used, Ordering::Relaxed)?;
        Ok(flags & VRING_USED_F_NO_NOTIFY as u16 == 0)
    }

    /// The next used entry: an id, and how many bytes were written, both as the backend says.
    pub(super) fn pop(&mut self) -> Result<Option<(u32, u32)>, Fault> {
        if self.next_used == self.seen_used && !self.look()? {
            return Ok(None);
        }
        let at = self.at.used_entry(self.next_used);
        let mut bytes = [0; 8];
        let read = self.memory.read_slice(&mut bytes, GuestAddress(at));
        read.map_err(|_| Fault::Memory(at))?;
        self.next_used = self.next_used.wrapping_add(1);
        let entry = u64::from_le_bytes(bytes);
        Ok(Some((entry as u32, (entry >> 32) as u32)))
    }

    fn look(&mut self) -> Result<bool, Fault> {
        let at = self.at.used + Layout::INDEX;
        let index = load(&self.memory, at, Ordering::Acquire)?;
        let more = index.wrapping_sub(self.next_used);
        let size = self.at.size;
        if more > size {
            return Err(Fault::UsedIndex { index, size });
        }
        self.seen_used = index;
        Ok(more > 0)
    }

    /// Asks for an interrupt with the next used entry; returns whether there is one already.
    pub(super) fn listen(&mut self) -> Result<bool, Fault> {
        if self.event_idx {
            let at = self.at.used_event();
            store(&self.memory, at, self.next_used, Ordering::Relaxed)?;
        }
        // The wish is written before the index is read.
        fence(Ordering::SeqCst);
        self.look()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_due_when_its_index_was_passed() {
        assert!(passed(0, 0, 1));
        assert!(!passed(1, 0, 1));
        assert!(passed(4, 3, 6));
        assert!(!passed(6, 3, 6));
        assert!(!passed(2, 3, 6));
        assert!(passed(0xffff, 0xfffe, 1));
        assert!(!passed(1, 0xfffe, 1));
    }

    #[test]
    fn a_descriptor_is_read_as_it_was_written() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let desc = Desc {
            addr: 0x0123_4567_89ab_cdef,
            len: 0x1122_3344,
            flags: NEXT | WRITE,
            next: 0x5566,
        };
        desc.write(&memory, 32).unwrap();
        assert_eq!(Desc::read(&memory, 32).unwrap(), desc);
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(32)).unwrap();
        assert_eq!(bytes[..4], [0xef, 0xcd, 0xab, 0x89]);
        assert_eq!(bytes[8..], [0x44, 0x33, 0x22, 0x11, 3, 0, 0x66, 0x55]);
        assert!(Desc::read(&memory, 0x1000 - 8).is_err());
    }
}
