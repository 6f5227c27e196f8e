//! Sessions against a backend of a few lines, which does what a good one would not: stops in the middle,
//! answers wrongly, changes. Good ones are in `tests/frontend.rs`.

pub(super) mod backend;
mod hostile;
mod window;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::tempdir::TempDir;

use self::backend::*;
use super::*;
use crate::config::{DiskConfig, Dma, Link, MemoryConfig, VhostUserConfig};
use crate::devices::virtio::device::{Activation, QueueSetup, ResetProgress, TransportNotify};
use crate::memory::GuestRam;

/// An operation may take so long. A good backend's few dozen context switches must fit in, on a busy machine too.
const LIMIT: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(60);

struct Notes {
    config: EventFd,
    reset: EventFd,
}

impl TransportNotify for Notes {
    fn config_changed(&self) {
        self.config.write(1).unwrap();
    }

    fn needs_reset(&self) {
        self.reset.write(1).unwrap();
    }
}

struct Bench {
    _dir: TempDir,
    path: PathBuf,
    ram: GuestRam,
    notes: Arc<Notes>,
    frontends: Frontends,
    device: Box<dyn VirtioDevice>,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn bench() -> Bench {
    patient_bench(LIMIT)
}

/// A disk whose backend may take so long.
fn patient_bench(limit: Duration) -> Bench {
    bench_after(limit, |_| ())
}

/// A disk whose session starts when something was done to its path.
fn bench_after(limit: Duration, before: impl FnOnce(&Path)) -> Bench {
    let ram = GuestRam::new(&MemoryConfig::of(2 << 20)).unwrap();
    bench_with(limit, ram, before)
}

/// The same, of a guest with this memory.
fn bench_with(limit: Duration, ram: GuestRam, before: impl FnOnce(&Path)) -> Bench {
    let frontends = Frontends::with_operation_limit(limit).unwrap();
    bench_on(frontends, ram, before)
}

/// The same, with sessions that are made here.
fn bench_on(frontends: Frontends, ram: GuestRam, before: impl FnOnce(&Path)) -> Bench {
    bench_reaching(frontends, ram, Dma::Auto, before)
}

/// The same, with a disk that reaches memory so.
fn bench_reaching(
    frontends: Frontends,
    ram: GuestRam,
    dma: Dma,
    before: impl FnOnce(&Path),
) -> Bench {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("disk.sock");
    before(&path);
    let kind = Kind::Blk(DiskConfig {
        id: "_disk0".to_owned(),
        backend: VhostUserConfig {
            link: Link::Connect(path.clone()),
            num_queues: 1,
            queue_size: 64,
            dma,
        },
        readonly: false,
    });
    let notes = Arc::new(Notes {
        config: eventfd(),
        reset: eventfd(),
    });
    let mut frontends = frontends.reaching(&ram);
    let mut device = frontends.connect(kind).unwrap();
    device.attach(Arc::clone(&notes) as _);
    Bench {
        _dir: dir,
        path,
        ram,
        notes,
        frontends,
        device,
    }
}

impl Bench {
    fn memory(&self) -> &GuestMemoryMmap {
        self.ram.memory()
    }

    fn activate(&mut self) -> [EventFd; 2] {
        let rings = [0x1_0000, 0x2_0000, 0x3_0000];
        let features = self.device.features();
        self.activate_at(features, rings).unwrap()
    }

    /// DRIVER_OK with these features, and a queue whose descriptors, avail and used ring are there.
    fn activate_at(
        &mut self,
        features: u64,
        [desc, avail, used]: [u64; 3],
    ) -> Result<[EventFd; 2], String> {
        let (kick, call) = (eventfd(), eventfd());
        let queue = QueueSetup {
            index: 0,
            size: 64,
            desc,
            avail,
            used,
            kick: kick.try_clone().unwrap(),
            call: call.try_clone().unwrap(),
        };
        let activation = Activation {
            features,
            queues: vec![queue],
            memory: self.memory().clone(),
        };
        let activated = self.device.activate(activation);
        activated.map_err(|error| error.to_string())?;
        Ok([kick, call])
    }

    fn live(&self) {
        until("live", || {
            self.frontends.sessions()[0].state == SessionState::Live
        });
    }

    /// Resets the device and says how long that took.
    fn reset(&mut self) -> Duration {
        let begin = Instant::now();
        self.device.reset();
        until("reset", || {
            self.device.reset_progress() == ResetProgress::Done
        });
        begin.elapsed()
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "never {what}");
        thread::yield_now();
    }
}

fn wait(event: &EventFd, what: &str) {
    use std::os::fd::AsRawFd;
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
        .unwrap();
    let ready = epoll
        .wait(PATIENCE.as_millis() as i32, &mut [EpollEvent::default()])
        .unwrap();
    assert_eq!(ready, 1, "no {what}");
    event.read().unwrap();
}

fn faulty(at: u32, fault: Fault) -> Script {
    Script {
        fault: Some((at, fault)),
        ..GOOD
    }
}

#[test]
fn a_handshake_that_fails_anywhere_settles_and_is_tried_again() {
    let faults = [
        Fault::Silent,
        Fault::HalfAReply,
        Fault::WrongReply,
        Fault::HangUp,
    ];
    thread::scope(|scope| {
        for at in [GET_FEATURES, GET_QUEUE_NUM, SET_BACKEND_REQ_FD, GET_CONFIG] {
            for fault in faults {
                scope.spawn(move || handshake_fails(at, fault));
            }
        }
        // It has no reply yet that could be missed.
        scope.spawn(|| handshake_fails(SET_OWNER, Fault::HangUp));
    });
}

fn handshake_fails(at: u32, fault: Fault) {
    let bench = bench();
    let begin = Instant::now();
    let _backend = Backend::listen(&bench.path, &[faulty(at, fault), GOOD]);
    assert!(bench.frontends.wait_settled(PATIENCE));
    let silent = matches!(fault, Fault::Silent | Fault::HalfAReply);
    assert!(!silent || begin.elapsed() >= LIMIT, "request {at}");
    bench.live();
    assert_eq!(bench.device.features(), VERSION_1 | FLUSH);
}

#[test]
fn one_that_never_accepts_settles_also_when_its_queue_is_full() {
    let mut queue = Vec::new();
    let mut listener = None;
    let bench = bench_after(LIMIT, |path| {
        listener = Some(UnixListener::bind(path).unwrap());
        while let Ok(stream) = socket::connect(path) {
            queue.push(stream);
        }
    });
    let begin = Instant::now();
    assert!(bench.frontends.wait_settled(PATIENCE));
    assert!(begin.elapsed() >= LIMIT / 2);
    assert_eq!(bench.frontends.sessions()[0].state, SessionState::Waiting);
    assert!(!bench.device.accepts(VERSION_1));
}

#[test]
fn a_start_that_stops_halfway_is_begun_anew_with_the_next_connection() {
    for at in [
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ] {
        let mut bench = bench();
        let backend = Backend::listen(&bench.path, &[faulty(at, Fault::Silent), GOOD]);
        bench.live();
        let [kick, _] = bench.activate();
        wait(&kick, "kick after the restart");
        let base = backend.seen.payload(SET_VRING_BASE).unwrap();
        assert_eq!(base, [0; 8], "request {at}");
        assert!(bench.reset() < PATIENCE);
    }
}

#[test]
fn rings_that_the_backend_refuses_need_a_reset() {
    let mut bench = bench();
    let refusing = faulty(SET_VRING_NUM, Fault::Refuse);
    let _backend = Backend::listen(&bench.path, &[refusing, GOOD]);
    bench.live();
    bench.activate();
    wait(&bench.notes.reset, "NEEDS_RESET");
    bench.reset();
    // The next driver may do better.
    bench.live();
    let [kick, _] = bench.activate();
    bench.reset();
    assert!(kick.read().is_err(), "nothing was resumed");
}

#[test]
fn a_backend_that_keeps_its_rings_loses_them_at_the_deadline() {
    for fault in [Fault::Silent, Fault::HalfAReply, Fault::HangUp] {
        // Long enough for the good answers on a machine with other work.
        let limit = 4 * LIMIT;
        let mut bench = patient_bench(limit);
        let backend = Backend::listen(&bench.path, &[faulty(GET_VRING_BASE, fault), GOOD]);
        bench.live();
        bench.activate();
        until("started", || {
            backend.seen.payload(SET_VRING_ENABLE).is_some()
        });
        let took = bench.reset();
        assert!(fault == Fault::HangUp || took >= limit);
        // The next driver is served.
        bench.live();
        bench.activate();
        bench.reset();
    }
}

#[test]
fn a_stop_of_the_vm_waits_for_a_silent_backend_no_longer_than_asked() {
    let mut bench = patient_bench(PATIENCE);
    let backend = Backend::listen(&bench.path, &[faulty(GET_VRING_BASE, Fault::Silent)]);
    bench.live();
    bench.activate();
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
    let begin = Instant::now();
    assert_eq!(bench.frontends.stop(Duration::from_millis(50)), ["_disk0"]);
    assert!(begin.elapsed() < PATIENCE / 2);
    let closed = || bench.frontends.sessions()[0].state == SessionState::Closed;
    until("closed", closed);
}

#[test]
fn a_backend_that_acknowledges_nothing_is_asked_whether_it_is_there() {
    for at in [SET_MEM_TABLE, SET_VRING_KICK, SET_VRING_ENABLE] {
        // Long enough for the good backend's handshake on a machine with other work.
        let mut bench = patient_bench(5 * LIMIT);
        let good = Script {
            protocol: GOOD.protocol & !REPLY_ACK,
            ..GOOD
        };
        let silent = Script {
            fault: Some((at, Fault::Silent)),
            ..good.clone()
        };
        let _backend = Backend::listen(&bench.path, &[silent, good]);
        bench.live();
        let [kick, _] = bench.activate();
        wait(&kick, "kick after the restart");
        assert!(bench.reset() < PATIENCE);
    }
}

#[test]
fn a_change_of_configuration_reaches_the_guest() {
    let bench = bench();
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    *backend.seen.capacity.lock().unwrap() = 7;
    let mut channel = backend.seen.file(SET_BACKEND_REQ_FD);
    // CONFIG_CHANGE_MSG, version 1, a reply wanted.
    channel
        .write_all(&[2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    let mut reply = [0; 20];
    channel.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..], [0; 8]);
    wait(&bench.notes.config, "config interrupt");
    let mut capacity = [0; 8];
    bench.device.read_config(0, &mut capacity);
    assert_eq!(capacity[0], 7);
    // A channel that is misused is closed; the session goes on.
    channel.write_all(&[0xff; 12]).unwrap();
    assert_eq!(channel.read(&mut reply).unwrap(), 0);
    assert_eq!(bench.frontends.sessions()[0].state, SessionState::Live);
}

#[test]
fn a_queue_that_the_backend_gave_up_needs_a_reset() {
    let mut bench = bench();
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    bench.activate();
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
    let mut err = backend.seen.file(SET_VRING_ERR);
    err.write_all(&1_u64.to_le_bytes()).unwrap();
    wait(&bench.notes.reset, "NEEDS_RESET");
    bench.reset();
}

#[test]
fn rings_are_resumed_at_the_used_index_with_a_kick_and_an_interrupt() {
    let mut bench = bench();
    let first = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    let [kick, call] = bench.activate();
    until("started", || first.seen.payload(SET_VRING_ENABLE).is_some());
    bench
        .memory()
        .write_obj(0xfff7_u16, GuestAddress(0x3_0002))
        .unwrap();
    drop(first);
    let second = Backend::listen(&bench.path, &[GOOD]);
    wait(&kick, "kick");
    wait(&call, "interrupt");
    let base = second.seen.payload(SET_VRING_BASE).unwrap();
    assert_eq!(base, [0, 0, 0, 0, 0xf7, 0xff, 0, 0]);
}

/// GOOD, and it notes requests in flight.
fn tracking() -> Script {
    Script {
        protocol: GOOD.protocol | INFLIGHT_SHMFD,
        ..GOOD
    }
}

/// The places of `codes` among the requests, in the order in which they came.
fn order(seen: &Seen, codes: &[u32]) -> Vec<u32> {
    let requests = seen.requests.lock().unwrap();
    let codes = requests
        .iter()
        .map(|(code, _)| *code)
        .filter(|code| codes.contains(code));
    codes.collect()
}

fn inode(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().unwrap().ino()
}

#[test]
fn a_successor_gets_the_region_that_its_predecessor_made() {
    const CODES: [u32; 3] = [GET_INFLIGHT_FD, SET_INFLIGHT_FD, SET_VRING_NUM];
    let mut bench = bench();
    let first = Backend::listen(&bench.path, &[tracking()]);
    bench.live();
    let [kick, _] = bench.activate();
    until("started", || first.seen.payload(SET_VRING_ENABLE).is_some());
    assert_eq!(order(&first.seen, &CODES), CODES);
    // Held, so that no other file gets its inode.
    let region = first.seen.file(SET_INFLIGHT_FD);
    let shape = first.seen.payload(SET_INFLIGHT_FD).unwrap();
    // 4096 bytes from 0 for one queue of 64.
    assert_eq!(
        shape[..18],
        [0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(shape[18..20], [64, 0]);
    drop(first);
    // One that cannot read it is not given the rings.
    let second = Backend::listen(&bench.path, &[GOOD, tracking()]);
    wait(&kick, "kick");
    assert_eq!(order(&second.seen, &CODES), CODES[1..]);
    assert_eq!(inode(&second.seen.file(SET_INFLIGHT_FD)), inode(&region));
    assert_eq!(second.seen.payload(SET_INFLIGHT_FD).unwrap(), shape);
    // Another driver's requests are none of this one's.
    bench.reset();
    second.seen.requests.lock().unwrap().clear();
    bench.activate();
    until("started", || {
        second.seen.payload(SET_VRING_ENABLE).is_some()
    });
    assert_eq!(order(&second.seen, &CODES), CODES);
    assert_ne!(inode(&second.seen.file(SET_INFLIGHT_FD)), inode(&region));
}

#[test]
fn a_region_that_cannot_be_made_is_asked_for_again_with_the_next_connection() {
    for fault in [Fault::Silent, Fault::HalfAReply, Fault::HangUp] {
        // As above: the region that is made may be late.
        let mut bench = patient_bench(4 * LIMIT);
        let failing = Script {
            fault: Some((GET_INFLIGHT_FD, fault)),
            ..tracking()
        };
        let backend = Backend::listen(&bench.path, &[failing, tracking()]);
        bench.live();
        let [kick, _] = bench.activate();
        wait(&kick, "kick after the restart");
        assert_eq!(order(&backend.seen, &[GET_INFLIGHT_FD]).len(), 2);
    }
}

/// As `berth-blk --fixed-buffers` says it. A guest that gives nothing back may have such a disk.
#[test]
fn a_backend_that_pins_memory_is_refused_beside_a_balloon_only() {
    let pinning = Script {
        protocol: GOOD.protocol | 1 << 63,
        ..GOOD
    };
    for (discards, script, served) in [
        (true, &pinning, false),
        (true, &GOOD, true),
        (false, &pinning, true),
    ] {
        let frontends = Frontends::with_operation_limit(PATIENCE).unwrap();
        let ram = GuestRam::new(&MemoryConfig::of(2 << 20)).unwrap();
        let bench = bench_on(frontends.discarding(discards), ram, |_| ());
        let _backend = Backend::listen(&bench.path, std::slice::from_ref(script));
        assert!(bench.frontends.wait_settled(PATIENCE));
        let settled = bench.frontends.watch("_disk0").unwrap().wait(PATIENCE);
        assert_eq!(settled.is_ok(), served, "{discards} {settled:?}");
    }
}

#[test]
fn a_successor_that_lacks_a_feature_is_not_given_the_rings() {
    // Nobody is late here, so that nothing is done twice.
    let mut bench = patient_bench(PATIENCE);
    let first = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    let [kick, _] = bench.activate();
    until("started", || first.seen.payload(SET_VRING_ENABLE).is_some());
    drop(first);
    let lacking = Script {
        features: GOOD.features & !FLUSH,
        ..GOOD
    };
    let second = Backend::listen(&bench.path, &[lacking, GOOD]);
    wait(&kick, "kick");
    let requests = second.seen.requests.lock().unwrap();
    let handshakes = requests
        .iter()
        .filter(|(code, _)| *code == SET_OWNER)
        .count();
    let starts = requests
        .iter()
        .filter(|(code, _)| *code == SET_MEM_TABLE)
        .count();
    assert_eq!((handshakes, starts), (2, 1));
}

#[test]
fn replies_with_wrong_bits_end_a_connection_and_nothing_else() {
    let mut bench = patient_bench(Duration::from_millis(50));
    let mut scripts = vec![faulty(SET_VRING_ENABLE, Fault::HangUp)];
    scripts.extend((1..=50).map(|seed| Script {
        mangle: Some(0x9e37_79b9_7f4a_7c15 ^ seed),
        ..GOOD
    }));
    scripts.push(GOOD);
    let backend = Backend::listen(&bench.path, &scripts);
    bench.live();
    bench.activate();
    let begin = Instant::now();
    while backend.scripts.lock().unwrap().len() > 1 {
        assert!(begin.elapsed() < 3 * PATIENCE);
        // One that was mangled where it does no harm stays until it is closed.
        if bench.frontends.sessions()[0].state == SessionState::Live {
            backend.hang_up();
        }
        thread::yield_now();
    }
    bench.reset();
    bench.live();
    let [kick, _] = bench.activate();
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
    bench.reset();
    drop(kick);
}
