//! Whatever a guest may put into a ring with a shadow, and whatever a backend may say, for a fuzz target and a test.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::arena::Arena;
use super::fake::Backend;
use super::queue::Queue;
use super::ring::{BackendRing, Desc, GuestRing, Layout, WRITE};
use super::{Counters, PAGE};

/// Guest memory: two pieces, with a hole between them.
const PIECE: usize = 0x4000;
const SECOND: u64 = 0x8000;
/// Where the ring's areas are, in the first piece.
const SIZE: u16 = 8;
const AT: Layout = Layout {
    size: SIZE,
    desc: 0,
    avail: 0x80,
    used: 0xc0,
};
/// The backend's ring and its arena.
const RING: Layout = Layout {
    size: SIZE,
    desc: 0,
    avail: 0x100,
    used: 0x200,
};
const ARENA: u64 = PAGE;
const ARENA_LEN: u64 = 6 * PAGE;

/// Runs a queue over the memory that `data` is. Its first bytes say which features there are, and what the backend
/// says of each request.
pub(crate) fn guest_ring(data: &[u8]) {
    let Some((&[flags, seed, rest @ ..], image)) = data.split_first_chunk::<10>() else {
        return;
    };
    let pieces = [(GuestAddress(0), PIECE), (GuestAddress(SECOND), PIECE)];
    let guest = GuestMemoryMmap::from_ranges(&pieces);
    let bounce = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (ARENA + ARENA_LEN) as usize)]);
    // A host without memory is no finding.
    let (Ok(guest), Ok(bounce)) = (guest, bounce) else {
        return;
    };
    let (first, second) = image.split_at(image.len().min(PIECE));
    let second = &second[..second.len().min(PIECE)];
    let _ = guest.write_slice(first, GuestAddress(0));
    let _ = guest.write_slice(second, GuestAddress(SECOND));
    let event_idx = flags & 1 != 0;
    let Ok(ring) = BackendRing::new(bounce.clone(), RING, event_idx) else {
        return;
    };
    let mut queue = Queue::new(
        GuestRing::new(guest.clone(), AT, event_idx),
        ring,
        Arena::new(ARENA, ARENA_LEN),
        flags & 2 != 0,
        Arc::<Counters>::default(),
    );
    let mut backend = Backend::new(bounce, RING);
    let mut held: Vec<(u16, Vec<Desc>)> = Vec::new();
    for round in 0..32_usize {
        let Ok(_) = queue.forward() else { return };
        while let Some(request) = backend.take() {
            check(&request.1, &held);
            held.push(request);
        }
        let said = rest[round % rest.len()];
        if said & 0x80 != 0 {
            // Nonsense.
            backend.give(u32::from(said), u32::MAX);
        } else if !held.is_empty() {
            let (head, buffers) = held.swap_remove(usize::from(said) % held.len());
            fill(&backend, &buffers, seed);
            backend.give(head.into(), u32::from(said) << (said % 8));
        }
        let Ok(_) = queue.give_back() else { return };
        let Ok(_) = queue.listen() else { return };
        // More of the same, which the driver need not wait for.
        let at = GuestAddress(AT.avail + 2);
        if let Ok(index) = guest.read_obj::<u16>(at) {
            let _ = guest.write_obj(index.wrapping_add(u16::from(said & 1)), at);
        }
    }
}

/// The backend finds each buffer in the arena, and none of it in a request that it has besides.
fn check(buffers: &[Desc], held: &[(u16, Vec<Desc>)]) {
    for (place, buffer) in buffers.iter().enumerate() {
        let end = buffer.addr + u64::from(buffer.len);
        assert!(
            (ARENA..=ARENA + ARENA_LEN).contains(&buffer.addr) && end <= ARENA + ARENA_LEN,
            "{buffer:x?}"
        );
        let others = held.iter().flat_map(|(_, other)| other);
        for other in others.chain(&buffers[..place]) {
            let apart = other.addr + u64::from(other.len) <= buffer.addr || end <= other.addr;
            let empty = buffer.len == 0 || other.len == 0;
            assert!(apart || empty, "{buffer:x?} and {other:x?}");
        }
    }
}

fn fill(backend: &Backend, buffers: &[Desc], seed: u8) {
    for buffer in buffers.iter().filter(|buffer| buffer.flags & WRITE != 0) {
        let bytes = vec![seed; buffer.len as usize];
        // It was checked to be there.
        let _ = backend
            .memory
            .write_slice(&bytes, GuestAddress(buffer.addr));
    }
}
