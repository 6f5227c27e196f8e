//! Sessions against a backend of a few lines, which does what a good one would not: stops in the middle,
//! answers wrongly, changes. Good ones are in `tests/frontend.rs`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::config::{DiskConfig, MemoryConfig, VhostUserConfig};
use crate::devices::virtio::device::{Activation, QueueSetup, ResetProgress, TransportNotify};
use crate::memory::GuestRam;

const LIMIT: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(20);

const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;

const REPLY_ACK: u64 = 1 << 3;
const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;

/// What the backend does at a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Refuse,
    Silent,
    HalfAReply,
    WrongReply,
    HangUp,
}

/// What the backend is.
#[derive(Clone)]
struct Script {
    features: u64,
    protocol: u64,
    fault: Option<(u32, Fault)>,
    /// Flips a bit of some replies; which ones and which bits follows from the number.
    mangle: Option<u64>,
}

/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
const GOOD: Script = Script {
    features: VERSION_1 | FLUSH | 1 << 30,
    protocol: 1 | REPLY_ACK | 1 << 5 | 1 << 9,
    fault: None,
    mangle: None,
};

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<(u32, Vec<u8>)>>,
    files: Mutex<Vec<(u32, File)>>,
    capacity: Mutex<u8>,
    current: Mutex<Option<UnixStream>>,
}

impl Seen {
    fn payload(&self, request: u32) -> Option<Vec<u8>> {
        let requests = self.requests.lock().unwrap();
        let mut found = requests.iter().rev().filter(|(code, _)| *code == request);
        found.next().map(|(_, payload)| payload.clone())
    }

    fn file(&self, request: u32) -> File {
        let mut files = self.files.lock().unwrap();
        let at = files
            .iter()
            .rposition(|(code, _)| *code == request)
            .unwrap();
        files.remove(at).1
    }
}

/// Serves one connection after another until it is dropped, which is its death.
struct Backend {
    seen: Arc<Seen>,
    scripts: Arc<Mutex<Vec<Script>>>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// The scripts are for one connection each, the last for all that follow; none ends it.
    fn listen(path: &Path, scripts: &[Script]) -> Self {
        let seen = Arc::<Seen>::default();
        let mut scripts = scripts.to_vec();
        scripts.reverse();
        let scripts = Arc::new(Mutex::new(scripts));
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let (shared, left) = (Arc::clone(&seen), Arc::clone(&scripts));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                let script = {
                    let mut left = left.lock().unwrap();
                    match left.len() {
                        0 => return,
                        1 => left[0].clone(),
                        _ => left.pop().unwrap(),
                    }
                };
                let stream = stream.unwrap();
                *shared.current.lock().unwrap() = stream.try_clone().ok();
                serve(stream, &script, &shared);
                *shared.current.lock().unwrap() = None;
            }
        });
        Self {
            seen,
            scripts,
            path: path.to_owned(),
            thread: Some(thread),
        }
    }
}

impl Backend {
    fn hang_up(&self) {
        if let Some(stream) = &*self.seen.current.lock().unwrap() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.scripts.lock().unwrap().clear();
        let thread = self.thread.take().unwrap();
        while !thread.is_finished() {
            self.hang_up();
            drop(UnixStream::connect(&self.path));
            thread::yield_now();
        }
        let _ = thread.join();
    }
}

/// The next number of a sequence that is the same in each run.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

fn serve(mut stream: UnixStream, script: &Script, seen: &Seen) {
    let mut mangle = script.mangle;
    let mut header = [0; 12];
    while let Ok((12, file)) = stream.recv_with_fd(&mut header) {
        let word = |i: usize| u32::from_le_bytes(header[4 * i..][..4].try_into().unwrap());
        let (code, need_reply) = (word(0), word(1) & 8 != 0);
        let mut payload = vec![0; word(2) as usize];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        seen.requests.lock().unwrap().push((code, payload.clone()));
        if let Some(file) = file {
            seen.files.lock().unwrap().push((code, file));
        }
        let mut answer = match code {
            GET_FEATURES => script.features.to_le_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => script.protocol.to_le_bytes().to_vec(),
            GET_QUEUE_NUM => 1_u64.to_le_bytes().to_vec(),
            GET_VRING_BASE => payload,
            GET_CONFIG => {
                payload[12] = *seen.capacity.lock().unwrap();
                payload
            }
            _ if need_reply => vec![0; 8],
            _ => Vec::new(),
        };
        let mut reply = Vec::new();
        for word in [code, 5, answer.len() as u32] {
            reply.extend(word.to_le_bytes());
        }
        let silent = match script.fault {
            Some((at, fault)) if at == code => match fault {
                Fault::HangUp => return,
                Fault::Refuse => {
                    answer = 1_u64.to_le_bytes().to_vec();
                    false
                }
                Fault::Silent => true,
                Fault::HalfAReply => stream.write_all(&reply[..7]).is_ok(),
                Fault::WrongReply => {
                    reply[0] ^= 0xff;
                    false
                }
            },
            _ => false,
        };
        if silent {
            // Until the other end gives up.
            while matches!(stream.read(&mut [0; 64]), Ok(1..)) {}
            return;
        }
        if !answer.is_empty() {
            reply.extend(answer);
            if let Some(random) = &mut mangle
                && next(random).is_multiple_of(4)
            {
                let bit = next(random) as usize % (8 * reply.len());
                reply[bit / 8] ^= 1 << (bit % 8);
            }
            if stream.write_all(&reply).is_err() {
                return;
            }
        }
    }
}

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
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("disk.sock");
    before(&path);
    let kind = Kind::Blk(DiskConfig {
        id: "_disk0".to_owned(),
        backend: VhostUserConfig {
            socket: path.clone(),
            num_queues: 1,
            queue_size: 64,
        },
        readonly: false,
    });
    let memory = MemoryConfig {
        size_bytes: 2 << 20,
        hugepages: false,
    };
    let notes = Arc::new(Notes {
        config: eventfd(),
        reset: eventfd(),
    });
    let mut frontends = Frontends::with_operation_limit(limit).unwrap();
    let mut device = frontends.connect(kind).unwrap();
    device.attach(Arc::clone(&notes) as _);
    Bench {
        _dir: dir,
        path,
        ram: GuestRam::new(&memory).unwrap(),
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
        let (kick, call) = (eventfd(), eventfd());
        let queue = QueueSetup {
            index: 0,
            size: 64,
            desc: 0x1_0000,
            avail: 0x2_0000,
            used: 0x3_0000,
            kick: kick.try_clone().unwrap(),
            call: call.try_clone().unwrap(),
        };
        let activation = Activation {
            features: self.device.features(),
            queues: vec![queue],
            memory: self.memory().clone(),
        };
        self.device.activate(activation).unwrap();
        [kick, call]
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
    let ready = epoll.wait(20_000, &mut [EpollEvent::default()]).unwrap();
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
        while let Ok(stream) = dial::connect(path) {
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
        let mut bench = bench();
        let backend = Backend::listen(&bench.path, &[faulty(GET_VRING_BASE, fault), GOOD]);
        bench.live();
        bench.activate();
        until("started", || {
            backend.seen.payload(SET_VRING_ENABLE).is_some()
        });
        let took = bench.reset();
        assert!(fault == Fault::HangUp || took >= LIMIT);
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
        let mut bench = bench();
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

#[test]
fn a_successor_that_lacks_a_feature_is_not_given_the_rings() {
    let mut bench = bench();
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
