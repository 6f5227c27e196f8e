//! Frontends that send the right requests in the wrong order or with the wrong things, while rings
//! run. What broken rings and broken framing do is in `rings.rs` and `session.rs`; numbers and memory
//! are the daemon's (`blk/tests/hostile.rs`).
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use berth_queue_worker::Metrics;
use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::session::SessionError;
use berth_queue_worker::testing::{
    Buffer, DriverQueue, Echo, FakeDriver, FakeFrontend, GuestRam, Setup, serve,
};

const QUEUES: u16 = 2;

fn start(metrics: &Metrics) -> FakeDriver {
    let setup = Setup {
        num_queues: QUEUES,
        ram_size: 1 << 20,
        ..Setup::default()
    };
    FakeDriver::start(Echo::new(QUEUES), metrics, setup)
}

fn metrics() -> Metrics {
    Metrics::new("echo", QUEUES)
}

fn echo(ram: &GuestRam, queue: &mut DriverQueue) {
    let out = ram.alloc(4, 4);
    let written = queue.run(&[
        Buffer::readable(ram.place(b"ahoy"), 4),
        Buffer::writable(out, 4),
    ]);
    assert_eq!((written, &ram.read(out, 4)[..]), (4, &b"ahoy"[..]));
}

/// File descriptors that are not what anybody would hand over.
fn strange_fds() -> Vec<(&'static str, OwnedFd)> {
    let (reader, writer) = std::io::pipe().unwrap();
    let (full_reader, full) = std::io::pipe().unwrap();
    (&full).write_all(&[0; 65536]).unwrap();
    let (socket, gone) = UnixStream::pair().unwrap();
    drop((gone, reader));
    let name = format!("berth-hostile-{}.sock", std::process::id());
    let path = std::env::temp_dir().join(name);
    let listening = UnixListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let path_only = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open("/")
        .unwrap();
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    vec![
        ("a device", open("/dev/zero")),
        ("a directory", open("/")),
        ("a file of /proc", open("/proc/self/maps")),
        ("a path", path_only.into()),
        ("a pipe without reader", writer.into()),
        ("an empty pipe", full_reader.into()),
        ("a full pipe", full.into()),
        ("a socket without peer", socket.into()),
        ("a listening socket", listening.into()),
        (
            "memory of a guest",
            GuestRam::new(0, 0x1000).fd().try_clone_to_owned().unwrap(),
        ),
    ]
}

#[test]
fn descriptors_of_the_wrong_kind_end_their_session_at_worst() {
    let metrics = metrics();
    let mut other = start(&metrics);
    let words = |words: &[u64]| {
        words
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect::<Vec<u8>>()
    };
    let requests = [
        (FrontendReq::SET_VRING_KICK, words(&[0])),
        (FrontendReq::SET_VRING_CALL, words(&[0])),
        (FrontendReq::SET_VRING_ERR, words(&[0])),
        (FrontendReq::SET_BACKEND_REQ_FD, Vec::new()),
        (FrontendReq::SET_LOG_FD, Vec::new()),
        (FrontendReq::SET_LOG_BASE, words(&[0x1000, 0])),
        (
            FrontendReq::SET_INFLIGHT_FD,
            words(&[0x1000, 0, 128 << 16 | 2]),
        ),
        (
            FrontendReq::ADD_MEM_REG,
            words(&[0, 0x9000_0000, 0x1000, 0x9000_0000, 0]),
        ),
    ];
    for (what, fd) in strange_fds() {
        for (request, payload) in &requests {
            eprintln!("{request:?} with {what}");
            let mut driver = start(&metrics);
            echo(&driver.ram, &mut driver.queues[0]);
            driver.frontend.send(*request, payload, &[fd.as_fd()]);
            // The ring is used, whatever it reads, writes or signals now.
            let out = driver.ram.alloc(8, 8);
            driver.queues[0].add(&[Buffer::writable(out, 8)]).unwrap();
            driver.queues[0].kick();
            driver.queues[1].add(&[Buffer::writable(out, 8)]).unwrap();
            driver.queues[1].kick();
            // Then it answers, or has hung up.
            driver.frontend.send(FrontendReq::GET_QUEUE_NUM, &[], &[]);
            driver
                .frontend
                .is_closed_or_number(FrontendReq::GET_QUEUE_NUM);
            driver.finish();
            echo(&other.ram, &mut other.queues[0]);
        }
    }
    other.finish();
}

/// The numbers 0 to `n`, shuffled; another order for each seed.
fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for at in (1..n).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(at, (state % (at as u64 + 1)) as usize);
    }
    order
}

/// One step of setting up queue 0.
type Step = fn(&mut FakeFrontend, &GuestRam, &DriverQueue) -> u64;

fn state(value: u32) -> Vec<u8> {
    [0u32.to_ne_bytes(), value.to_ne_bytes()].concat()
}

const STEPS: [Step; 8] = [
    |f, ram, _| f.add_mem_reg(&ram.info(), ram.fd()),
    |f, _, q| f.try_request(FrontendReq::SET_VRING_NUM, &state(q.size().into()), &[]),
    |f, _, _| f.try_request(FrontendReq::SET_VRING_BASE, &state(0), &[]),
    |f, _, q| {
        f.set_vring_addr(q);
        0
    },
    |f, _, q| f.try_request(FrontendReq::SET_VRING_CALL, &[0; 8], &[q.call_fd()]),
    |f, _, q| f.try_request(FrontendReq::SET_VRING_ERR, &[0; 8], &[q.err_fd()]),
    |f, _, q| f.try_request(FrontendReq::SET_VRING_KICK, &[0; 8], &[q.kick_fd()]),
    |f, _, _| f.try_request(FrontendReq::SET_VRING_ENABLE, &state(1), &[]),
];

#[test]
fn ring_runs_whatever_the_order_in_which_it_was_set_up() {
    let metrics = metrics();
    for seed in 0..200 {
        let (mut frontend, session) = serve(Echo::new(QUEUES), &metrics);
        let features = frontend.negotiate(u64::MAX);
        let ram = Arc::new(GuestRam::new(0x1_0000_0000, 1 << 16));
        let mut queue = DriverQueue::new(&ram, 0, 64, features);
        let order = shuffled(STEPS.len(), seed);
        for step in &order {
            let ack = STEPS[*step](&mut frontend, &ram, &queue);
            // A base may come too late, for a ring that runs.
            assert!(ack == 0 || *step == 2, "step {step} of {order:?}");
        }
        echo(&ram, &mut queue);
        frontend.disconnect();
        session.join().unwrap();
    }
}

#[test]
fn half_a_setup_and_a_request_from_anywhere_else_harm_nobody() {
    let metrics = metrics();
    let mut other = start(&metrics);
    let strangers = [
        (FrontendReq::GET_VRING_BASE, state(0)),
        (FrontendReq::RESET_OWNER, Vec::new()),
        (FrontendReq::RESET_DEVICE, Vec::new()),
        (FrontendReq::SET_FEATURES, vec![0; 8]),
        (FrontendReq::SET_VRING_NUM, state(2)),
        (FrontendReq::SET_VRING_ENABLE, state(0)),
    ];
    for seed in 0..200_usize {
        let (mut frontend, session) = serve(Echo::new(QUEUES), &metrics);
        let features = frontend.negotiate(u64::MAX);
        let ram = Arc::new(GuestRam::new(0x1_0000_0000, 1 << 16));
        let mut queue = DriverQueue::new(&ram, 0, 64, features);
        queue.add(&[Buffer::writable(ram.alloc(8, 8), 8)]).unwrap();
        queue.kick();
        let order = shuffled(STEPS.len(), seed as u64);
        for (at, step) in order[..1 + seed % STEPS.len()].iter().enumerate() {
            STEPS[*step](&mut frontend, &ram, &queue);
            let (request, payload) = &strangers[(seed + at) % strangers.len()];
            match request {
                FrontendReq::GET_VRING_BASE => drop(frontend.ask(*request, payload)),
                _ => assert_eq!(
                    frontend.try_request(*request, payload, &[]),
                    0,
                    "{request:?}"
                ),
            }
        }
        frontend.disconnect();
        session.join().unwrap();
        echo(&other.ram, &mut other.queues[1]);
    }
    other.finish();
}

#[test]
fn memory_that_is_cut_in_the_middle_ends_its_session_while_rings_still_lie_in_it() {
    let metrics = metrics();
    let mut other = start(&metrics);
    let mut driver = start(&metrics);
    echo(&driver.ram, &mut driver.queues[0]);
    let info = driver.ram.info();
    let file = File::from(driver.ram.fd().try_clone_to_owned().unwrap());
    let half = info.size / 2;
    file.set_len(half).unwrap();
    // The rings are there still, the buffer is not.
    driver.queues[0].add(&[
        Buffer::readable(info.gpa, 16),
        Buffer::writable(info.gpa + half, 16),
    ]);
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    assert!(driver.frontend.is_closed());
    let error = driver.finish().unwrap();
    assert!(matches!(error, SessionError::MemoryLost), "{error}");
    echo(&other.ram, &mut other.queues[0]);
    other.finish();
}
