//! Writes that are on their way when the daemon ends. Killed, it leaves them in the kernel, and its
//! successor begins when the last has ended; told to stop, it answers them first.
//!
//! ```text
//!   berth-blk ─▶ loop device ─▶ file on an ext4 of our own ─▶ file
//!                                  │ fsfreeze: writes wait here, for as long as we like
//! ```
#![expect(unsafe_code, reason = "fcntl with F_OFD_SETLK")]
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
use support::{Daemon, LoopDevice, TIMEOUT, TempDir, command, write_and_read};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

fn run(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

/// A file system whose writes can be held up. Thawed and unmounted when dropped, and also when this
/// process is killed: a frozen one would hold up every `sync` of the machine.
struct Frost(PathBuf, Child);

impl Frost {
    fn mount(dir: &TempDir) -> Option<Frost> {
        let image = dir.image("ext4.img", 64 * MIB);
        let at = dir.path("ext4");
        std::fs::create_dir(&at).unwrap();
        let (image, place) = (image.display().to_string(), at.display().to_string());
        let made = run("mkfs.ext4", &["-q", "-F", &image])
            && run("mount", &["-o", "loop", &image, &place]);
        if !made {
            eprintln!("skipped: cannot mount an ext4");
            return None;
        }
        // Its standard input ends with this process.
        let keeper = Command::new("sh")
            .args([
                "-c",
                "cat; fsfreeze --unfreeze \"$0\"; umount -l \"$0\"",
                &place,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        Some(Frost(at, keeper.unwrap()))
    }

    fn set(&self, flag: &str) -> bool {
        run("fsfreeze", &[flag, &self.0.display().to_string()])
    }

    fn freeze(&self) {
        assert!(self.set("--freeze"));
    }

    fn thaw(&self) {
        assert!(self.set("--unfreeze"));
    }
}

impl Drop for Frost {
    fn drop(&mut self) {
        drop(self.1.stdin.take());
        let _ = self.1.wait();
    }
}

/// Requests that are with the medium now.
fn on_medium(device: &LoopDevice) -> u64 {
    let name = device.0.rsplit('/').next().unwrap();
    let text = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).unwrap();
    let numbers = text.split_whitespace().map(|n| n.parse::<u64>().unwrap());
    numbers.sum()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

/// Offers a write of one block; where its status will be.
fn offer_write(driver: &mut FakeDriver, block: u64, fill: u8) -> u64 {
    let ram = Arc::clone(&driver.ram);
    let header = [1, block * 8].map(u64::to_le_bytes).concat();
    let data = ram.alloc(BLOCK as u64, BLOCK as u64);
    ram.write(data, &[fill; BLOCK]);
    let status = ram.place(&[0xff]);
    let buffers = [
        Buffer::readable(ram.place(&header), 16),
        Buffer::readable(data, BLOCK as u32),
        Buffer::writable(status, 1),
    ];
    driver.queues[0].add(&buffers).unwrap();
    status
}

/// A medium whose writes can be held up, and a daemon with a driver on it that has used it.
struct Bench {
    driver: FakeDriver,
    daemon: Option<Daemon>,
    device: LoopDevice,
    frost: Frost,
    dir: TempDir,
}

impl Bench {
    fn new() -> Option<Bench> {
        let dir = TempDir::new();
        let frost = Frost::mount(&dir)?;
        let image = frost.0.join("disk.img");
        std::fs::write(&image, vec![0; 8 << 20]).unwrap();
        assert!(run("sync", &["-f", &image.display().to_string()]));
        let device = LoopDevice::attach(&image)?;
        let socket = dir.path("disk.sock");
        let daemon = Daemon::serve(&socket, Path::new(&device.0), &["--cache=none"]);
        let setup = Setup {
            inflight: true,
            ..Setup::default()
        };
        let mut driver = FakeDriver::connect(&socket, setup);
        write_and_read(&mut driver, 0, 1);
        Some(Bench {
            driver,
            daemon: Some(daemon),
            device,
            frost,
            dir,
        })
    }

    /// Has the medium take its time over three writes: where their statuses will be.
    fn hold_up_writes(&mut self) -> [u64; 3] {
        self.frost.freeze();
        // Too far apart to become one.
        let offer = |fill| offer_write(&mut self.driver, 100 * u64::from(fill - 2), fill);
        let statuses = [2, 3, 4].map(offer);
        self.driver.queues[0].kick();
        until("the writes reach the medium", || {
            on_medium(&self.device) == 3
        });
        statuses
    }

    fn assert_written(&self, expected: [u8; 3]) {
        for (n, fill) in (0..).zip(expected) {
            let mut bytes = vec![0; BLOCK];
            let file = File::open(&self.device.0).unwrap();
            file.read_exact_at(&mut bytes, 100 * n * BLOCK as u64)
                .unwrap();
            assert_eq!(bytes, [fill; BLOCK], "write {n}");
        }
    }
}

#[test]
fn no_late_write_of_a_killed_daemon_lands_after_its_successors() {
    let Some(mut bench) = Bench::new() else {
        return;
    };
    // Arrange: the daemon dies with writes on the medium.
    let statuses = bench.hold_up_writes();
    drop(bench.daemon.take());
    assert_eq!(on_medium(&bench.device), 3, "they outlive it");

    // Act: the successor, beside which nobody holds the image.
    let socket = bench.dir.path("disk.sock");
    let mut more = command();
    more.arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", bench.device.0))
        .arg("--cache=none");
    let mut second = Daemon::spawn(more);
    second.wait_for("still locked by I/O of a process that has gone");
    assert_eq!(bench.driver.queues[0].outstanding(), 3);
    assert_eq!(
        bench.driver.queues[0].poll_used(),
        None,
        "it touches no ring"
    );
    bench.frost.thaw();
    second.wait_for("ready for a frontend");
    assert_eq!(on_medium(&bench.device), 0, "nothing of the first is left");

    // Assert: all three are done again and answered once, and what comes later stays.
    bench.driver.reconnect(&socket);
    for _ in statuses {
        bench.driver.queues[0].wait_used();
    }
    for status in statuses {
        assert_eq!(bench.driver.ram.read(status, 1), [0]);
    }
    write_and_read(&mut bench.driver, 0, 9);
    second.terminate();
    bench.assert_written([9, 3, 4]);
}

#[test]
fn told_to_stop_with_writes_on_the_medium_it_answers_them_first() {
    let Some(mut bench) = Bench::new() else {
        return;
    };
    let statuses = bench.hold_up_writes();
    let daemon = bench.daemon.take().unwrap();
    daemon.signal("TERM");
    bench.frost.thaw();
    daemon.terminate();
    for _ in statuses {
        assert!(bench.driver.queues[0].poll_used().is_some(), "not answered");
    }
    for status in statuses {
        assert_eq!(bench.driver.ram.read(status, 1), [0]);
    }
    assert_eq!(bench.driver.queues[0].outstanding(), 0);
    bench.assert_written([2, 3, 4]);
}

/// The mark that a daemon has on its image for as long as its I/O lasts (`image/marker.rs`); that of a
/// living process is the byte after it.
fn mark_io(file: &File) {
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 1 << 60,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: lock is a valid flock, read by the call.
    let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    assert_eq!(taken, 0);
}

#[test]
fn reader_waits_for_the_last_reads_of_a_dead_reader() {
    // Late reads would land in memory that the guest uses for something else by then.
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let (first, second) = (dir.path("first.sock"), dir.path("second.sock"));
    // Readers that live do not wait for each other.
    let other = Daemon::serve(&first, &image, &["--read-only"]);
    let left = File::open(&image).unwrap();
    mark_io(&left);
    let mut more = command();
    more.arg(format!("--socket-path={}", second.display()))
        .arg(format!("--blk-file={}", image.display()))
        .arg("--read-only");
    let mut daemon = Daemon::spawn(more);
    daemon.wait_for("still locked by I/O of a process that has gone");
    drop(left);
    daemon.wait_for("ready for a frontend");
    daemon.terminate();
    other.terminate();
}
