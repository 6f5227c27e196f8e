//! The device over rings that a test writes by hand.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::rings::Lent;
use super::shared::Polling;
use super::{Balloon, F_PAGE_POISON, F_REPORTING, Handle, PAGE};
use crate::config::{MemoryConfig, convert};
use crate::devices::virtio::device::{Activation, ResetProgress, VirtioDevice};
use crate::devices::virtio::fake_driver::{self, FakeQueue, FakeTransport, SIZE, eventfd, wait};
use crate::memory::GuestRam;

const HUGE_PAGE: u64 = 2 << 20;
const MEMORY: usize = 16 << 20;
/// Rings of each queue, and buffers after all of them.
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
/// Pages that tests give away begin here.
const PAGES: u64 = 4 << 20;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;

struct Bench {
    balloon: Balloon,
    handle: Handle,
    memory: GuestMemoryMmap,
    notes: Arc<FakeTransport>,
    queues: Vec<FakeQueue>,
}

/// A balloon with these flags, whose driver uses the queues of these numbers.
fn bench(flags: &str, granule: u64, indices: &[u16]) -> Bench {
    let polling = Polling {
        interval: Duration::ZERO,
        window: Duration::from_secs(3600),
    };
    let config = convert::balloon(flags).unwrap();
    let ram = GuestRam::new(&MemoryConfig::of(MEMORY as u64)).unwrap();
    let memory = ram.memory().clone();
    let lent = Lent { ram, granule };
    let mut balloon = Balloon::polling("_balloon", &config, lent, polling).unwrap();
    let notes = Arc::new(FakeTransport::new());
    balloon.attach(Arc::clone(&notes) as _);
    let queue = |index: &u16| FakeQueue::new(*index, &memory, u64::from(*index) * RINGS);
    let queues = indices.iter().map(queue).collect();
    Bench {
        handle: balloon.handle(),
        balloon,
        memory,
        notes,
        queues,
    }
}

impl Bench {
    fn start(&mut self, features: u64) {
        let activation = Activation {
            features,
            queues: self.queues.iter().map(FakeQueue::setup).collect(),
            memory: self.memory.clone(),
        };
        self.balloon.activate(activation).unwrap();
    }

    fn put<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Gives a buffer of page frame numbers and waits until it is back.
    fn pages(&mut self, place: usize, pfns: &[u32]) {
        for (at, pfn) in (BUFFERS..).step_by(4).zip(pfns) {
            self.put(at, *pfn);
        }
        self.queues[place].desc(0, (BUFFERS, 4 * pfns.len() as u32), 0, 0);
        self.queues[place].submit(0);
        wait(&self.queues[place].call);
        assert_eq!(self.queues[place].used(), self.queues[place].avail);
    }

    /// Fills pages from `PAGES` on.
    fn fill(&self, pages: u64) {
        let bytes = vec![0x5a; (pages * PAGE) as usize];
        self.memory
            .write_slice(&bytes, GuestAddress(PAGES))
            .unwrap();
    }

    /// The pages from `PAGES` on, of which the host has none.
    fn gone(&self, pages: u64) -> Vec<u64> {
        let byte = |page| GuestAddress(PAGES + page * PAGE + 7);
        let read = |page| self.memory.read_obj::<u8>(byte(page)).unwrap();
        (0..pages).filter(|page| read(*page) == 0).collect()
    }

    fn counter(&self, name: &str) -> u64 {
        self.handle.counters()[name]
    }

    fn stop(&mut self) {
        fake_driver::stop(&mut self.balloon);
    }

    fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.balloon.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

fn pfn(page: u64) -> u32 {
    ((PAGES + page * PAGE) / PAGE) as u32
}

#[test]
fn pages_that_are_given_leave_the_host_in_few_calls() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    bench.fill(300);
    let features = bench.balloon.features();
    bench.start(features);
    // In the order in which Linux gives them: from the last to the first, and one apart.
    let mut pfns: Vec<_> = (10..266).rev().map(pfn).collect();
    pfns[0] = pfn(280);
    bench.pages(INFLATE, &pfns);
    let expected: Vec<_> = (10..265).chain([280]).collect();
    assert_eq!(bench.gone(300), expected);
    assert_eq!(bench.counter("discards"), 2);
    assert_eq!(bench.counter("discarded_bytes"), 256 * PAGE);
    assert_eq!(bench.counter("inflated_pages"), 256);
    bench.pages(DEFLATE, &pfns[..16]);
    assert_eq!(bench.counter("deflated_pages"), 16);
    bench.stop();
}

#[test]
fn a_target_is_an_interrupt_and_the_guest_says_what_it_gave() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    assert_eq!(bench.config(0), 256);
    let features = bench.balloon.features();
    bench.start(features);
    bench.handle.set_target(3 * PAGE + 5);
    wait(&bench.notes.config_changed);
    assert_eq!((bench.config(0), bench.config(4)), (3, 0));
    bench.balloon.write_config(4, &2u32.to_le_bytes());
    let info = bench.handle.info();
    assert_eq!((info.target_bytes, info.actual_bytes), (3 * PAGE, 2 * PAGE));
    // What the guest took away with it at a reset is its own again.
    bench.stop();
    assert_eq!((bench.config(0), bench.config(4)), (3, 0));
    assert_eq!(bench.config(16), 0);
}

#[test]
fn what_is_no_ram_is_counted_and_the_rest_goes() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    bench.fill(4);
    let features = bench.balloon.features();
    bench.start(features);
    let end = (MEMORY as u64 / PAGE) as u32;
    bench.pages(INFLATE, &[u32::MAX, pfn(1), end, end + 1, pfn(1), 0xfee00]);
    assert_eq!(bench.gone(4), [1]);
    assert_eq!(bench.counter("refused_bytes"), 4 * PAGE);
    assert_eq!(bench.counter("discards_failed"), 0);
    bench.stop();
}

#[test]
fn a_guest_may_give_the_ring_that_it_gives_with() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    let features = bench.balloon.features();
    bench.start(features);
    // Every page of memory: the rings read as zeros from then on, and the device goes by them.
    let pfns: Vec<_> = (0..(MEMORY as u64 / PAGE) as u32).collect();
    for (at, pfn) in (BUFFERS..).step_by(4).zip(&pfns) {
        bench.put(at, *pfn);
    }
    bench.queues[INFLATE].desc(0, (BUFFERS, 4 * pfns.len() as u32), 0, 0);
    bench.queues[INFLATE].submit(0);
    wait(&bench.queues[INFLATE].call);
    assert_eq!(bench.counter("discards"), 1);
    bench.stop();
    bench.queues[INFLATE].avail = 0;
    bench.start(features);
    bench.pages(INFLATE, &[pfn(0)]);
    bench.stop();
}

#[test]
fn a_huge_page_goes_back_whole_and_a_part_of_it_does_not() {
    let mut bench = bench("size=4M", HUGE_PAGE, &[0, 1, 2]);
    let small = HUGE_PAGE / PAGE;
    bench.fill(2 * small);
    let features = bench.balloon.features();
    bench.start(features);
    let most: Vec<_> = (1..small + 1).map(pfn).collect();
    bench.pages(INFLATE, &most);
    assert!(bench.gone(2 * small).is_empty());
    assert_ne!(bench.handle.state(), super::State::default());
    bench.pages(INFLATE, &[pfn(0)]);
    assert_eq!(bench.gone(2 * small).len() as u64, small);
    assert_eq!(bench.counter("discards"), 1);
    // Taken back and given again: whole again only with its last page.
    bench.fill(small);
    bench.pages(DEFLATE, &[pfn(5), pfn(6)]);
    bench.pages(INFLATE, &[pfn(5)]);
    assert!(bench.gone(small).is_empty());
    bench.pages(INFLATE, &[pfn(6)]);
    assert_eq!(bench.gone(small).len() as u64, small);
    bench.stop();
}

#[test]
fn statistics_are_asked_for_while_somebody_wants_to_know() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    let features = bench.balloon.features();
    bench.start(features);
    bench.put(BUFFERS + 0x100, [4u8, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    bench.queues[STATS].desc(0, (BUFFERS + 0x100, 10), 0, 0);
    bench.queues[STATS].submit(0);
    // Nobody wants to know: the buffer stays, whatever else goes on.
    bench.pages(INFLATE, &[pfn(0)]);
    while bench.counter("stats_updates") == 0 {
        std::thread::yield_now();
    }
    bench.pages(INFLATE, &[pfn(1)]);
    assert_eq!(bench.queues[STATS].used(), 0);
    for round in 1..4 {
        let (stats, _) = bench.handle.info().stats.unwrap();
        let value = 8 + u64::from(round);
        assert_eq!(stats.named().collect::<Vec<_>>(), [("free_memory", value)]);
        wait(&bench.queues[STATS].call);
        assert_eq!(bench.queues[STATS].used(), round);
        bench.put(BUFFERS + 0x102, value + 1);
        bench.queues[STATS].submit(0);
        while bench.counter("stats_updates") <= u64::from(round) {
            std::thread::yield_now();
        }
    }
    bench.stop();
    assert_eq!(bench.handle.info().stats, None);
}

/// Reports 8 pages and a half from the second on.
fn report(bench: &mut Bench, place: usize) {
    let half = (PAGES + PAGE, (8 * PAGE + PAGE / 2) as u32);
    let flags = VRING_DESC_F_WRITE | VRING_DESC_F_NEXT;
    bench.queues[place].desc(0, half, flags, 1);
    // And what is not RAM.
    bench.queues[place].desc(1, (1 << 40, 0x2000), VRING_DESC_F_WRITE, 0);
    bench.queues[place].submit(0);
    wait(&bench.queues[place].call);
}

#[test]
fn reported_pages_go_whichever_number_the_driver_gives_the_queue() {
    for indices in [[0, 1, 2, 3], [0, 1, 2, 4]] {
        let mut bench = bench("free_page_reporting=on", PAGE, &indices);
        bench.fill(16);
        assert_eq!(bench.balloon.queue_sizes().len(), 5);
        let features = bench.balloon.features() & !F_PAGE_POISON;
        bench.start(features);
        report(&mut bench, 3);
        assert_eq!(bench.gone(16), (1..9).collect::<Vec<_>>());
        assert_eq!(bench.counter("refused_bytes"), 0x2000);
        bench.stop();
    }
    // One that does not take the queue of statistics leaves its number out, or does not.
    for indices in [[0, 1, 2], [0, 1, 4]] {
        let mut bench = bench("free_page_reporting=on", PAGE, &indices);
        bench.fill(16);
        bench.start(F_REPORTING);
        report(&mut bench, 2);
        assert_eq!(bench.gone(16).len(), 8);
        bench.stop();
    }
}

#[test]
fn a_guest_that_poisons_its_free_pages_keeps_them() {
    for (poison, gone) in [(0xaaaa_aaaa_u32, 0), (0, 8)] {
        let mut bench = bench("free_page_reporting=on", PAGE, &[0, 1, 2, 3]);
        bench.fill(16);
        bench.balloon.write_config(12, &poison.to_le_bytes());
        let features = bench.balloon.features();
        bench.start(features);
        report(&mut bench, 3);
        assert_eq!(bench.gone(16).len(), gone, "{poison:#x}");
        bench.stop();
    }
}

#[test]
fn rings_that_make_no_sense_need_a_reset() {
    type Break = fn(&mut Bench);
    let breaks: [(&str, Break); 6] = [
        ("a head that is no descriptor", |bench| {
            bench.queues[INFLATE].submit(SIZE);
        }),
        ("more available than the ring holds", |bench| {
            bench.queues[DEFLATE].announce(SIZE + 1);
        }),
        ("a buffer outside memory", |bench| {
            bench.queues[INFLATE].desc(0, (MEMORY as u64 - 8, 64), 0, 0);
            bench.queues[INFLATE].submit(0);
        }),
        ("a buffer too long", |bench| {
            bench.queues[INFLATE].desc(0, (0, 8 << 20), 0, 0);
            bench.queues[INFLATE].submit(0);
        }),
        ("statistics without end", |bench| {
            bench.queues[STATS].desc(0, (0, 1 << 20), 0, 0);
            bench.queues[STATS].submit(0);
        }),
        ("free pages that cannot be written", |bench| {
            bench.queues[3].desc(0, (PAGES, 0x1000), 0, 0);
            bench.queues[3].submit(0);
        }),
    ];
    for (what, hurt) in breaks {
        let mut bench = bench("free_page_reporting=on", PAGE, &[0, 1, 2, 3]);
        let features = bench.balloon.features();
        bench.start(features);
        hurt(&mut bench);
        wait(&bench.notes.needs_reset);
        bench.stop();
        // And it serves again.
        for queue in &mut bench.queues {
            queue.clear();
        }
        bench.start(features);
        bench.pages(INFLATE, &[pfn(0)]);
        assert_eq!(bench.counter("inflated_pages"), 1, "{what}");
        bench.stop();
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    let features = bench.balloon.features();
    bench.start(features);
    bench.queues[INFLATE].desc(0, (BUFFERS, 4), VRING_DESC_F_NEXT, 0);
    bench.queues[INFLATE].submit(0);
    wait(&bench.queues[INFLATE].call);
    bench.stop();
}

#[test]
fn resets_before_and_without_a_start_are_over_at_once_and_harm_nothing() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    let features = bench.balloon.features();
    for _ in 0..20 {
        bench.balloon.reset();
        assert_eq!(bench.balloon.reset_progress(), ResetProgress::Done);
        bench.start(features);
        bench.pages(INFLATE, &[pfn(0)]);
        bench.stop();
        bench.queues[INFLATE].clear();
    }
}

#[test]
fn interrupts_go_where_the_driver_wants_them_now() {
    let mut bench = bench("size=1M", PAGE, &[0, 1, 2]);
    let features = bench.balloon.features();
    bench.start(features);
    bench.queues[INFLATE].call = eventfd();
    let call = bench.queues[INFLATE].call.try_clone().unwrap();
    bench.balloon.set_call(0, call);
    bench.pages(INFLATE, &[pfn(0)]);
    bench.stop();
}

#[test]
fn random_queues_stop_nothing() {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as u8
    };
    for _ in 0..200 {
        let data: Vec<u8> = (0..2048).map(|_| next()).collect();
        super::guest_queues(&data);
    }
}
