//! The device over rings that a test writes by hand.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempdir::TempDir;

use super::Rng;
use crate::devices::virtio::device::{Activation, VirtioDevice};
use crate::devices::virtio::fake_driver::{self, FakeQueue, FakeTransport, SIZE, wait};

const BUFFERS: u64 = 0x1_0000;
const MEMORY: usize = 0x10_0000;

struct Bench {
    rng: Rng,
    memory: GuestMemoryMmap,
    queue: FakeQueue,
    notes: Arc<FakeTransport>,
}

fn bench(source: &std::path::Path) -> Bench {
    let mut rng = Rng::new("_rng", source).unwrap();
    let notes = Arc::new(FakeTransport::new());
    rng.attach(Arc::clone(&notes) as _);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    Bench {
        rng,
        queue: FakeQueue::new(0, &memory, 0),
        memory,
        notes,
    }
}

impl Bench {
    fn start(&mut self) {
        let activation = Activation {
            features: self.rng.features(),
            queues: vec![self.queue.setup()],
            memory: self.memory.clone(),
        };
        self.rng.activate(activation).unwrap();
    }

    fn stop(&mut self) {
        fake_driver::stop(&mut self.rng);
    }
}

/// A file that holds this many bytes of 0x5a.
fn source(dir: &TempDir, len: usize) -> PathBuf {
    let path = dir.as_path().join("source");
    std::fs::write(&path, vec![0x5a; len]).unwrap();
    path
}

#[test]
fn buffers_are_filled_chains_too_and_again_after_a_reset() {
    let dir = TempDir::new().unwrap();
    let mut bench = bench(&source(&dir, 1 << 20));
    for _ in 0..2 {
        bench.start();
        bench.queue.desc(0, (BUFFERS, 64), VRING_DESC_F_WRITE, 0);
        bench.queue.submit(0);
        wait(&bench.queue.call);
        assert_eq!(bench.queue.last_used(), (0, 64));
        bench
            .queue
            .desc(1, (BUFFERS, 100), VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2);
        bench
            .queue
            .desc(2, (BUFFERS + 0x5000, 5000), VRING_DESC_F_WRITE, 0);
        bench.queue.submit(1);
        wait(&bench.queue.call);
        assert_eq!(bench.queue.last_used(), (1, 5100));
        let mut end = [0; 2];
        let last = GuestAddress(BUFFERS + 0x5000 + 4999);
        bench.memory.read_slice(&mut end, last).unwrap();
        assert_eq!(end, [0x5a, 0]);
        bench.stop();
        bench.queue.clear();
    }
}

#[test]
fn what_was_available_before_the_start_is_served() {
    let mut bench = bench("/dev/urandom".as_ref());
    bench.queue.desc(0, (BUFFERS, 16), VRING_DESC_F_WRITE, 0);
    bench.queue.submit(0);
    bench.queue.kick.read().unwrap();
    bench.start();
    wait(&bench.queue.call);
    assert_eq!(bench.queue.last_used(), (0, 16));
}

#[test]
fn a_buffer_that_is_huge_gets_a_part() {
    let mut bench = bench("/dev/urandom".as_ref());
    bench
        .queue
        .desc(0, (BUFFERS, 0x2_0000), VRING_DESC_F_WRITE, 0);
    bench.start();
    bench.queue.submit(0);
    wait(&bench.queue.call);
    assert_eq!(bench.queue.last_used(), (0, 64 << 10));
}

#[test]
fn rings_that_make_no_sense_need_a_reset() {
    type Break = fn(&mut Bench);
    let breaks: [Break; 4] = [
        // A head that is no descriptor.
        |bench| bench.queue.submit(SIZE),
        // More available than the ring holds.
        |bench| {
            bench.queue.announce(SIZE + 1);
        },
        // A buffer outside memory.
        |bench| {
            bench
                .queue
                .desc(0, (MEMORY as u64 - 8, 64), VRING_DESC_F_WRITE, 0);
            bench.queue.submit(0);
        },
        // A buffer at the end of the address space.
        |bench| {
            bench
                .queue
                .desc(0, (u64::MAX - 8, 64), VRING_DESC_F_WRITE, 0);
            bench.queue.submit(0);
        },
    ];
    for hurt in breaks {
        let mut bench = bench("/dev/urandom".as_ref());
        bench.start();
        hurt(&mut bench);
        wait(&bench.notes.needs_reset);
        bench.stop();
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let mut bench = bench("/dev/urandom".as_ref());
    bench
        .queue
        .desc(0, (BUFFERS, 1), VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 0);
    bench.start();
    bench.queue.submit(0);
    wait(&bench.queue.call);
    bench.stop();
}

#[test]
fn a_source_that_ends_needs_a_reset() {
    let dir = TempDir::new().unwrap();
    let mut bench = bench(&source(&dir, 10));
    bench.queue.desc(0, (BUFFERS, 64), VRING_DESC_F_WRITE, 0);
    bench.start();
    bench.queue.submit(0);
    wait(&bench.notes.needs_reset);
    bench.stop();
}

#[test]
fn a_source_that_has_nothing_holds_up_the_guest_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let options = || std::fs::OpenOptions::new();
    let mut writer = options().read(true).write(true).open(&path).unwrap();
    let mut bench = bench(&path);
    bench.queue.desc(0, (BUFFERS, 8), VRING_DESC_F_WRITE, 0);
    bench.start();
    bench.queue.submit(0);
    bench.stop();
    bench.start();
    writer.write_all(b"12345678").unwrap();
    wait(&bench.queue.call);
    assert_eq!(bench.queue.last_used(), (0, 8));
    // Dry again, and filled while it is watched.
    bench.queue.submit(0);
    writer.write_all(b"12345678").unwrap();
    wait(&bench.queue.call);
    assert_eq!(bench.queue.last_used(), (0, 8));
}

#[test]
fn what_is_no_source_is_refused_in_one_line() {
    let error = |path: &str| Rng::new("_rng", path.as_ref()).err().unwrap().to_string();
    assert_eq!(
        error("/nowhere/x"),
        "cannot open /nowhere/x as a source of entropy"
    );
    assert_eq!(
        error("/proc"),
        "/proc is a directory, not a source of entropy"
    );
}
