//! Another program in place of the running one: drained, and its successor serves on the listening
//! socket that both inherit. The driver keeps asking, and misses nothing but time.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
use support::{Daemon, TempDir, command, request};

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 4096;
const BLOCKS: u64 = 256;
const DEPTH: usize = 32;

/// A driver that keeps `DEPTH` writes in flight, block after block.
struct Writer {
    driver: FakeDriver,
    /// Room for a header, a block and a status, by head once it is in use.
    free: Vec<u64>,
    used: HashMap<u16, u64>,
    next: u64,
    answered: u64,
}

impl Writer {
    fn new(driver: FakeDriver) -> Writer {
        let place = |_| driver.ram.alloc(u64::from(2 * BLOCK), 4096);
        Writer {
            free: (0..DEPTH).map(place).collect(),
            driver,
            used: HashMap::new(),
            next: 0,
            answered: 0,
        }
    }

    fn fill(&mut self) {
        let ram = Arc::clone(&self.driver.ram);
        while let Some(place) = self.free.pop() {
            let (block, round) = (self.next % BLOCKS, self.next / BLOCKS);
            self.next += 1;
            let header = [1, 8 * block].map(u64::to_le_bytes).concat();
            ram.write(place, &vec![pattern(block, round); BLOCK as usize]);
            ram.write(place + u64::from(BLOCK), &header);
            ram.write(place + u64::from(BLOCK) + 16, &[0xff]);
            let buffers = [
                Buffer::readable(place + u64::from(BLOCK), 16),
                Buffer::readable(place, BLOCK),
                Buffer::writable(place + u64::from(BLOCK) + 16, 1),
            ];
            let head = self.driver.queues[0].add(&buffers).unwrap();
            self.used.insert(head, place);
        }
        self.driver.queues[0].kick_if_wanted();
    }

    fn take_one(&mut self) {
        let (head, _) = self.driver.queues[0].wait_used();
        let place = self.used.remove(&head).expect("answered once");
        let status = self.driver.ram.read(place + u64::from(BLOCK) + 16, 1);
        assert_eq!(status, [0]);
        self.free.push(place);
        self.answered += 1;
    }

    fn run(&mut self, count: usize) {
        for _ in 0..count {
            self.fill();
            self.take_one();
        }
    }
}

fn pattern(block: u64, round: u64) -> u8 {
    (7 * block + 31 * round + 1) as u8
}

#[test]
fn upgrade_in_place_loses_no_request() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let socket = dir.path("disk.sock");
    // The supervisor, which has the listening socket and hands it to one after the other.
    let listener = UnixListener::bind(&socket).unwrap();
    let start = || {
        let mut shell = Command::new("sh");
        shell
            .env("RUST_LOG", "info")
            .arg("-c")
            .arg("LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 </dev/null")
            .arg(command().get_program())
            .arg(format!("--blk-file={}", image.display()))
            .arg("--cache=none")
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())))
            .stderr(Stdio::piped());
        Daemon::spawn(shell)
    };
    let mut daemon = start();
    let setup = Setup {
        inflight: true,
        ..Setup::default()
    };
    let mut writer = Writer::new(FakeDriver::connect(&socket, setup));
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        writer.run(200);
        writer.fill();
        let begin = Instant::now();
        daemon.terminate();
        assert!(writer.driver.frontend.is_closed());
        daemon = start();
        // What came while nobody took anything waits in the ring; the connection in the backlog.
        writer.driver.reconnect(&socket);
        for _ in 0..DEPTH {
            writer.take_one();
        }
        longest = longest.max(begin.elapsed());
    }
    println!("upgrade in place: longest pause {longest:?}, until all {DEPTH} writes were answered");
    assert_eq!(writer.answered, writer.next);
    for block in 0..BLOCKS {
        let last = (writer.next - 1 - block) / BLOCKS;
        let (status, data) = request(&mut writer.driver, 0, 8 * block, &[], BLOCK);
        let expected = vec![pattern(block, last); BLOCK as usize];
        assert_eq!((status, data), (0, expected), "block {block}");
    }
    daemon.terminate();
}
