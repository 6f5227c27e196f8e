//! Requests in flight survive the process that took them: every kill gives each request one used
//! entry, in the order of the ring, whatever is left behind.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use berth_queue_worker::guest_memory::{Region, RegionInfo};
use berth_queue_worker::inflight::{self, InflightRegion};
use berth_queue_worker::protocol::message::InflightInfo;
use berth_queue_worker::session::SessionError;
use berth_queue_worker::testing::{
    Buffer, DriverQueue, Echo, FakeDriver, GuestRam, Inflight, Setup, serve,
};
use berth_queue_worker::{Chain, Device, GuestMemory, Metrics, Ring, RingError, RingLayout};

const SIZE: u16 = 8;

/// A driver, and what a frontend keeps for the next backend.
struct Bench {
    ram: Arc<GuestRam>,
    queue: DriverQueue,
    region: Inflight,
    /// Requests offered, by head.
    waiting: BTreeMap<u16, u64>,
    offered: u64,
}

/// What a backend that has just started makes of a ring; frontends give the used index as base.
fn take_over(ram: &GuestRam, queue: &DriverQueue, region: &Inflight) -> Result<Ring, RingError> {
    let region = InflightRegion::map(region.info, &region.file).unwrap();
    untracked(ram, queue)?.tracked(Arc::new(region), 0)
}

/// The same without a region.
fn untracked(ram: &GuestRam, queue: &DriverQueue) -> Result<Ring, RingError> {
    let memory = Region::map(ram.info(), &ram.fd().try_clone_to_owned().unwrap()).unwrap();
    let memory = GuestMemory::default().with(memory).unwrap();
    let [desc_uva, avail_uva, used_uva] = queue.uvas();
    let layout = RingLayout {
        size: queue.size(),
        desc_uva,
        avail_uva,
        used_uva,
    };
    Ring::new(layout, queue.used_idx(), 0, Rc::new(memory))
}

impl Bench {
    fn new() -> Bench {
        let ram = Arc::new(GuestRam::new(0x10_0000, 1 << 20));
        let (file, info) = inflight::allocate(1, SIZE).unwrap();
        Bench {
            queue: DriverQueue::new(&ram, 0, SIZE, 0),
            ram,
            region: Inflight { file, info },
            waiting: BTreeMap::new(),
            offered: 0,
        }
    }

    /// What a backend that has just started makes of it.
    fn try_ring(&self) -> Result<Ring, RingError> {
        take_over(&self.ram, &self.queue, &self.region)
    }

    fn ring(&self) -> Ring {
        self.try_ring().unwrap()
    }

    /// Offers a request; its number.
    fn offer(&mut self) -> u64 {
        let buffer = Buffer::writable(self.ram.info().gpa, 8);
        let head = self.queue.add(&[buffer]).unwrap();
        self.offered += 1;
        assert!(self.waiting.insert(head, self.offered).is_none());
        self.offered
    }

    /// Numbers of the requests answered since this was asked last.
    fn answered(&mut self) -> Vec<u64> {
        std::iter::from_fn(|| self.queue.poll_used())
            .map(|(head, _)| self.waiting.remove(&head).expect("answered twice"))
            .collect()
    }

    /// Number of the request that a chain holds.
    fn number(&self, chain: &Chain) -> u64 {
        self.waiting[&chain.head()]
    }

    /// Pops everything there is: the requests' numbers.
    fn pop_all(&self, ring: &mut Ring) -> Vec<Chain> {
        std::iter::from_fn(|| ring.pop().unwrap()).collect()
    }

    fn numbers(&self, chains: &[Chain]) -> Vec<u64> {
        chains.iter().map(|chain| self.number(chain)).collect()
    }

    /// The region as bytes.
    fn bytes(&self) -> Region {
        let place = RegionInfo {
            gpa: 0,
            size: self.region.info.map_size,
            uva: 0,
            file_offset: 0,
        };
        Region::map(place, &self.region.file).unwrap()
    }
}

#[test]
fn what_was_taken_in_order_is_taken_again_in_order() {
    let mut bench = Bench::new();
    for round in 0..50 {
        let mut ring = bench.ring();
        for _ in bench.waiting.len()..5 {
            bench.offer();
        }
        let chains = bench.pop_all(&mut ring);
        let first = 1 + 2 * round;
        assert_eq!(bench.numbers(&chains), Vec::from_iter(first..first + 5));
        for chain in &chains[..2] {
            ring.push_used(chain.head(), 8).unwrap();
        }
        ring.publish().unwrap();
        assert_eq!(bench.answered(), [first, first + 1]);
        // The process dies here, with three in flight.
    }
}

#[test]
fn what_was_answered_out_of_order_is_not_taken_again() {
    let mut bench = Bench::new();
    let mut ring = bench.ring();
    for _ in 0..6 {
        bench.offer();
    }
    let chains = bench.pop_all(&mut ring);
    for n in [4, 1] {
        ring.push_used(chains[n].head(), 8).unwrap();
    }
    ring.publish().unwrap();
    assert_eq!(bench.answered(), [5, 2]);
    // Two more in the places of those; one is taken by the second process, which then dies, too.
    bench.offer();
    bench.offer();
    let mut ring = bench.ring();
    assert_eq!(ring.num_available().unwrap(), 6);
    let mut again = Vec::from_iter((0..5).map(|_| ring.pop().unwrap().unwrap()));
    assert_eq!(bench.numbers(&again), [1, 3, 4, 6, 7]);
    ring.push_used(again.remove(2).head(), 8).unwrap();
    ring.publish().unwrap();
    assert_eq!(bench.answered(), [4]);
    let mut ring = bench.ring();
    let third = bench.pop_all(&mut ring);
    assert_eq!(bench.numbers(&third), [1, 3, 6, 7, 8]);
    for chain in &third {
        ring.push_used(chain.head(), 8).unwrap();
    }
    ring.publish().unwrap();
    assert_eq!(bench.answered(), [1, 3, 6, 7, 8]);
    assert_eq!(bench.pop_all(&mut bench.ring()).len(), 0);
    assert_eq!(bench.ring().next_avail(), 8);
}

#[test]
fn what_was_put_back_is_not_in_flight() {
    let mut bench = Bench::new();
    let mut ring = bench.ring();
    for _ in 0..5 {
        bench.offer();
    }
    let chains = bench.pop_all(&mut ring);
    ring.put_back(2);
    assert_eq!(ring.next_avail(), 3);
    ring.push_used(chains[1].head(), 8).unwrap();
    ring.publish().unwrap();
    assert_eq!(bench.answered(), [2]);
    // In flight: 1 and 3. Put back: 4 and 5, and by the next process 3 as well.
    let mut ring = bench.ring();
    let again = Vec::from_iter((0..3).map(|_| ring.pop().unwrap().unwrap()));
    assert_eq!(bench.numbers(&again), [1, 3, 4]);
    ring.put_back(2);
    let again = bench.pop_all(&mut ring);
    assert_eq!(bench.numbers(&again), [3, 4, 5]);
    ring.put_back(4);
    assert_eq!(ring.num_available().unwrap(), 4);
    let again = bench.pop_all(&mut bench.ring());
    assert_eq!(bench.numbers(&again), [1, 3, 4, 5]);
}

#[test]
fn ring_that_was_run_without_a_region_can_be_given_one() {
    let mut bench = Bench::new();
    let mut ring = bench.ring();
    for _ in 0..20 {
        bench.offer();
        let chain = ring.pop().unwrap().unwrap();
        ring.push_used(chain.head(), 8).unwrap();
        ring.publish().unwrap();
        bench.answered();
    }
    (bench.region.file, bench.region.info) = inflight::allocate(1, SIZE).unwrap();
    let mut ring = bench.ring();
    assert_eq!(ring.next_avail(), 20);
    bench.offer();
    ring.pop().unwrap().unwrap();
    assert_eq!(bench.numbers(&bench.pop_all(&mut bench.ring())), [21]);
}

#[test]
fn hostile_regions_break_the_ring_or_do_nothing() {
    const VERSION: usize = 8;
    const LAST_BATCH_HEAD: usize = 12;
    const USED_IDX: usize = 14;
    const FIRST: usize = 16;
    type Attack = fn(berth_queue_worker::GuestSlice);
    let attacks: [(&str, bool, Attack); 7] = [
        ("an unknown version", false, |b| {
            b.store(VERSION, 2u16).unwrap();
        }),
        ("a batch that begins outside", false, |b| {
            b.store(USED_IDX, 0u16).unwrap();
            b.store(LAST_BATCH_HEAD, SIZE).unwrap();
        }),
        ("a batch that leads outside", false, |b| {
            b.store(USED_IDX, 0u16).unwrap();
            for n in 0..usize::from(SIZE) {
                b.store(FIRST + 16 * n + 6, 0xffffu16).unwrap();
            }
        }),
        ("a batch in a circle", true, |b| {
            b.store(USED_IDX, 0u16).unwrap();
            for n in 0..usize::from(SIZE) {
                b.store(FIRST + 16 * n + 6, 0u16).unwrap();
            }
            b.store(LAST_BATCH_HEAD, 0u16).unwrap();
        }),
        ("another ring's index", false, |b| {
            b.store(USED_IDX, 500u16).unwrap();
        }),
        ("everything in flight, numbers equal", true, |b| {
            for n in 0..usize::from(SIZE) {
                b.store(FIRST + 16 * n, 1u8).unwrap();
                b.store(FIRST + 16 * n + 8, u64::MAX).unwrap();
            }
        }),
        ("all ones", false, |b| b.fill(0, b.len(), 0xff).unwrap()),
    ];
    for (what, goes_on, attack) in attacks {
        let mut bench = Bench::new();
        let mut ring = bench.ring();
        for _ in 0..4 {
            bench.offer();
        }
        let chains = bench.pop_all(&mut ring);
        for chain in &chains[1..3] {
            ring.push_used(chain.head(), 8).unwrap();
        }
        ring.publish().unwrap();
        attack(bench.bytes().as_slice());
        let ring = bench.try_ring();
        assert_eq!(ring.is_ok(), goes_on, "{what}: {ring:?}");
        let Ok(mut ring) = ring else { continue };
        // Each mark counts once, whatever the list and the numbers say.
        let mut popped = 0;
        while let Ok(Some(chain)) = ring.pop() {
            popped += 1;
            ring.push_used(chain.head(), 0).unwrap();
        }
        ring.publish().unwrap();
        assert!(popped <= 2 * SIZE, "{what}: {popped}");
    }
}

#[test]
fn ring_larger_than_its_part_of_the_region_is_refused() {
    let mut bench = Bench::new();
    // The frontend says that there is no more than a header and three entries.
    bench.region.info.map_size = 64;
    let error = bench.try_ring().unwrap_err();
    assert!(matches!(error, RingError::Inflight(_)), "{error}");
}

#[test]
fn in_flight_region_that_is_cut_off_ends_its_session_only() {
    let (device, metrics) = (Echo::new(1), Metrics::new(Echo::NAME, 1));
    for _ in 0..3 {
        let mut driver = FakeDriver::start(Arc::clone(&device), &metrics, Setup::default());
        driver.frontend.stop_queue(0);
        // A region that the frontend made itself, and did not seal.
        let memory = GuestRam::new(0, 0x4000);
        let region = Inflight {
            file: memory.fd().try_clone_to_owned().unwrap(),
            info: InflightInfo {
                map_size: 0x4000,
                map_offset: 0,
                num_queues: 1,
                queue_size: 128,
            },
        };
        assert_eq!(driver.frontend.set_inflight(&region), 0);
        let features = driver.features;
        driver.frontend.start_queue(&driver.queues[0], 0, features);
        driver.queues[0].run(&[Buffer::writable(driver.ram.info().gpa, 8)]);
        memory.truncate();
        driver.queues[0].add(&[Buffer::writable(0, 0)]).unwrap();
        driver.queues[0].kick();
        assert!(driver.frontend.is_closed());
        let error = driver.finish().unwrap();
        assert!(matches!(error, SessionError::MemoryLost), "{error}");
    }
}

#[test]
fn ring_that_is_stopped_has_nothing_in_flight_even_of_an_earlier_process() {
    let setup = Setup {
        inflight: true,
        ..Setup::default()
    };
    for round in 0..20 {
        let (device, metrics) = (Echo::new(1), Metrics::new(Echo::NAME, 1));
        let mut driver = FakeDriver::start(Arc::clone(&device), &metrics, setup);
        driver.frontend.stop_queue(0);
        driver.queues[0].reset();
        for _ in 0..4 {
            let out = driver.ram.alloc(8, 8);
            driver.queues[0].add(&[Buffer::writable(out, 8)]).unwrap();
        }
        // A process took all four, answered the second and died.
        {
            let region = driver.inflight.insert(driver.frontend.get_inflight(1, 128));
            let mut ring = take_over(&driver.ram, &driver.queues[0], region).unwrap();
            let taken: Vec<_> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
            ring.push_used(taken[1].head(), 0).unwrap();
            ring.publish().unwrap();
        }
        assert!(driver.queues[0].poll_used().is_some());
        let (frontend, session) = serve(Arc::clone(&device), &metrics);
        driver.resume(frontend);
        assert_eq!(driver.frontend.stop_queue(0), 4, "round {round}");
        assert_eq!(driver.queues[0].used_idx(), 4, "round {round}");
        let left = std::iter::from_fn(|| driver.queues[0].poll_used()).count();
        assert_eq!(left, 3);
        driver.frontend.disconnect();
        session.join().unwrap();
    }
}

#[test]
#[ignore = "a measurement: run it alone, in release"]
fn what_noting_costs() {
    const BATCH: u16 = 128;
    const ROUNDS: u32 = 20_000;
    let ram = Arc::new(GuestRam::new(0x10_0000, 1 << 20));
    let mut queues = [0, 1].map(|n| DriverQueue::new(&ram, n, BATCH, 0));
    let (file, info) = inflight::allocate(1, BATCH).unwrap();
    let region = Inflight { file, info };
    let mut rings = [
        untracked(&ram, &queues[0]).unwrap(),
        take_over(&ram, &queues[1], &region).unwrap(),
    ];
    let mut chains: Vec<Chain> = (0..BATCH).map(|_| Chain::new()).collect();
    let mut spent = [std::time::Duration::ZERO; 2];
    for round in 0..2 * ROUNDS {
        let which = (round % 2) as usize;
        let (queue, ring) = (&mut queues[which], &mut rings[which]);
        for _ in 0..BATCH {
            queue.add(&[Buffer::writable(ram.info().gpa, 8)]).unwrap();
        }
        let begin = std::time::Instant::now();
        for chain in &mut chains {
            assert!(ring.pop_into(chain).unwrap());
        }
        for chain in &chains {
            ring.push_used(chain.head(), 8).unwrap();
        }
        ring.publish().unwrap();
        spent[which] += begin.elapsed();
        while queue.poll_used().is_some() {}
    }
    let each = spent.map(|time| time.as_secs_f64() * 1e9 / f64::from(ROUNDS * u32::from(BATCH)));
    println!("a request costs {:.1} ns, noted {:.1} ns", each[0], each[1]);
}
