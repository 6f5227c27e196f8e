//! Frontends and guests that mean harm, in numbers: the daemon serves on, its memory and descriptors
//! stay bounded, and its log does too.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use berth_queue_worker::protocol::connection::send_with_fds;
use berth_queue_worker::protocol::message::{FrontendReq, HEADER_SIZE, frontend_request};
use berth_queue_worker::testing::{FakeDriver, GuestRam, Setup};
use support::{Daemon, TIMEOUT, TempDir, command, write_and_read};

const MIB: u64 = 1 << 20;

/// A generator of numbers that are the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// Numbers at the edges of what means something.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    3,
    16,
    128,
    0x100,
    0xffff,
    0x1_0000,
    0x1_0000_0000,
    0x1_0000_1000,
    0x1_0001_0000,
    u32::MAX as u64,
    1 << 63,
    u64::MAX - 0xfff,
    u64::MAX,
];

/// What a hostile frontend holds in its hands.
struct Hands {
    ram: GuestRam,
    others: Vec<OwnedFd>,
}

impl Hands {
    fn new() -> Hands {
        let (reader, writer) = std::io::pipe().unwrap();
        let (socket, _) = UnixStream::pair().unwrap();
        let event = event();
        Hands {
            ram: GuestRam::new(0x1_0000_0000, 0x1_0000),
            others: vec![
                File::open("/dev/null").unwrap().into(),
                File::open("/").unwrap().into(),
                reader.into(),
                writer.into(),
                socket.into(),
                event,
            ],
        }
    }

    /// Mostly as many as the request wants.
    fn fds(&self, number: u32, random: &mut Random) -> Vec<BorrowedFd<'_>> {
        let takes_one = [6, 7, 12, 13, 14, 21, 32, 37].contains(&number);
        let count = match random.below(30) {
            0 => random.of(&[0, 1, 2, 8, 33]),
            _ => usize::from(takes_one),
        };
        let mut any = || match random.below(self.others.len() + 4) {
            n if n < self.others.len() => self.others[n].as_fd(),
            _ => self.ram.fd(),
        };
        (0..count).map(|_| any()).collect()
    }
}

/// An event fd: a call, kick or err fd that works.
fn event() -> OwnedFd {
    let queue_ram = std::sync::Arc::new(GuestRam::new(0, 0x1_0000));
    let queue = berth_queue_worker::testing::DriverQueue::new(&queue_ram, 0, 16, 0);
    queue.call_fd().try_clone_to_owned().unwrap()
}

/// One message: nearly always well-framed, seldom sensible.
fn message(number: u32, random: &mut Random) -> Vec<u8> {
    let words = random.of(&[0, 1, 5, 5, 5, 5, 5, 5, 9, 70]);
    let mut payload: Vec<u8> = Vec::new();
    for _ in 0..words {
        // Two halves, as some fields are that small.
        let word = match random.below(3) {
            0 => random.of(&NUMBERS) & 0xffff_ffff | random.of(&NUMBERS) << 32,
            _ => random.of(&NUMBERS),
        };
        payload.extend(word.to_ne_bytes());
    }
    let mut bytes = frontend_request(number, true, &payload);
    if random.below(100) == 0 {
        let at = random.below(HEADER_SIZE);
        bytes[at] ^= 1 << random.below(8);
    }
    if random.below(200) == 0 {
        bytes.truncate(random.below(bytes.len()));
    }
    bytes
}

/// Reads one reply; false where the daemon has hung up.
fn read_reply(stream: &mut UnixStream) -> bool {
    let mut header = [0; HEADER_SIZE];
    let mut read = |bytes: &mut [u8]| match stream.read_exact(bytes) {
        Ok(()) => true,
        Err(e) if [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset].contains(&e.kind()) => {
            false
        }
        Err(e) => panic!("no answer, and no end of the session: {e}"),
    };
    if !read(&mut header) {
        return false;
    }
    let size = u32::from_ne_bytes(header[8..].try_into().unwrap());
    read(&mut vec![0; size as usize])
}

/// Sends `count` messages, in as many sessions as the daemon ends; how many that were.
fn attack(socket: &Path, count: usize, random: &mut Random) -> usize {
    let hands = Hands::new();
    let mut sessions = 0;
    let mut sent = 0;
    while sent < count {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        sessions += 1;
        // A frontend may go at any time, too.
        for _ in 0..1 + random.below(300) {
            sent += 1;
            let number = 1 + random.below(44) as u32;
            let bytes = message(number, random);
            let fds = hands.fds(number, random);
            let whole = bytes.len() >= HEADER_SIZE
                && bytes.len()
                    == HEADER_SIZE + u32::from_ne_bytes(bytes[8..12].try_into().unwrap()) as usize
                && bytes[4] & 0x8 != 0;
            let gone = send_with_fds(stream.as_fd(), &bytes, &fds).is_err();
            // After half a message there is nothing to wait for.
            if gone || !whole || !read_reply(&mut stream) {
                break;
            }
        }
    }
    sessions
}

fn status_kib(pid: i32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let start = format!("{field}:");
    let line = status.lines().find_map(|line| line.strip_prefix(&start));
    let number = line.unwrap().trim().trim_end_matches(" kB");
    number.parse().unwrap()
}

fn open_fds(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

#[test]
fn hundred_thousand_hostile_messages_cost_no_memory_no_descriptor_and_few_lines() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    let mut quiet = command();
    quiet
        .env("RUST_LOG", "info")
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", image.display()))
        .arg("--num-queues=3");
    let mut daemon = Daemon::spawn(quiet);
    daemon.wait_for("ready for a frontend");
    let begin = Instant::now();
    let fds = open_fds(daemon.pid());
    let mut random = Random(3);
    let mut sessions = attack(&socket, 10_000, &mut random);
    let before = status_kib(daemon.pid(), "RssAnon");
    sessions += attack(&socket, 100_000, &mut random);
    let after = status_kib(daemon.pid(), "RssAnon");
    assert!(
        after < before + 4096,
        "anonymous memory: {before} KiB, then {after} KiB"
    );

    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 3);
    driver.finish();
    let deadline = Instant::now() + TIMEOUT;
    while open_fds(daemon.pid()) != fds {
        let now = open_fds(daemon.pid());
        assert!(Instant::now() < deadline, "{fds} descriptors, then {now}");
        std::thread::yield_now();
    }
    // Each kind of line has a limit for itself.
    let limit = 20 * (begin.elapsed() + Duration::from_secs(1)).as_secs() as usize;
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    let lines = daemon.log.len();
    eprintln!("{sessions} sessions, {lines} lines, {before} and {after} KiB");
    assert!(
        lines <= limit && limit < sessions,
        "{lines} lines of {sessions} sessions: {:#?}",
        daemon.log
    );
}

#[test]
fn guest_that_breaks_its_queue_again_and_again_is_worth_a_line_and_not_more() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    let mut daemon = Daemon::serve(&socket, &image, &[]);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    let begin = Instant::now();
    for _ in 0..300 {
        driver.queues[0].offer(0xffff);
        driver.queues[0].kick();
        driver.queues[0].wait_err();
        driver.frontend.stop_queue(0);
        driver.queues[0].reset();
        let features = driver.features;
        driver.frontend.start_queue(&driver.queues[0], 0, features);
    }
    write_and_read(&mut driver, 0, 7);
    // The session itself was never in question.
    assert_ne!(driver.frontend.number(FrontendReq::GET_FEATURES), 0);
    driver.finish();
    let seconds = begin.elapsed().as_secs() as usize;
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    let broken = |line: &&String| line.contains("queue stopped until it is set up again");
    let lines = daemon.log.iter().filter(broken).count();
    assert!(
        (1..=1 + seconds / 10 + 1).contains(&lines),
        "{lines} lines in {seconds} s"
    );
}
