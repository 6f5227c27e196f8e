//! Requests from a guest's ring to a backend's and back, without threads.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::arena::Arena;
use super::fake::Backend;
use super::queue::Queue;
use super::ring::{BackendRing, DESC, Desc, GuestRing, INDIRECT, Layout, NEXT, WRITE};
use super::*;
use crate::vhost_user::tests::backend::next;

const SIZE: u16 = 8;
const MIB: u64 = 1 << 20;
/// The guest's ring, with tables and buffers behind it, and a piece of memory from 4 GiB on.
const GUEST: Layout = Layout {
    size: SIZE,
    desc: 0x1000,
    avail: 0x2000,
    used: 0x3000,
};
const TABLE: u64 = 0x8000;
const HIGH: u64 = 4 << 30;
const RING: Layout = Layout {
    size: SIZE,
    desc: 0,
    avail: 0x400,
    used: 0x800,
};
const ARENA: u64 = 0x1000;

struct Bench {
    guest: GuestMemoryMmap,
    queue: Queue,
    backend: Backend,
    counters: Arc<Counters>,
    avail: u16,
}

fn bench_with(event_idx: bool, arena_pages: u64, has_status: bool) -> Bench {
    let pieces = [
        (GuestAddress(0), MIB as usize),
        (GuestAddress(HIGH), MIB as usize),
    ];
    let guest = GuestMemoryMmap::from_ranges(&pieces).unwrap();
    let len = ARENA + arena_pages * PAGE;
    let bounce = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap();
    let counters = Arc::<Counters>::default();
    let queue = Queue::new(
        GuestRing::new(guest.clone(), GUEST, event_idx),
        BackendRing::new(bounce.clone(), RING, event_idx).unwrap(),
        Arena::new(ARENA, arena_pages * PAGE),
        has_status,
        Arc::clone(&counters),
    );
    Bench {
        guest,
        queue,
        backend: Backend::new(bounce, RING),
        counters,
        avail: 0,
    }
}

fn bench() -> Bench {
    bench_with(false, 64, true)
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

impl Bench {
    fn put(&self, index: u16, desc: Desc) {
        desc.write(&self.guest, GUEST.desc_at(index)).unwrap();
    }

    fn put_in_table(&self, index: u16, desc: Desc) {
        let at = TABLE + DESC * u64::from(index);
        desc.write(&self.guest, at).unwrap();
    }

    /// Makes the chain at a descriptor available.
    fn submit(&mut self, head: u16) {
        let slot = u64::from(self.avail % SIZE);
        let at = GuestAddress(GUEST.avail + 4 + 2 * slot);
        self.guest.write_obj(head, at).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.publish(self.avail);
    }

    fn publish(&self, index: u16) {
        let at = GuestAddress(GUEST.avail + 2);
        self.guest.write_obj(index, at).unwrap();
    }

    /// A read of `len` bytes of a disk to `gpa`: header, data, status at descriptors `first`, `first + 1`, `first + 2`.
    fn disk_read(&mut self, first: u16, gpa: u64, len: u32) {
        self.put(first, desc(0x4000, 16, NEXT, first + 1));
        self.put(first + 1, desc(gpa, len, NEXT | WRITE, first + 2));
        self.put(first + 2, desc(0x5000, 1, WRITE, 0));
        self.submit(first);
    }

    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.guest
            .read_slice(&mut bytes, GuestAddress(gpa))
            .unwrap();
        bytes
    }

    fn fill(&self, gpa: u64, len: usize, with: u8) {
        let bytes = vec![with; len];
        self.guest.write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }

    /// The used index, and the last entry.
    fn used(&self) -> (u16, u32, u32) {
        let index: u16 = self.guest.read_obj(GuestAddress(GUEST.used + 2)).unwrap();
        let slot = u64::from(index.wrapping_sub(1) % SIZE);
        let at = GuestAddress(GUEST.used + 4 + 8 * slot);
        let [id, len]: [u32; 2] = self.guest.read_obj(at).unwrap();
        (index, id, len)
    }

    fn write_as_backend(&self, desc: &Desc, with: u8) {
        let bytes = vec![with; desc.len as usize];
        let at = GuestAddress(desc.addr);
        self.backend.memory.write_slice(&bytes, at).unwrap();
    }

    fn count(&self, name: &str) -> u64 {
        let named = self.counters.named();
        named.iter().find(|(of, _)| *of == name).unwrap().1
    }
}

#[test]
fn a_write_reaches_the_backend_in_the_guests_own_cut() {
    let mut bench = bench();
    bench.fill(0x4000, 16, 7);
    bench.fill(HIGH + 0x123, 5000, 9);
    bench.put(3, desc(0x4000, 16, NEXT, 6));
    bench.put(6, desc(HIGH + 0x123, 5000, NEXT, 1));
    bench.put(1, desc(0x5000, 1, WRITE, 0));
    bench.submit(3);
    assert!(bench.queue.forward().unwrap(), "a kick");
    let (head, buffers) = bench.backend.take().unwrap();
    assert_eq!(head, 3);
    let shape: Vec<_> = buffers.iter().map(|b| (b.len, b.flags & WRITE)).collect();
    assert_eq!(shape, [(16, 0), (5000, 0), (1, WRITE)]);
    let mut data = vec![0; 5000];
    let at = GuestAddress(buffers[1].addr);
    bench.backend.memory.read_slice(&mut data, at).unwrap();
    assert_eq!(data, [9; 5000]);
    assert!(
        buffers[1].addr.is_multiple_of(PAGE),
        "direct I/O needs that"
    );
    bench.write_as_backend(&buffers[2], 0);
    bench.backend.give(3, 1);
    assert!(bench.queue.give_back().unwrap(), "an interrupt");
    assert_eq!(bench.used(), (1, 3, 1));
    assert_eq!(bench.read(0x5000, 1), [0]);
    assert_eq!(bench.queue.in_flight(), 0);
    assert_eq!(bench.count("shadow_copied_in_bytes"), 5016);
    assert_eq!(bench.count("shadow_copied_out_bytes"), 1);
}

#[test]
fn a_table_of_the_guests_becomes_one_in_the_bounce_memory() {
    let mut bench = bench();
    // In another order than that of its entries.
    bench.put_in_table(0, desc(0x4000, 16, NEXT, 2));
    bench.put_in_table(2, desc(HIGH, 4096, NEXT | WRITE, 1));
    bench.put_in_table(1, desc(0x5000, 1, WRITE, 0));
    bench.put(5, desc(TABLE, 3 * 16, INDIRECT, 0));
    bench.submit(5);
    bench.queue.forward().unwrap();
    let (head, buffers) = bench.backend.take().unwrap();
    assert_eq!((head, buffers.len()), (5, 3));
    for buffer in &buffers[1..] {
        bench.write_as_backend(buffer, 0x5a);
    }
    bench.backend.give(5, 4097);
    bench.queue.give_back().unwrap();
    assert_eq!(bench.used(), (1, 5, 4097));
    assert_eq!(bench.read(HIGH, 4096), [0x5a; 4096]);
    assert_eq!(bench.read(0x5000, 1), [0x5a]);
}

/// Buffers in the ring, then a table: a driver may do so where it must not add to it (virtio 1.3, 2.7.5.3.2).
#[test]
fn a_chain_may_end_in_a_table() {
    let mut bench = bench();
    bench.put(0, desc(0x4000, 16, NEXT, 4));
    bench.put(4, desc(TABLE, 16, INDIRECT, 0));
    bench.put_in_table(0, desc(0x5000, 1, WRITE, 0));
    bench.submit(0);
    bench.queue.forward().unwrap();
    let (_, buffers) = bench.backend.take().unwrap();
    let lens: Vec<_> = buffers.iter().map(|buffer| buffer.len).collect();
    assert_eq!(lens, [16, 1]);
}

#[test]
fn only_what_the_backend_says_it_wrote_is_copied_back() {
    let mut bench = bench_with(false, 64, false);
    bench.fill(0x6000, 4096, 0xee);
    bench.put(0, desc(0x6000, 3000, NEXT | WRITE, 1));
    bench.put(1, desc(0x6c00, 500, WRITE, 0));
    bench.submit(0);
    bench.queue.forward().unwrap();
    let (_, buffers) = bench.backend.take().unwrap();
    for buffer in &buffers {
        bench.write_as_backend(buffer, 1);
    }
    bench.backend.give(0, 3002);
    bench.queue.give_back().unwrap();
    assert_eq!(bench.read(0x6000, 3000), [1; 3000]);
    assert_eq!(bench.read(0x6c00, 3), [1, 1, 0xee]);
    // More than there is room for is cut.
    bench.submit(0);
    bench.queue.forward().unwrap();
    bench.backend.give(0, u32::MAX);
    bench.queue.give_back().unwrap();
    assert_eq!(bench.used(), (2, 0, 3500));
    assert_eq!(bench.read(0x6c00 + 499, 2), [1, 0xee]);
}

/// A disk that failed has written a status and nothing before it, and one that has not even done so has not succeeded.
#[test]
fn a_disks_status_comes_back_whatever_else_was_written() {
    let mut bench = bench();
    for (status, expected) in [(Some(2), 2), (None, 0xff)] {
        bench.disk_read(0, 0x6000, 4096);
        bench.queue.forward().unwrap();
        let (_, buffers) = bench.backend.take().unwrap();
        bench.write_as_backend(&buffers[1], 0x77);
        if let Some(status) = status {
            bench.write_as_backend(&buffers[2], status);
        }
        bench.backend.give(0, 0);
        bench.queue.give_back().unwrap();
        assert_eq!(bench.read(0x5000, 1), [expected]);
        assert_eq!(bench.read(0x6000, 4096), [0; 4096], "what was not said");
    }
}

#[test]
fn requests_come_back_in_any_order_and_all_at_once() {
    let mut bench = bench_with(true, 64, false);
    for head in 0..4 {
        bench.put(head, desc(0x6000 + 0x100 * u64::from(head), 16, WRITE, 0));
        bench.submit(head);
    }
    bench.queue.forward().unwrap();
    let mut requests: Vec<_> = std::iter::from_fn(|| bench.backend.take()).collect();
    requests.swap(0, 3);
    requests.swap(1, 2);
    for (head, buffers) in &requests {
        bench.write_as_backend(&buffers[0], *head as u8 + 1);
        bench.backend.give((*head).into(), 16);
    }
    assert!(bench.queue.give_back().unwrap());
    assert_eq!(bench.used(), (4, 0, 16));
    for head in 0..4_u8 {
        let at = 0x6000 + 0x100 * u64::from(head);
        assert_eq!(bench.read(at, 16), [head + 1; 16]);
    }
}

#[test]
fn what_does_not_fit_now_waits_and_what_never_fits_is_an_error() {
    let mut bench = bench_with(false, 6, true);
    // Header and status share a page; the data takes two.
    bench.disk_read(0, 0x6000, 8192);
    bench.disk_read(3, 0x9000, 8192);
    bench.queue.forward().unwrap();
    assert_eq!(bench.queue.in_flight(), 2);
    bench.put(6, desc(0xc000, 1, WRITE, 0));
    bench.submit(6);
    assert!(!bench.queue.forward().unwrap(), "nothing to kick for");
    assert!(!bench.queue.listen().unwrap(), "nothing that could be done");
    assert!(!bench.queue.forward().unwrap());
    assert_eq!(bench.count("shadow_stalls"), 1, "once for one wait");
    bench.backend.take();
    bench.backend.take();
    bench.backend.give(3, 8193);
    assert!(bench.queue.listen().unwrap());
    bench.queue.give_back().unwrap();
    assert!(bench.queue.forward().unwrap());
    assert_eq!(bench.backend.take().unwrap().0, 6);
    // Seven pages, once all others are gone too.
    bench.backend.give(6, 1);
    bench.backend.give(0, 1);
    bench.queue.give_back().unwrap();
    bench.disk_read(0, 0x6000, 6 * 4096);
    let fault = bench.queue.forward().unwrap_err();
    assert!(matches!(fault, Fault::TooBig { .. }), "{fault}");
}

#[test]
fn a_driver_that_counts_events_is_interrupted_when_it_asked_to_be() {
    let mut bench = bench_with(true, 64, false);
    let used_event = GuestAddress(GUEST.avail + 4 + 2 * u64::from(SIZE));
    bench.guest.write_obj(1_u16, used_event).unwrap();
    bench.put(0, desc(0x6000, 16, WRITE, 0));
    bench.put(1, desc(0x6100, 16, WRITE, 0));
    for (head, interrupts) in [(0, false), (1, true)] {
        bench.submit(head);
        bench.queue.forward().unwrap();
        bench.backend.take().unwrap();
        bench.backend.give(head.into(), 16);
        assert_eq!(bench.queue.give_back().unwrap(), interrupts, "{head}");
    }
    assert!(!bench.queue.listen().unwrap());
    let avail_event = GuestAddress(GUEST.used + 4 + 8 * u64::from(SIZE));
    let asked: u16 = bench.guest.read_obj(avail_event).unwrap();
    assert_eq!(asked, 2, "a kick with the next");
}

#[test]
fn a_driver_without_events_is_told_when_not_to_kick() {
    let mut bench = bench();
    let flags = |bench: &Bench| -> u16 { bench.guest.read_obj(GuestAddress(GUEST.used)).unwrap() };
    bench.queue.forward().unwrap();
    assert_eq!(flags(&bench), 1);
    assert!(!bench.queue.listen().unwrap());
    assert_eq!(flags(&bench), 0);
    // It wants no interrupts.
    bench
        .guest
        .write_obj(1_u16, GuestAddress(GUEST.avail))
        .unwrap();
    bench.disk_read(0, 0x6000, 16);
    bench.queue.forward().unwrap();
    bench.backend.take().unwrap();
    bench.backend.give(0, 17);
    assert!(!bench.queue.give_back().unwrap());
    assert_eq!(bench.used().0, 1);
}

fn fault(prepare: impl FnOnce(&mut Bench)) -> Fault {
    let mut bench = bench();
    prepare(&mut bench);
    bench.queue.forward().unwrap_err()
}

#[test]
fn chains_that_make_no_sense_end_the_queue() {
    let outside = desc(MIB, 1, 0, 0);
    let one = |desc: Desc| {
        fault(move |bench| {
            bench.put(0, desc);
            bench.submit(0);
        })
    };
    let in_table = |table: Desc, entry: Desc| {
        fault(move |bench| {
            bench.put(0, table);
            bench.put_in_table(0, entry);
            bench.submit(0);
        })
    };
    let good = desc(0x4000, 16, 0, 0);
    let table = |len| desc(TABLE, len, INDIRECT, 0);
    for (found, expected) in [
        (fault(|b| b.submit(8)), "descriptor 8 of a ring of 8"),
        (fault(|b| b.publish(9)), "at index 9"),
        (one(outside), "at 0x100000 is outside"),
        (one(desc(MIB - 1, 2, WRITE, 0)), "is outside"),
        (one(desc(u64::MAX, 2, 0, 0)), "is outside"),
        (one(desc(MIB - 8, u32::MAX, WRITE, 0)), "is outside"),
        (one(desc(0x4000, 16, NEXT, 0)), "does not end"),
        (one(desc(0x4000, 16, NEXT, 8)), "descriptor 8 of a ring"),
        (one(desc(TABLE, 16, INDIRECT | NEXT, 1)), "odd or nested"),
        (in_table(table(0), good), "odd or nested"),
        (in_table(table(24), good), "odd or nested"),
        (in_table(table(16), desc(TABLE, 16, INDIRECT, 0)), "nested"),
        (in_table(table(16), desc(0x4000, 1, NEXT, 1)), "odd"),
        (in_table(table(16), desc(0x4000, 1, NEXT, 0)), "not end"),
        (
            in_table(desc(HIGH + MIB - 8, 16, INDIRECT, 0), good),
            "no memory",
        ),
        (in_table(desc(u64::MAX, 16, INDIRECT, 0), good), "no memory"),
    ] {
        let line = found.to_string();
        assert!(line.contains(expected), "{line}, not {expected}");
    }
    let order = fault(|bench| {
        bench.put(0, desc(0x4000, 16, WRITE | NEXT, 1));
        bench.put(1, desc(0x4000, 16, 0, 0));
        bench.submit(0);
    });
    assert_eq!(order, Fault::Order { head: 0 });
}

#[test]
fn a_descriptor_is_not_in_two_requests_at_a_time() {
    let twice = fault(|bench| {
        bench.disk_read(0, 0x6000, 16);
        bench.submit(0);
    });
    assert_eq!(twice, Fault::InUse { index: 0 });
    let shared = fault(|bench| {
        bench.disk_read(0, 0x6000, 16);
        bench.submit(1);
    });
    assert_eq!(shared, Fault::InUse { index: 1 });
}

#[test]
fn a_backend_that_makes_no_sense_ends_the_queue() {
    for (id, len) in [
        (1, 0),
        (SIZE.into(), 0),
        (u32::MAX, u32::MAX),
        (0x1_0000, 0),
    ] {
        let mut bench = bench();
        bench.disk_read(0, 0x6000, 16);
        bench.queue.forward().unwrap();
        bench.backend.give(id, len);
        let fault = bench.queue.give_back().unwrap_err();
        assert_eq!(fault, Fault::NotInFlight { id });
        assert_eq!(bench.used().0, 0);
    }
    let mut bench = bench();
    bench.backend.publish(SIZE + 1);
    let fault = bench.queue.give_back().unwrap_err();
    assert!(matches!(fault, Fault::UsedIndex { .. }), "{fault}");
    // The same request twice.
    let mut bench = self::bench();
    bench.disk_read(0, 0x6000, 16);
    bench.queue.forward().unwrap();
    bench.backend.give(0, 0);
    bench.backend.give(0, 0);
    let fault = bench.queue.give_back().unwrap_err();
    assert_eq!(fault, Fault::NotInFlight { id: 0 });
}

/// Many requests of every shape, answered in any order: each byte arrives where it belongs, for longer than indexes
/// take to wrap.
#[test]
fn a_long_run_loses_and_repeats_nothing() {
    let mut bench = bench_with(true, 12, false);
    let mut random = 0x9e37_79b9_7f4a_7c15;
    let mut held: Vec<(u16, Vec<Desc>)> = Vec::new();
    let mut free: Vec<u16> = vec![0, 2, 4, 6];
    let (mut sent, mut done) = (0_u64, 0_u64);
    for pass in 0.. {
        if done >= 70_000 {
            break;
        }
        assert!(pass < 1_000_000, "stuck after {done}");
        while !free.is_empty() && !next(&mut random).is_multiple_of(4) {
            let head = free.swap_remove(next(&mut random) as usize % free.len());
            let base = HIGH + 0x8000 * u64::from(head);
            let (len, room) = (
                next(&mut random) as u32 % 6000,
                next(&mut random) as u32 % 9000,
            );
            bench.fill(base, 8, (sent % 251) as u8);
            bench.put(head, desc(base, 8 + len % 64, NEXT, head + 1));
            bench.put(head + 1, desc(base + 0x4000, room, WRITE, 0));
            bench.submit(head);
            sent += 1;
        }
        bench.queue.forward().unwrap();
        held.extend(std::iter::from_fn(|| bench.backend.take()));
        while !held.is_empty() && !next(&mut random).is_multiple_of(3) {
            let (head, buffers) = held.swap_remove(next(&mut random) as usize % held.len());
            let at = GuestAddress(buffers[0].addr);
            let tag: u8 = bench.backend.memory.read_obj(at).unwrap();
            bench.write_as_backend(&buffers[1], tag);
            bench.backend.give(head.into(), buffers[1].len);
            bench.queue.give_back().unwrap();
            done += 1;
            let (index, id, len) = bench.used();
            assert_eq!((u64::from(index), id), (done % 0x1_0000, head.into()));
            let base = HIGH + 0x8000 * u64::from(head);
            let sent_tag = bench.read(base, 1)[0];
            assert!(
                bench
                    .read(base + 0x4000, len as usize)
                    .iter()
                    .all(|&b| b == sent_tag)
            );
            free.push(head);
        }
    }
    assert_eq!(
        bench.count("shadow_requests"),
        done + bench.queue.in_flight() as u64
    );
}

/// The fuzz target's way in, with a few thousand inputs that begin as something sensible.
#[test]
fn whatever_a_guest_writes_the_queue_stands() {
    let mut random = 0x0dd0_5eed_1234_5679;
    for _ in 0..3000 {
        let mut data = vec![0; 0x800];
        data[..10].copy_from_slice(&[3, 9, 1, 0, 2, 5, 1, 3, 1, 4]);
        data[0] = next(&mut random) as u8;
        let image = &mut data[10..];
        for index in 0..8_usize {
            let gpa = next(&mut random) % 0x7000;
            image[16 * index..][..8].copy_from_slice(&gpa.to_le_bytes());
            image[16 * index + 8] = next(&mut random) as u8;
            image[16 * index + 12] = next(&mut random) as u8 % 8;
            image[16 * index + 14] = next(&mut random) as u8 % 9;
            image[0x84 + 2 * index] = next(&mut random) as u8 % 8;
        }
        image[0x82] = next(&mut random) as u8 % 9;
        for _ in 0..next(&mut random) % 6 {
            let at = next(&mut random) as usize % 0x200;
            image[at] = next(&mut random) as u8;
        }
        fuzz::guest_ring(&data);
    }
}
