//! The device over rings that a test writes by hand.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::tempdir::TempDir;

use super::Rng;
use crate::devices::virtio::device::{
    Activation, QueueSetup, ResetProgress, TransportNotify, VirtioDevice,
};

const SIZE: u16 = 8;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
const MEMORY: usize = 0x10_0000;

struct Notes(EventFd);

impl TransportNotify for Notes {
    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.0.write(1).unwrap();
    }
}

struct Bench {
    rng: Rng,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    needs_reset: EventFd,
    avail: u16,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn bench(source: &std::path::Path) -> Bench {
    let mut rng = Rng::new("_rng", source).unwrap();
    let needs_reset = eventfd();
    rng.attach(Arc::new(Notes(needs_reset.try_clone().unwrap())));
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    Bench {
        rng,
        memory,
        kick: eventfd(),
        call: eventfd(),
        needs_reset,
        avail: 0,
    }
}

impl Bench {
    fn start(&mut self) {
        let queue = QueueSetup {
            index: 0,
            size: SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        };
        self.rng
            .activate(Activation {
                features: self.rng.features(),
                queues: vec![queue],
                memory: self.memory.clone(),
            })
            .unwrap();
    }

    fn desc(&self, index: u16, address: u64, len: u32, flags: u32, next: u16) {
        let at = DESC + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags as u16);
        self.put(at + 14, next);
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn submit(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), head);
        self.avail += 1;
        self.put(AVAIL + 2, self.avail);
        self.kick.write(1).unwrap();
    }

    /// Id and length of the last used entry.
    fn used(&self) -> (u32, u32) {
        let slot = u64::from((self.avail - 1) % SIZE);
        let [id, len]: [u32; 2] = self
            .memory
            .read_obj(GuestAddress(USED + 4 + 8 * slot))
            .unwrap();
        (id, len)
    }

    fn stop(&mut self) {
        self.rng.reset();
        let begin = Instant::now();
        while self.rng.reset_progress() == ResetProgress::Pending {
            assert!(begin.elapsed() < Duration::from_secs(20));
            std::thread::yield_now();
        }
    }
}

fn wait(event: &EventFd) {
    use std::os::fd::AsRawFd;
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
        .unwrap();
    assert_eq!(epoll.wait(20_000, &mut [EpollEvent::default()]).unwrap(), 1);
    event.read().unwrap();
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
        bench.desc(0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
        bench.submit(0);
        wait(&bench.call);
        assert_eq!(bench.used(), (0, 64));
        bench.desc(1, BUFFERS, 100, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2);
        bench.desc(2, BUFFERS + 0x5000, 5000, VRING_DESC_F_WRITE, 0);
        bench.submit(1);
        wait(&bench.call);
        assert_eq!(bench.used(), (1, 5100));
        let mut end = [0; 2];
        let last = GuestAddress(BUFFERS + 0x5000 + 4999);
        bench.memory.read_slice(&mut end, last).unwrap();
        assert_eq!(end, [0x5a, 0]);
        bench.stop();
        bench
            .memory
            .write_slice(&[0; 0x3000], GuestAddress(DESC))
            .unwrap();
        bench.avail = 0;
    }
}

#[test]
fn what_was_available_before_the_start_is_served() {
    let mut bench = bench("/dev/urandom".as_ref());
    bench.desc(0, BUFFERS, 16, VRING_DESC_F_WRITE, 0);
    bench.submit(0);
    bench.kick.read().unwrap();
    bench.start();
    wait(&bench.call);
    assert_eq!(bench.used(), (0, 16));
}

#[test]
fn a_buffer_that_is_huge_gets_a_part() {
    let mut bench = bench("/dev/urandom".as_ref());
    bench.desc(0, BUFFERS, 0x2_0000, VRING_DESC_F_WRITE, 0);
    bench.start();
    bench.submit(0);
    wait(&bench.call);
    assert_eq!(bench.used(), (0, 64 << 10));
}

#[test]
fn rings_that_make_no_sense_need_a_reset() {
    type Break = fn(&mut Bench);
    let breaks: [Break; 4] = [
        // A head that is no descriptor.
        |bench| bench.submit(SIZE),
        // More available than the ring holds.
        |bench| {
            bench.put(AVAIL + 2, SIZE + 1);
            bench.kick.write(1).unwrap();
        },
        // A buffer outside memory.
        |bench| {
            bench.desc(0, MEMORY as u64 - 8, 64, VRING_DESC_F_WRITE, 0);
            bench.submit(0);
        },
        // A buffer at the end of the address space.
        |bench| {
            bench.desc(0, u64::MAX - 8, 64, VRING_DESC_F_WRITE, 0);
            bench.submit(0);
        },
    ];
    for hurt in breaks {
        let mut bench = bench("/dev/urandom".as_ref());
        bench.start();
        hurt(&mut bench);
        wait(&bench.needs_reset);
        bench.stop();
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let mut bench = bench("/dev/urandom".as_ref());
    bench.desc(0, BUFFERS, 1, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 0);
    bench.start();
    bench.submit(0);
    wait(&bench.call);
    bench.stop();
}

#[test]
fn a_source_that_ends_needs_a_reset() {
    let dir = TempDir::new().unwrap();
    let mut bench = bench(&source(&dir, 10));
    bench.desc(0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    bench.start();
    bench.submit(0);
    wait(&bench.needs_reset);
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
    bench.desc(0, BUFFERS, 8, VRING_DESC_F_WRITE, 0);
    bench.start();
    bench.submit(0);
    bench.stop();
    bench.start();
    writer.write_all(b"12345678").unwrap();
    wait(&bench.call);
    assert_eq!(bench.used(), (0, 8));
    // Dry again, and filled while it is watched.
    bench.submit(0);
    writer.write_all(b"12345678").unwrap();
    wait(&bench.call);
    assert_eq!(bench.used(), (0, 8));
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
