//! One shadow queue: what goes from the guest's ring to the backend's, and back.
//!
//! ```text
//!  guest's memory                                     bounce memory
//!  ┌ desc ┬ avail ┐ ── forward: read, check, copy ──▶ ┌ desc ┬ avail ┐ ──▶ backend
//!  │ used         │ ◀── back: copy used bytes ─────── │ used         │ ◀──
//!  │ buffers      │                                   │ arena        │
//!  └──────────────┘                                   └──────────────┘
//! ```
//!
//! Both rings have the same size, and a chain has the same descriptors in both, so an id in one is that of the other
//! and there is room in the backend's ring whenever there was in the guest's. A table of indirect descriptors becomes
//! one in the request's run of pages.
//!
//! Invariants: no descriptor of the ring belongs to two requests in flight; a run of pages belongs to one; of what the
//! backend says, an id has to be in flight and a length is cut to what the guest's buffers hold. Called by the worker's
//! thread alone.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::arena::{Arena, Run};
use super::chain::{Chain, Segment};
use super::ring::{BackendRing, DESC, Desc, GuestRing, INDIRECT, NEXT, WRITE};
use super::{Counters, Fault};

/// What a disk's status byte holds until its backend writes it: no status that there is.
const NO_STATUS: u8 = 0xff;

/// A request that the backend has.
struct Flight {
    chain: Chain,
    run: Run,
}

pub(super) struct Queue {
    guest: GuestRing,
    backend: BackendRing,
    arena: Arena,
    /// By head.
    flights: Box<[Option<Flight>]>,
    /// Which descriptors of the ring are those of a request in flight.
    owned: Box<[bool]>,
    /// A request waits for room.
    full: bool,
    /// Chains to be used again.
    spare: Vec<Chain>,
    /// Whether the last byte that the device may write is a status, which counts although what comes before was not
    /// written.
    has_status: bool,
    counters: Arc<Counters>,
}

impl Queue {
    pub(super) fn new(
        guest: GuestRing,
        backend: BackendRing,
        arena: Arena,
        has_status: bool,
        counters: Arc<Counters>,
    ) -> Self {
        let size = usize::from(guest.at.size);
        Self {
            guest,
            backend,
            arena,
            flights: (0..size).map(|_| None).collect(),
            owned: vec![false; size].into(),
            full: false,
            spare: Vec::new(),
            has_status,
            counters,
        }
    }

    /// Hands the backend what the guest made available, as far as there is room; returns whether to kick it.
    pub(super) fn forward(&mut self) -> Result<bool, Fault> {
        self.guest.silence()?;
        // No more than a ring at a time: what is used in between is to go back too.
        for _ in 0..self.guest.at.size {
            let Some(head) = self.guest.peek()? else {
                break;
            };
            let mut chain = self.spare.pop().unwrap_or_default();
            chain.clear();
            chain.read(&self.guest, head)?;
            let bytes = chain.lay_out();
            let room = self.arena.bytes();
            if bytes > room {
                return Err(Fault::TooBig { bytes, room });
            }
            let Some(run) = self.arena.take(bytes) else {
                self.spare.push(chain);
                if !std::mem::replace(&mut self.full, true) {
                    Counters::add(&self.counters.stalls, 1);
                }
                break;
            };
            self.full = false;
            self.submit(head, Flight { chain, run })?;
            self.guest.advance();
        }
        self.backend.publish()
    }

    fn submit(&mut self, head: u16, flight: Flight) -> Result<(), Fault> {
        for &index in &flight.chain.ring {
            if std::mem::replace(&mut self.owned[usize::from(index)], true) {
                return Err(Fault::InUse { index });
            }
        }
        let base = self.arena.address(flight.run);
        let chain = &flight.chain;
        let readable = chain.segments.iter().filter(|segment| !segment.writable);
        let mut bytes = 0;
        for segment in readable {
            let (from, to) = (&self.guest.memory, &self.backend.memory);
            copy(from, segment.gpa, to, base + segment.offset, segment.len)?;
            bytes += u64::from(segment.len);
        }
        if let Some(at) = self.status(&chain.segments) {
            let at = GuestAddress(base + at);
            let written = self.backend.memory.write_obj(NO_STATUS, at);
            written.map_err(|_| Fault::Memory(at.0))?;
        }
        self.write_chain(chain, base)?;
        self.backend.push(head)?;
        Counters::add(&self.counters.requests, 1);
        Counters::add(&self.counters.in_bytes, bytes);
        self.flights[usize::from(head)] = Some(flight);
        Ok(())
    }

    /// Where a disk's status byte is in its request's run of pages.
    fn status(&self, segments: &[Segment]) -> Option<u64> {
        let last = segments
            .last()
            .filter(|last| last.writable && last.len > 0)?;
        let end = last.offset + u64::from(last.len);
        self.has_status.then_some(end - 1)
    }

    /// The backend's descriptors, those in a table last.
    fn write_chain(&self, chain: &Chain, base: u64) -> Result<(), Fault> {
        let in_table = chain.in_table.unwrap_or(0);
        let (direct, table) = chain
            .segments
            .split_at(chain.segments.len().saturating_sub(in_table));
        let next_of = |position: usize| chain.ring.get(position + 1).copied();
        for (position, (segment, &index)) in direct.iter().zip(&chain.ring).enumerate() {
            let desc = described(segment, base, next_of(position));
            self.backend.write_desc(index, desc)?;
        }
        if let (Some(_), Some(&last)) = (chain.in_table, chain.ring.last()) {
            let desc = Desc {
                addr: base,
                len: DESC as u32 * table.len() as u32,
                flags: INDIRECT,
                next: 0,
            };
            self.backend.write_desc(last, desc)?;
        }
        for (segment, position) in table.iter().zip(0_u16..) {
            let more = usize::from(position) + 1 < table.len();
            let desc = described(segment, base, more.then_some(position + 1));
            desc.write(&self.backend.memory, base + DESC * u64::from(position))?;
        }
        Ok(())
    }

    /// Gives the guest back what the backend is done with; returns whether to interrupt it.
    pub(super) fn give_back(&mut self) -> Result<bool, Fault> {
        for _ in 0..self.guest.at.size {
            let Some((id, len)) = self.backend.pop()? else {
                break;
            };
            let place = self.flights.get_mut(id as usize);
            let Some(flight) = place.and_then(Option::take) else {
                return Err(Fault::NotInFlight { id });
            };
            let len = self.copy_back(&flight, len)?;
            self.guest.push(id as u16, len)?;
            for &index in &flight.chain.ring {
                self.owned[usize::from(index)] = false;
            }
            self.arena.give_back(flight.run);
            self.spare.push(flight.chain);
            self.full = false;
        }
        // All at once: the buffers of one packet may be several.
        self.guest.publish()
    }

    /// The first `len` bytes of what the device may write, and its status; returns how many these are.
    fn copy_back(&self, flight: &Flight, len: u32) -> Result<u32, Fault> {
        let chain = &flight.chain;
        let base = self.arena.address(flight.run);
        let written = u64::from(len).min(chain.writable_bytes());
        let mut left = written;
        let writable = chain.segments.iter().filter(|segment| segment.writable);
        for segment in writable {
            let part = left.min(segment.len.into()) as u32;
            self.copy_out(segment, base, 0, part)?;
            left -= u64::from(part);
        }
        Counters::add(&self.counters.out_bytes, written);
        if written < chain.writable_bytes()
            && let (Some(_), Some(last)) = (self.status(&chain.segments), chain.segments.last())
        {
            self.copy_out(last, base, last.len - 1, 1)?;
        }
        Ok(written as u32)
    }

    fn copy_out(&self, segment: &Segment, base: u64, skip: u32, len: u32) -> Result<(), Fault> {
        let (from, to) = (&self.backend.memory, &self.guest.memory);
        let skip = u64::from(skip);
        copy(
            from,
            base + segment.offset + skip,
            to,
            segment.gpa + skip,
            len,
        )
    }

    /// Asks both sides for events; returns whether there is something to do already.
    pub(super) fn listen(&mut self) -> Result<bool, Fault> {
        let used = self.backend.listen()?;
        // More of the guest's is of no use until something came back.
        if self.full {
            return Ok(used);
        }
        Ok(self.guest.listen()? || used)
    }

    /// Requests that the backend has.
    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count()
    }
}

/// A descriptor of the backend's for a buffer.
fn described(segment: &Segment, base: u64, next: Option<u16>) -> Desc {
    let write = if segment.writable { WRITE } else { 0 };
    Desc {
        addr: base + segment.offset,
        len: segment.len,
        flags: write | next.map_or(0, |_| NEXT),
        next: next.unwrap_or(0),
    }
}

/// Copies between the two memories; neither range has to be in one piece.
fn copy(
    from: &GuestMemoryMmap,
    source: u64,
    to: &GuestMemoryMmap,
    target: u64,
    len: u32,
) -> Result<(), Fault> {
    let mut target = target;
    for piece in GuestMemoryBackend::get_slices(from, GuestAddress(source), len as usize) {
        let piece = piece.map_err(|_| Fault::Outside { gpa: source, len })?;
        let mut done = 0;
        for slot in GuestMemoryBackend::get_slices(to, GuestAddress(target), piece.len()) {
            let slot = slot.map_err(|_| Fault::Outside { gpa: target, len })?;
            let part = piece.subslice(done, slot.len());
            let part = part.map_err(|_| Fault::Outside { gpa: source, len })?;
            part.copy_to_volatile_slice(slot);
            done += part.len();
        }
        target += piece.len() as u64;
    }
    Ok(())
}
