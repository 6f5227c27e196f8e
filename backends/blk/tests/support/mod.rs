//! Starts the real daemon, waits for what it says, and cleans up.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test binary uses a part; tests fail by panicking"
)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use berth_queue_worker::testing::{Buffer, FakeDriver};

/// How long anything may take before a test fails.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// A directory that goes away with the test.
pub struct TempDir(pub PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("berth-blk-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file of `size` zero bytes.
    pub fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Ends the test process if the value still lives after [`TIMEOUT`]: for clients that can only wait
/// without one.
pub struct Watchdog(#[allow(unused, reason = "its drop is the news")] std::sync::mpsc::Sender<()>);

impl Watchdog {
    pub fn new(what: &'static str) -> Watchdog {
        let (alive, gone) = channel::<()>();
        std::thread::spawn(move || {
            if gone.recv_timeout(TIMEOUT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{what} took longer than {TIMEOUT:?}");
                std::process::abort();
            }
        });
        Watchdog(alive)
    }
}

pub fn command() -> Command {
    piped(Command::new(env!("CARGO_BIN_EXE_berth-blk")))
}

/// The daemon that is to serve `image` on `socket`.
pub fn serving(socket: &Path, image: &Path, more: &[&str]) -> Command {
    let mut command = command();
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", image.display()))
        .args(more);
    command
}

/// With its log to be read.
pub fn piped(mut command: Command) -> Command {
    command
        .env("RUST_LOG", "debug")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    lines: Receiver<String>,
    /// What it has said so far.
    pub log: Vec<String>,
}

impl Daemon {
    pub fn spawn(mut command: Command) -> Daemon {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Daemon {
            child,
            lines,
            log: Vec::new(),
        }
    }

    /// Serves `image` on `socket`; returns when frontends may come.
    pub fn serve(socket: &Path, image: &Path, more: &[&str]) -> Daemon {
        let mut daemon = Daemon::spawn(serving(socket, image, more));
        daemon.wait_for("ready for a frontend");
        daemon
    }

    /// Waits for a line with `text`.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = line.contains(text);
                    self.log.push(line);
                    if found {
                        return;
                    }
                }
                Err(e) => panic!("daemon did not say {text:?} ({e}): {:#?}", self.log),
            }
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        let kill = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(kill.unwrap().success());
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        // The log ends when the process does.
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.log.push(line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(e) => panic!("daemon does not end ({e}): {:#?}", self.log),
            }
        }
        self.child.wait().unwrap()
    }

    /// SIGTERM; it must end cleanly.
    pub fn terminate(mut self) {
        self.signal("TERM");
        let status = self.wait();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(0), None),
            "{:#?}",
            self.log
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the daemon with arguments that it must refuse: exit code and stderr.
pub fn refused(args: &[String]) -> (i32, String) {
    let _watchdog = Watchdog::new("a refusal");
    let mut command = command();
    command.env("RUST_LOG", "error").args(args);
    let mut child = command.spawn().unwrap();
    let mut text = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    (child.wait().unwrap().code().unwrap(), text)
}

/// One request through queue 0: status and data read.
pub fn request(
    driver: &mut FakeDriver,
    kind: u32,
    sector: u64,
    data: &[u8],
    read: u32,
) -> (u8, Vec<u8>) {
    let ram = Arc::clone(&driver.ram);
    let header = [
        &kind.to_le_bytes()[..],
        &[0; 4],
        &sector.to_le_bytes()[..],
        data,
    ]
    .concat();
    let out = ram.alloc(u64::from(read) + 1, 512);
    driver.queues[0].run(&[
        Buffer::readable(ram.place(&header), header.len() as u32),
        Buffer::writable(out, read + 1),
    ]);
    let mut bytes = ram.read(out, read as usize + 1);
    let status = bytes.pop().unwrap();
    (status, bytes)
}

pub fn write_and_read(driver: &mut FakeDriver, sector: u64, fill: u8) {
    assert_eq!(request(driver, 1, sector, &[fill; 4096], 0).0, 0);
    let (status, data) = request(driver, 0, sector, &[], 4096);
    assert_eq!((status, data), (0, vec![fill; 4096]));
}

/// A loop device on an image, detached when dropped; none where this machine gives us none.
pub struct LoopDevice(pub String);

impl LoopDevice {
    pub fn attach(image: &Path) -> Option<LoopDevice> {
        LoopDevice::attach_with(image, &[])
    }

    pub fn attach_with(image: &Path, flags: &[&str]) -> Option<LoopDevice> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(flags)
            .arg(image)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(LoopDevice(name.trim().to_owned()))
            }
            _ => {
                eprintln!("skipped: no loop device");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// Runs a script in a mount namespace of its own (`-m`, for root) or as root of a user namespace, too
/// (`-rm`); what it prints, if it could.
pub fn in_namespace(flags: &str, script: &str) -> Option<String> {
    let root = Command::new("unshare")
        .args([flags, "sh", "-c", script])
        .output();
    match root {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8(output.stdout).unwrap();
            Some(text.trim().to_owned())
        }
        _ => {
            eprintln!("skipped: cannot do this here: {script}");
            None
        }
    }
}
