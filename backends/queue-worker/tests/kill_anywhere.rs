//! A process that is killed between any two instructions, from taking a request to answering it and
//! while it takes a ring over, leaves a ring on which its successor answers each request once.
//!
//! ```text
//!   this test                             itself again, as a child
//!   PTRACE_SINGLESTEP ──────────────────▶ takes, answers, gives up, takes over, answers …
//!   after each step: shared memory changed?
//!     └─ yes: a copy of it, as it would be had the child died here ─▶ successor ─▶ count
//! ```
#![expect(unsafe_code, reason = "ptrace")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use berth_queue_worker::guest_memory::Region;
use berth_queue_worker::inflight::{self, InflightRegion};
use berth_queue_worker::protocol::message::InflightInfo;
use berth_queue_worker::testing::{Buffer, DriverQueue, GuestRam};
use berth_queue_worker::{Chain, GuestMemory, Ring, RingLayout};

const SIZE: u16 = 16;
const REQUESTS: u16 = 8;
/// Set for the child: the parent's process id and its two files.
const CHILD: &str = "BERTH_TEST_CHILD";

/// What driver, frontend and backends share: guest memory with one ring, and the region.
struct World {
    ram: Arc<GuestRam>,
    queue: DriverQueue,
    file: OwnedFd,
    info: InflightInfo,
}

impl World {
    /// The same addresses each time.
    fn new() -> World {
        let ram = Arc::new(GuestRam::new(0x10_0000, 0x4000));
        let (file, info) = inflight::allocate(1, SIZE).unwrap();
        World {
            queue: DriverQueue::new(&ram, 0, SIZE, 0),
            ram,
            file,
            info,
        }
    }

    /// All that a kill leaves: descriptors, rings, region.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.ram.read(self.ram.info().gpa, 0x1000);
        let region = File::from(self.file.try_clone().unwrap());
        let at = bytes.len();
        bytes.resize(at + self.info.map_size as usize, 0);
        region.read_exact_at(&mut bytes[at..], 0).unwrap();
        bytes
    }

    fn of_bytes(bytes: &[u8]) -> World {
        let world = World::new();
        world.ram.write(world.ram.info().gpa, &bytes[..0x1000]);
        let region = File::from(world.file.try_clone().unwrap());
        region.write_all_at(&bytes[0x1000..], 0).unwrap();
        world
    }

    fn u16_at(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.ram.read(gpa, 2).try_into().unwrap())
    }

    /// Heads in the available ring and in the used ring, each with how often it is there.
    fn counts(&self) -> [BTreeMap<u16, u32>; 2] {
        let [_, avail, used] = self.queue.gpas();
        [(avail, 2), (used, 8)].map(|(ring, entry)| {
            let mut counts = BTreeMap::new();
            for n in 0..u64::from(self.u16_at(ring + 2)) {
                let head = self.u16_at(ring + 4 + entry * n);
                *counts.entry(head).or_insert(0) += 1;
            }
            counts
        })
    }

    /// The driver offers again what it has got back.
    fn offer_answered_again(&mut self) {
        let [_, avail, used] = self.queue.gpas();
        self.queue.set_avail_idx(self.u16_at(avail + 2));
        for n in 0..self.u16_at(used + 2) {
            let head = self.u16_at(used + 4 + 8 * u64::from(n));
            self.queue.offer(head);
        }
    }
}

/// What a backend needs of a [`World`].
struct Backend {
    memory: Rc<GuestMemory>,
    region: Arc<InflightRegion>,
    layout: RingLayout,
}

impl Backend {
    fn new(world: &World, ram: &OwnedFd, file: &OwnedFd) -> Backend {
        let region = Region::map(world.ram.info(), ram).unwrap();
        let [desc_uva, avail_uva, used_uva] = world.queue.uvas();
        Backend {
            memory: Rc::new(GuestMemory::default().with(region).unwrap()),
            region: Arc::new(InflightRegion::map(world.info, file).unwrap()),
            layout: RingLayout {
                size: SIZE,
                desc_uva,
                avail_uva,
                used_uva,
            },
        }
    }

    /// What a process that has just started does; its frontend gives the used index as base.
    fn take_over(&self, base: u16) -> Ring {
        let ring = Ring::new(self.layout, base, 0, Rc::clone(&self.memory)).unwrap();
        ring.tracked(Arc::clone(&self.region), 0).unwrap()
    }
}

fn answer(ring: &mut Ring, chains: &[Chain]) {
    for chain in chains {
        ring.push_used(chain.head(), 8).unwrap();
    }
    ring.publish().unwrap();
}

fn take(ring: &mut Ring, count: usize) -> Vec<Chain> {
    (0..count).map(|_| ring.pop().unwrap().unwrap()).collect()
}

/// Four processes in a row, each but the last leaving things undone.
fn live(backend: &Backend) {
    let mut ring = backend.take_over(0);
    let mut chains = take(&mut ring, 3);
    answer(&mut ring, &chains[1..2]);
    chains.extend(take(&mut ring, 2));
    answer(&mut ring, &[chains.remove(4), chains.remove(2)]);
    ring.push_used(chains[0].head(), 8).unwrap();
    // Out of order: 0 and 3 are in flight.
    let mut ring = backend.take_over(3);
    let mut chains = take(&mut ring, 3);
    ring.put_back(1);
    answer(&mut ring, &[chains.remove(1)]);
    // In order: 0 is in flight, and 5 is next.
    let mut ring = backend.take_over(4);
    let chains = take(&mut ring, 3);
    answer(&mut ring, &chains[..1]);
    let mut ring = backend.take_over(5);
    let chains = take(&mut ring, 3);
    answer(&mut ring, &chains);
}

/// The child's part: does not come back.
fn child(spec: &str) -> ! {
    let numbers: Vec<i64> = spec.split(',').map(|n| n.parse().unwrap()).collect();
    let open = |fd: i64| {
        let path = format!("/proc/{}/fd/{fd}", numbers[0]);
        let file = File::options().read(true).write(true).open(path);
        OwnedFd::from(file.unwrap())
    };
    let backend = Backend::new(&World::new(), &open(numbers[1]), &open(numbers[2]));
    // SAFETY: no memory is involved; the parent waits for the stop.
    unsafe {
        if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 {
            eprintln!("skipped: nothing can be traced here");
            libc::_exit(0);
        }
        libc::raise(libc::SIGSTOP);
    }
    live(&backend);
    // SAFETY: ends the process, whose other threads do nothing.
    unsafe { libc::_exit(0) }
}

/// The thread that has stopped, of this id or of any for -1; none where it has ended.
fn wait_stopped(thread: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: status is valid for the call.
    let got = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
    assert!(got > 0, "{}", std::io::Error::last_os_error());
    if libc::WIFSTOPPED(status) {
        return Some(got);
    }
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
    None
}

fn step(thread: i32) {
    // SAFETY: the child is stopped; no memory is involved.
    let result = unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, thread, 0, 0) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// A successor finds these bytes and does all there is to do.
fn check(bytes: &[u8], driver_goes_on: bool) {
    let mut world = World::of_bytes(bytes);
    if driver_goes_on {
        world.offer_answered_again();
    }
    let ram = world.ram.fd().try_clone_to_owned().unwrap();
    let backend = Backend::new(&world, &ram, &world.file);
    let mut ring = backend.take_over(world.queue.used_idx());
    let chains: Vec<Chain> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
    answer(&mut ring, &chains);
    let [offered, answered] = world.counts();
    assert_eq!(offered, answered, "driver goes on: {driver_goes_on}");
    // And leaves nothing to the next.
    let mut ring = backend.take_over(world.queue.used_idx());
    assert!(ring.pop().unwrap().is_none());
}

#[test]
fn killed_between_any_two_instructions_every_request_is_answered_once() {
    if let Ok(spec) = std::env::var(CHILD) {
        child(&spec);
    }
    let mut world = World::new();
    for _ in 0..REQUESTS {
        let buffer = Buffer::writable(world.ram.info().gpa, 8);
        world.queue.add(&[buffer]).unwrap();
    }
    let fds: [RawFd; 2] = [world.ram.fd().as_raw_fd(), world.file.as_raw_fd()];
    let spec = format!("{},{},{}", std::process::id(), fds[0], fds[1]);
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "killed_between_any_two_instructions_every_request_is_answered_once";
    command.args([name, "--exact"]).env(CHILD, spec);
    let mut process = command.spawn().unwrap();
    // The thread of the test, which is the one that is traced.
    let Some(thread) = wait_stopped(-1) else {
        let _ = process.wait();
        return;
    };
    // SAFETY: as above. A test that fails takes the child along.
    unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, thread, 0, libc::PTRACE_O_EXITKILL) };
    let mut before = world.bytes();
    let (mut steps, mut states) = (0_u64, 0_u64);
    loop {
        let now = world.bytes();
        if now != before || steps == 0 {
            states += 1;
            check(&now, false);
            check(&now, true);
            before = now;
        }
        step(thread);
        steps += 1;
        if wait_stopped(thread).is_none() {
            break;
        }
    }
    process.wait().unwrap();
    println!("{steps} instructions, {states} states of memory");
    let [offered, answered] = world.counts();
    assert_eq!(offered, answered, "the last process finished");
    // Each request is marked, numbered, listed and cleared.
    assert!(states > 4 * u64::from(REQUESTS), "{states} states");
}
