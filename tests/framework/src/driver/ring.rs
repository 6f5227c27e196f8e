//! The driver's side of a split virtqueue, with an account of every head.
//!
//! Heads are handed out in turn, the one that has been free for longest first: a used entry that comes a
//! second time then finds its head free and is a [`Fault`], rather than the early end of another request.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context as _, Result};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::features;
use super::memory::Memory;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const NO_NOTIFY: u16 = 1;

/// One buffer of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A request that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The head that [`Ring::add`] returned.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// What a device must never do to a used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// An entry for a request that is not in flight: it was answered before, or never made.
    #[error("queue {queue}: used entry {at} is for head {id}, which is not in flight")]
    NotInFlight {
        /// The queue.
        queue: u16,
        /// Index of the entry, counted from the ring's start.
        at: u16,
        /// What the entry says.
        id: u32,
    },
    /// More entries than there are requests in flight.
    #[error("queue {queue}: used index went from {from} to {to} with {in_flight} in flight")]
    Jump {
        /// The queue.
        queue: u16,
        /// Index seen last.
        from: u16,
        /// Index seen now.
        to: u16,
        /// Requests that could have come back.
        in_flight: u16,
    },
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    index: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    event_idx: bool,
    /// An indirect table of eight descriptors for each head.
    tables: u64,
    free: VecDeque<u16>,
    /// Descriptors of the request of each head that is in flight.
    chains: Vec<Vec<u16>>,
    in_flight: u16,
    avail_idx: u16,
    kicked_idx: u16,
    seen: u16,
    kick: EventFd,
    call: EventFd,
}

/// Descriptors of an indirect table.
const TABLE: usize = 8;

impl Ring {
    /// An empty queue of `size` entries.
    ///
    /// # Errors
    /// No memory or no eventfd.
    pub fn new(memory: &Arc<Memory>, index: u16, size: u16) -> Result<Self> {
        let entries = u64::from(size);
        Ok(Self {
            index,
            size,
            desc: memory.allocate(16 * entries, 16)?,
            avail: memory.allocate(6 + 2 * entries, 2)?,
            used: memory.allocate(6 + 8 * entries, 4)?,
            tables: memory.allocate(16 * TABLE as u64 * entries, 16)?,
            event_idx: false,
            free: (0..size).collect(),
            chains: vec![Vec::new(); usize::from(size)],
            in_flight: 0,
            avail_idx: 0,
            kicked_idx: 0,
            seen: 0,
            kick: EventFd::new(EFD_NONBLOCK).context("eventfd")?,
            call: EventFd::new(EFD_NONBLOCK).context("eventfd")?,
            memory: Arc::clone(memory),
        })
    }

    /// Follows what was negotiated.
    pub(super) fn set_features(&mut self, negotiated: u64) {
        self.event_idx = negotiated & features::EVENT_IDX != 0;
    }

    /// Index of the virtqueue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Requests that have not come back.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Descriptors that a request can have now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Available index: requests made so far, modulo 2^16.
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Used index as the device wrote it.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.memory.load_u16(self.used + 2)
    }

    /// Frontend's addresses of descriptor table, available and used ring.
    pub(super) fn uvas(&self) -> [u64; 3] {
        [self.desc, self.avail, self.used].map(Memory::uva)
    }

    pub(super) fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// Becomes readable when the device signals.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.call.as_raw_fd()
    }

    /// Makes a request available, without kicking; its head. `None` where there is no room.
    pub fn add(&mut self, pieces: &[Piece]) -> Option<u16> {
        if self.free.len() < pieces.len() || pieces.is_empty() {
            return None;
        }
        let chain: Vec<u16> = self.free.drain(..pieces.len()).collect();
        for (n, piece) in pieces.iter().enumerate() {
            self.describe(self.desc, chain[n], piece, chain.get(n + 1).copied());
        }
        let head = chain[0];
        self.offer(head, chain);
        Some(head)
    }

    /// The same through an indirect table, which takes one descriptor of the ring.
    pub fn add_indirect(&mut self, pieces: &[Piece]) -> Option<u16> {
        if pieces.is_empty() || pieces.len() > TABLE {
            return None;
        }
        let head = self.free.pop_front()?;
        let table = self.tables + 16 * TABLE as u64 * u64::from(head);
        for (n, piece) in (0u16..).zip(pieces) {
            let more = usize::from(n) + 1 < pieces.len();
            self.describe(table, n, piece, more.then_some(n + 1));
        }
        let length = 16 * u32::try_from(pieces.len()).ok()?;
        self.write_desc(self.desc, head, (table, length, F_INDIRECT, 0));
        self.offer(head, vec![head]);
        Some(head)
    }

    fn describe(&self, table: u64, n: u16, piece: &Piece, next: Option<u16>) {
        let mut flags = if piece.writable { F_WRITE } else { 0 };
        if next.is_some() {
            flags |= F_NEXT;
        }
        self.write_desc(
            table,
            n,
            (piece.gpa, piece.length, flags, next.unwrap_or(0)),
        );
    }

    fn write_desc(&self, table: u64, n: u16, (gpa, length, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(table + 16 * u64::from(n), &bytes);
    }

    fn offer(&mut self, head: u16, chain: Vec<u16>) {
        self.chains[usize::from(head)] = chain;
        self.in_flight += 1;
        let slot = u64::from(self.avail_idx % self.size);
        self.memory
            .write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        // Release: the device sees the entry and its descriptors before the index.
        self.memory.store_u16(self.avail + 2, self.avail_idx);
    }

    /// Kicks if the device wants it, as a driver does.
    ///
    /// # Errors
    /// The eventfd's own.
    pub fn kick_if_wanted(&mut self) -> Result<()> {
        let (old, new) = (self.kicked_idx, self.avail_idx);
        self.kicked_idx = new;
        // The index is visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self
                .memory
                .load_u16(self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.load_u16(self.used) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick.write(1).context("kick")?;
        }
        Ok(())
    }

    /// Kicks whatever the device wants: what it said last was its predecessor's wish.
    ///
    /// # Errors
    /// The eventfd's own.
    pub fn kick(&mut self) -> Result<()> {
        self.kicked_idx = self.avail_idx;
        Ok(self.kick.write(1)?)
    }

    /// The next used entry, if there is one.
    ///
    /// # Errors
    /// The entry is one that no device may write. The ring goes on after it.
    pub fn take_used(&mut self) -> Result<Option<Used>, Fault> {
        let (queue, index) = (self.index, self.used_idx());
        if index == self.seen {
            return Ok(None);
        }
        let at = self.seen;
        let mut entry = [0; 8];
        let slot = u64::from(at % self.size);
        self.memory.read(self.used + 4 + 8 * slot, &mut entry);
        let [id, length] = [0, 4]
            .map(|n| u32::from_le_bytes([entry[n], entry[n + 1], entry[n + 2], entry[n + 3]]));
        if index.wrapping_sub(at) > self.in_flight {
            // Nothing of it can be believed: all of it is one fault.
            self.seen = index;
            return Err(Fault::Jump {
                queue,
                from: at,
                to: index,
                in_flight: self.in_flight,
            });
        }
        self.seen = at.wrapping_add(1);
        let head = u16::try_from(id).ok().filter(|head| *head < self.size);
        let chain = head.map(|head| std::mem::take(&mut self.chains[usize::from(head)]));
        match (head, chain) {
            (Some(head), Some(chain)) if !chain.is_empty() => {
                self.free.extend(chain);
                self.in_flight -= 1;
                Ok(Some(Used { head, length }))
            }
            _ => Err(Fault::NotInFlight { queue, at, id }),
        }
    }

    /// Asks for a signal at the next used entry; whether one is there already.
    #[must_use]
    pub fn arm(&self) -> bool {
        if self.event_idx {
            self.memory
                .store_u16(self.avail + 4 + 2 * u64::from(self.size), self.seen);
            // The wish is visible before the index is read.
            fence(Ordering::SeqCst);
        }
        self.used_idx() != self.seen
    }

    /// Takes the signals that have come.
    pub(super) fn take_signal(&self) {
        // Fails only when there are none.
        let _ = self.call.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> Ring {
        Ring::new(&Memory::new(1 << 20).expect("memory"), 3, 8).expect("a ring")
    }

    fn piece(ring: &Ring) -> Piece {
        Piece {
            gpa: ring.memory.allocate(64, 64).expect("room"),
            length: 64,
            writable: true,
        }
    }

    /// What a device does: entries for `heads` from used index `from` on.
    fn put_used(ring: &Ring, from: u16, heads: &[u32]) {
        for (at, head) in (from..).zip(heads) {
            let mut entry = [0; 8];
            entry[..4].copy_from_slice(&head.to_le_bytes());
            let slot = u64::from(at % ring.size);
            ring.memory.write(ring.used + 4 + 8 * slot, &entry);
        }
        let count = u16::try_from(heads.len()).expect("few");
        ring.memory
            .store_u16(ring.used + 2, from.wrapping_add(count));
    }

    #[test]
    fn requests_that_come_back_once_leave_nothing_in_flight() {
        let mut ring = ring();
        let pieces = [piece(&ring), piece(&ring)];
        let one = ring.add(&pieces).expect("room");
        let two = ring.add_indirect(&pieces).expect("room");
        assert_eq!((ring.in_flight(), ring.room()), (2, 5));
        put_used(&ring, 0, &[u32::from(two), u32::from(one)]);
        let heads = [(); 2].map(|()| ring.take_used().expect("no fault").expect("an entry").head);
        assert_eq!(heads, [two, one]);
        assert_eq!(ring.take_used(), Ok(None));
        assert_eq!((ring.in_flight(), ring.room()), (0, 8));
    }

    #[test]
    fn an_entry_that_comes_twice_is_a_fault_and_the_ring_goes_on() {
        let mut ring = ring();
        let pieces = [piece(&ring)];
        let one = u32::from(ring.add(&pieces).expect("room"));
        let two = u32::from(ring.add(&pieces).expect("room"));
        put_used(&ring, 0, &[one, one]);
        assert!(matches!(ring.take_used(), Ok(Some(_))));
        let fault = Fault::NotInFlight {
            queue: 3,
            at: 1,
            id: one,
        };
        assert_eq!(ring.take_used(), Err(fault));
        assert_eq!(ring.in_flight(), 1);
        put_used(&ring, 2, &[two]);
        assert!(matches!(ring.take_used(), Ok(Some(_))));
    }

    #[test]
    fn a_head_is_not_used_again_while_another_is_free() {
        let mut ring = ring();
        let pieces = [piece(&ring)];
        for n in 0..8u16 {
            let head = ring.add(&pieces).expect("room");
            assert_eq!(head, n);
            put_used(&ring, n, &[u32::from(head)]);
            assert!(matches!(ring.take_used(), Ok(Some(_))));
        }
        assert_eq!(ring.add(&pieces), Some(0));
    }

    #[test]
    fn an_index_that_jumps_and_a_head_that_is_none_are_faults() {
        let mut ring = ring();
        let pieces = [piece(&ring)];
        ring.add(&pieces).expect("room");
        put_used(&ring, 0, &[999]);
        assert!(matches!(
            ring.take_used(),
            Err(Fault::NotInFlight { id: 999, .. })
        ));
        put_used(&ring, 1, &[0, 1]);
        let fault = ring.take_used();
        assert!(
            matches!(
                fault,
                Err(Fault::Jump {
                    from: 1,
                    to: 3,
                    in_flight: 1,
                    ..
                })
            ),
            "{fault:?}"
        );
        assert_eq!(ring.take_used(), Ok(None));
    }
}
