//! What is offered, that it is answered, and that nothing else is there.
#![allow(clippy::unwrap_used, missing_docs)]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use berth_queue_worker::protocol::message::{FrontendReq, frontend_request};
use berth_queue_worker::session::SessionError;
use berth_queue_worker::testing::{
    Buffer, DriverQueue, Echo, EchoWorker, FakeDriver, FakeFrontend, GuestRam, Setup, serve,
};
use berth_queue_worker::{Device, Metrics, QueueStart, features};

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A device that adds no protocol feature.
struct Plain(Arc<Echo>);

impl Device for Plain {
    const NAME: &'static str = "plain";
    type Worker = EchoWorker;
    fn features(&self) -> u64 {
        0
    }
    fn num_queues(&self) -> u16 {
        1
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn new_worker(&self, start: &QueueStart) -> std::io::Result<EchoWorker> {
        self.0.new_worker(start)
    }
}

/// Protocol features by their numbers in the specification.
const MQ: u64 = 1 << 0;
const LOG_SHMFD: u64 = 1 << 1;
const RARP: u64 = 1 << 2;
const REPLY_ACK: u64 = 1 << 3;
const NET_MTU: u64 = 1 << 4;
const BACKEND_REQ: u64 = 1 << 5;
const CONFIG: u64 = 1 << 9;
const BACKEND_SEND_FD: u64 = 1 << 10;
const INFLIGHT_SHMFD: u64 = 1 << 12;
const RESET_DEVICE: u64 = 1 << 13;
const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const DEVICE_STATE: u64 = 1 << 19;

#[test]
fn what_is_offered_is_this_and_nothing_else() {
    let every_device = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | BACKEND_SEND_FD
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS;
    let plain = Plain(Echo::new(1));
    let (mut frontend, session) = serve(Arc::new(plain), &Metrics::new("plain", 1));
    assert_eq!(
        frontend.number(FrontendReq::GET_PROTOCOL_FEATURES),
        every_device
    );
    for bit in [RARP, NET_MTU, STATUS, DEVICE_STATE] {
        let request = FrontendReq::SET_PROTOCOL_FEATURES;
        assert_ne!(frontend.try_request(request, &bytes(&[bit]), &[]), 0);
    }
    // Nor are their requests taken.
    for (request, payload) in [
        (FrontendReq::SEND_RARP, bytes(&[7])),
        (FrontendReq::NET_SET_MTU, bytes(&[1500])),
        (FrontendReq::SET_STATUS, bytes(&[15])),
        (FrontendReq::GET_STATUS, Vec::new()),
        (FrontendReq::CHECK_DEVICE_STATE, Vec::new()),
        (FrontendReq::IOTLB_MSG, bytes(&[0; 4])),
    ] {
        let ack = frontend.try_request(request, &payload, &[]);
        assert_ne!(ack, 0, "{request:?}");
    }
    frontend.disconnect();
    session.join().unwrap();

    let (mut frontend, session) = serve(Echo::new(2), &Metrics::new("echo", 2));
    assert_eq!(
        frontend.number(FrontendReq::GET_PROTOCOL_FEATURES),
        every_device | RARP | NET_MTU
    );
    let common = 1 << features::VERSION_1
        | 1 << features::RING_EVENT_IDX
        | 1 << features::RING_INDIRECT_DESC
        | 1 << features::PROTOCOL_FEATURES
        | 1 << features::LOG_ALL;
    assert_eq!(frontend.number(FrontendReq::GET_FEATURES), common);
    frontend.disconnect();
    session.join().unwrap();
}

/// Every request that is offered, with a payload that makes sense and its descriptors.
fn every_request<'a>(
    ram: &'a GuestRam,
    queue: &'a DriverQueue,
    channel: &'a UnixStream,
) -> Vec<(FrontendReq, Vec<u8>, Vec<BorrowedFd<'a>>)> {
    use FrontendReq as F;
    let info = ram.info();
    let region = [info.gpa, info.size, info.uva, info.file_offset];
    let [desc, avail, used] = queue.uvas();
    let number = |value: u64| bytes(&[value]);
    let state = |value: u64| bytes(&[value << 32]);
    let none = Vec::new;
    vec![
        (F::SET_OWNER, none(), vec![]),
        (F::GET_FEATURES, none(), vec![]),
        (F::SET_FEATURES, number(1 << 30 | 1 << 32), vec![]),
        (F::GET_PROTOCOL_FEATURES, none(), vec![]),
        (F::SET_PROTOCOL_FEATURES, number(0xb63f), vec![]),
        (F::GET_QUEUE_NUM, none(), vec![]),
        (F::GET_MAX_MEM_SLOTS, none(), vec![]),
        (F::SET_BACKEND_REQ_FD, none(), vec![channel.as_fd()]),
        (F::GET_CONFIG, bytes(&[4 << 32, 0]), vec![]),
        (F::SET_CONFIG, bytes(&[4 << 32, 0x4141_4141 << 32]), vec![]),
        (
            F::ADD_MEM_REG,
            [number(0), bytes(&region)].concat(),
            vec![ram.fd()],
        ),
        (F::REM_MEM_REG, [number(0), bytes(&region)].concat(), vec![]),
        (
            F::SET_MEM_TABLE,
            [number(1), bytes(&region)].concat(),
            vec![ram.fd()],
        ),
        (F::SET_LOG_BASE, bytes(&[0x4000, 0]), vec![ram.fd()]),
        (F::SET_LOG_FD, none(), vec![queue.err_fd()]),
        (F::GET_INFLIGHT_FD, bytes(&[0, 0, 16 << 16 | 1]), vec![]),
        (F::SET_VRING_NUM, state(16), vec![]),
        (F::SET_VRING_BASE, state(0), vec![]),
        (F::SET_VRING_ADDR, bytes(&[0, desc, used, avail, 0]), vec![]),
        (F::SET_VRING_CALL, number(0), vec![queue.call_fd()]),
        (F::SET_VRING_ERR, number(0), vec![queue.err_fd()]),
        (F::SET_VRING_KICK, number(0), vec![queue.kick_fd()]),
        (F::SET_VRING_ENABLE, state(1), vec![]),
        (F::SEND_RARP, number(7), vec![]),
        (F::NET_SET_MTU, number(1500), vec![]),
        (F::SET_VRING_ENABLE, state(0), vec![]),
        (F::GET_VRING_BASE, state(0), vec![]),
        (F::RESET_DEVICE, none(), vec![]),
        (F::RESET_OWNER, none(), vec![]),
    ]
}

#[test]
fn every_request_is_answered_once_where_an_answer_is_asked_for() {
    let (mut frontend, session) = serve(Echo::new(2), &Metrics::new("echo", 2));
    let ram = Arc::new(GuestRam::new(0, 1 << 20));
    let queue = DriverQueue::new(&ram, 0, 16, 1 << 32);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    for (request, payload, fds) in every_request(&ram, &queue, &theirs) {
        frontend.send_raw(&frontend_request(request.into(), true, &payload), &fds);
        let reply = frontend.read_reply(request);
        let code = u32::from(request);
        let own = [1, 6, 11, 15, 17, 24, 31, 36].contains(&code);
        assert!(own || reply == [0; 8], "{request:?} was refused: {reply:?}");
        // The next answer is to the next question.
        assert_eq!(
            frontend.number(FrontendReq::GET_QUEUE_NUM),
            2,
            "{request:?}"
        );
    }
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn request_with_a_descriptor_too_many_or_too_few_ends_the_session() {
    let ram = Arc::new(GuestRam::new(0, 1 << 20));
    let queue = DriverQueue::new(&ram, 0, 16, 1 << 32);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    for (request, payload, fds) in every_request(&ram, &queue, &theirs) {
        let mut cases = vec![[&fds[..], &[ram.fd()]].concat()];
        // Some frontends send the region's descriptor along.
        if request == FrontendReq::REM_MEM_REG {
            cases[0].push(ram.fd());
        }
        if fds.len() == 1 {
            cases.push(Vec::new());
        }
        for fds in cases {
            let (mut frontend, session) = serve(Echo::new(2), &Metrics::new("echo", 2));
            frontend.send_raw(&frontend_request(request.into(), true, &payload), &fds);
            assert!(frontend.is_closed(), "{request:?} with {}", fds.len());
            let error = session.join().unwrap();
            assert!(matches!(error, SessionError::Connection(_)), "{error}");
        }
    }
}

/// Sends requests through a queue until told to stop; how many.
fn keep_busy(ram: &GuestRam, queue: &mut DriverQueue, stop: &std::sync::atomic::AtomicBool) -> u64 {
    let text = [0x5a; 512];
    let from = ram.place(&text);
    let to: Vec<u64> = (0..16).map(|_| ram.alloc(512, 16)).collect();
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        for gpa in &to {
            ram.write(*gpa, &[0; 512]);
            let buffers = [Buffer::readable(from, 512), Buffer::writable(*gpa, 512)];
            queue.add(&buffers).unwrap();
        }
        queue.kick_if_wanted();
        for _ in &to {
            queue.wait_used();
            count += 1;
        }
        assert!(to.iter().all(|gpa| ram.read(*gpa, 512) == text));
    }
    count
}

#[test]
fn regions_come_and_go_while_another_queue_is_busy() {
    let setup = Setup {
        num_queues: 2,
        ..Setup::default()
    };
    let mut driver = FakeDriver::start(Echo::new(2), &Metrics::new("echo", 2), setup);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let FakeDriver {
        frontend,
        ram,
        queues,
        ..
    } = &mut driver;
    let (busy, own) = queues.split_at_mut(1);
    let busy = &mut busy[0];
    std::thread::scope(|scope| {
        let load = scope.spawn(|| keep_busy(ram, busy, &stop));
        for round in 0..200u64 {
            come_and_go(frontend, &mut own[0], round);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(load.join().unwrap() > 0);
    });
    driver.finish();
}

/// Adds a region, sends a request through it, removes it.
fn come_and_go(frontend: &mut FakeFrontend, queue: &mut DriverQueue, round: u64) {
    let region = GuestRam::new(0x9_0000_0000 + (round << 20), 0x3010);
    assert_eq!(frontend.add_mem_reg(&region.info(), region.fd()), 0);
    let text = [round as u8; 4096];
    let (from, to) = (region.place(&text), region.alloc(4096, 1));
    queue.run(&[Buffer::readable(from, 4096), Buffer::writable(to, 4096)]);
    assert_eq!(region.read(to, 4096), text);
    assert_eq!(frontend.rem_mem_reg(&region.info()), 0);
    // Nobody writes to it any more, and nobody has it mapped.
    region.truncate();
}
