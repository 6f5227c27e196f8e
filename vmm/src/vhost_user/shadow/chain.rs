//! Reading a chain of the guest's, and laying its buffers out anew (virtio 1.3, 2.7.4 to 2.7.6).
//!
//! Nothing is believed: a chain that is a loop or too long, whose tables are odd, nested or outside memory, whose
//! buffers are outside memory or in the wrong order is a [`Fault`]. What comes out keeps the guest's cut into buffers,
//! as there are backends that expect a header or a status byte to be one of their own.
#![forbid(unsafe_code)]

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::ring::{DESC, Desc, GuestRing, INDIRECT, NEXT, WRITE};
use super::{Fault, PAGE};

/// Most buffers of a chain in a ring that is smaller: what Linux and QEMU know too (`UIO_MAXIOV`).
const MAX_SEGMENTS: usize = 1024;
/// Buffers of at least this size are aligned to it, as those of direct I/O have to be.
const SECTOR: u64 = 512;
/// Alignment of all others, and of tables.
const UNIT: u64 = 16;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where the guest has it.
    pub(super) gpa: u64,
    pub(super) len: u32,
    /// Whether the device writes to it.
    pub(super) writable: bool,
    /// Where it is in the run of pages that the request gets.
    pub(super) offset: u64,
}

/// A chain, checked.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Its descriptors in the ring, in their order.
    pub(super) ring: Vec<u16>,
    /// How many of its segments are in a table, which the last of those descriptors stands for.
    pub(super) in_table: Option<usize>,
    /// All its buffers, in their order.
    pub(super) segments: Vec<Segment>,
}

impl Chain {
    pub(super) fn clear(&mut self) {
        self.ring.clear();
        self.in_table = None;
        self.segments.clear();
    }

    /// Reads the chain at `head` into an empty one.
    pub(super) fn read(&mut self, ring: &GuestRing, head: u16) -> Result<(), Fault> {
        let size = ring.at.size;
        let mut index = head;
        loop {
            if index >= size {
                return Err(Fault::Head { head: index, size });
            }
            // Longer than the ring: it has been here before.
            if self.ring.len() >= usize::from(size) {
                return Err(Fault::Loop { head });
            }
            self.ring.push(index);
            let desc = Desc::read(&ring.memory, ring.at.desc_at(index))?;
            if desc.flags & INDIRECT != 0 {
                if desc.flags & NEXT != 0 {
                    return Err(Fault::Table { len: desc.len });
                }
                return self.read_table(ring, desc, head);
            }
            self.add(&ring.memory, desc, head)?;
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    fn read_table(&mut self, ring: &GuestRing, table: Desc, head: u16) -> Result<(), Fault> {
        let odd = Fault::Table { len: table.len };
        let entries = u64::from(table.len) / DESC;
        let most = MAX_SEGMENTS.max(ring.at.size.into());
        if entries == 0 || !u64::from(table.len).is_multiple_of(DESC) {
            return Err(odd);
        }
        let before = self.segments.len();
        let mut index = 0;
        loop {
            if u64::from(index) >= entries {
                return Err(odd);
            }
            if self.segments.len() >= most || (self.segments.len() - before) as u64 >= entries {
                return Err(Fault::Loop { head });
            }
            let at = table.addr.checked_add(DESC * u64::from(index));
            let at = at.ok_or(Fault::Memory(table.addr))?;
            let desc = Desc::read(&ring.memory, at)?;
            if desc.flags & INDIRECT != 0 {
                return Err(odd);
            }
            self.add(&ring.memory, desc, head)?;
            if desc.flags & NEXT == 0 {
                break;
            }
            index = desc.next;
        }
        self.in_table = Some(self.segments.len() - before);
        Ok(())
    }

    fn add(&mut self, memory: &GuestMemoryMmap, desc: Desc, head: u16) -> Result<(), Fault> {
        let writable = desc.flags & WRITE != 0;
        if !writable && self.segments.last().is_some_and(|last| last.writable) {
            return Err(Fault::Order { head });
        }
        let (gpa, len) = (desc.addr, desc.len);
        if len > 0 && !memory.check_range(GuestAddress(gpa), len as usize) {
            return Err(Fault::Outside { gpa, len });
        }
        self.segments.push(Segment {
            gpa,
            len,
            writable,
            offset: 0,
        });
        Ok(())
    }

    /// Gives each buffer its place, the table's first; returns how many bytes that takes.
    pub(super) fn lay_out(&mut self) -> u64 {
        let mut end = self.in_table.map_or(0, |entries| DESC * entries as u64);
        // Small ones come first, and share a page with the table.
        for small in [true, false] {
            for segment in &mut self.segments {
                let len = u64::from(segment.len);
                if (len < SECTOR) != small {
                    continue;
                }
                let align = match len {
                    0..SECTOR => UNIT,
                    SECTOR..PAGE => SECTOR,
                    _ => PAGE,
                };
                segment.offset = end.next_multiple_of(align);
                end = segment.offset + len;
            }
        }
        end
    }

    /// How many bytes the device may write.
    pub(super) fn writable_bytes(&self) -> u64 {
        let writable = self.segments.iter().filter(|segment| segment.writable);
        writable.map(|segment| u64::from(segment.len)).sum()
    }
}
