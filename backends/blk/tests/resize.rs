//! The disk follows its image's size while a driver uses it: by command and by signal.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::testing::{FakeDriver, Setup};
use support::{Daemon, LoopDevice, TIMEOUT, TempDir, refused, request, write_and_read};

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// A daemon with a control socket.
struct Served {
    dir: TempDir,
    image: PathBuf,
    daemon: Daemon,
}

impl Served {
    fn new(size: u64) -> Served {
        let dir = TempDir::new();
        let image = dir.image("disk.img", size);
        let (socket, control) = (dir.path("disk.sock"), dir.path("disk.ctl"));
        let control = format!("--control-socket={}", control.display());
        let daemon = Daemon::serve(&socket, &image, &[&control]);
        Served { dir, image, daemon }
    }

    /// One command; its answer.
    fn ask(&self, command: &str) -> String {
        ask(&self.dir.path("disk.ctl"), command)
    }

    /// A driver, and the channel on which the daemon speaks to its frontend.
    fn connect(&self) -> (FakeDriver, UnixStream) {
        let socket = self.dir.path("disk.sock");
        let mut driver = FakeDriver::connect(&socket, Setup::default());
        let channel = open_channel(&mut driver);
        (driver, channel)
    }

    /// Waits until the daemon has noticed that the frontend is gone.
    fn wait_alone(&self) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.ask("status").contains("frontend=none") {
            assert!(Instant::now() < deadline, "the session does not end");
            std::thread::yield_now();
        }
    }

    fn set_len(&self, size: u64) {
        let file = File::options().write(true).open(&self.image).unwrap();
        file.set_len(size).unwrap();
    }
}

fn ask(control: &Path, command: &str) -> String {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(format!("{command}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

fn open_channel(driver: &mut FakeDriver) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    let fds = [theirs.as_fd()];
    driver
        .frontend
        .request(FrontendReq::SET_BACKEND_REQ_FD, &[], &fds);
    ours
}

/// Waits for CONFIG_CHANGE_MSG: request 2, version 1, no payload.
fn wait_told(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

fn capacity(driver: &mut FakeDriver) -> u64 {
    u64::from_le_bytes(driver.frontend.get_config(0, 8).try_into().unwrap())
}

#[test]
fn disk_grows_by_command_under_its_driver() {
    let served = Served::new(8 * MIB);
    let (mut driver, mut channel) = served.connect();
    assert_eq!(capacity(&mut driver), 16384);
    assert_eq!(request(&mut driver, 0, 16384, &[], 512).0, IOERR);
    assert_eq!(served.ask("resize"), "ok 16384 sectors, as before");
    served.set_len(16 * MIB);
    // Nothing changes until it is asked for.
    assert_eq!(capacity(&mut driver), 16384);
    assert_eq!(served.ask("resize"), "ok 32768 sectors");
    wait_told(&mut channel);
    assert_eq!(capacity(&mut driver), 32768);
    write_and_read(&mut driver, 32768 - 8, 3);
    let status = served.ask("status");
    for part in [
        "ok device=blk frontend=connected image=",
        "disk.img\" sectors=32768 usable_sectors=32768",
        " read_only=off write_cache=on",
    ] {
        assert!(status.contains(part), "{status}");
    }
    driver.finish();
    let help = served.ask("help");
    assert!(help.starts_with("ok help (") && help.contains("resize ("));
    assert!(served.ask("rezise").contains("(nearest: 'resize')"));
    served.daemon.terminate();
}

#[test]
fn disk_grows_by_signal_with_a_driver_and_without() {
    let mut served = Served::new(8 * MIB);
    let (mut driver, mut channel) = served.connect();
    served.set_len(16 * MIB);
    served.daemon.signal("HUP");
    served.daemon.wait_for("SIGHUP: 32768 sectors");
    wait_told(&mut channel);
    assert_eq!(capacity(&mut driver), 32768);
    driver.finish();
    served.wait_alone();

    served.set_len(32 * MIB);
    served.daemon.signal("HUP");
    served
        .daemon
        .wait_for("SIGHUP: 65536 sectors, the guest was not told: no frontend is connected");
    let (mut driver, _channel) = served.connect();
    assert_eq!(capacity(&mut driver), 65536);
    driver.finish();
    served.daemon.terminate();
}

#[test]
fn smaller_image_is_reported_and_what_lies_beyond_it_fails() {
    let served = Served::new(8 * MIB);
    let (mut driver, mut channel) = served.connect();
    write_and_read(&mut driver, 0, 5);
    served.set_len(4 * MIB);
    let answer = served.ask("resize");
    assert!(
        answer.starts_with("error the image has shrunk to 8192 sectors: the disk keeps its 16384"),
        "{answer}"
    );
    // The driver keeps the size it knows; the image is not made larger by writing past its end.
    assert_eq!(capacity(&mut driver), 16384);
    assert_eq!(request(&mut driver, 1, 8192, &[1; 512], 0).0, IOERR);
    assert_eq!(request(&mut driver, 0, 8191, &[], 1024).0, IOERR);
    assert_eq!(request(&mut driver, 0, 8191, &[], 512).0, OK);
    assert_eq!(std::fs::metadata(&served.image).unwrap().len(), 4 * MIB);
    assert!(served.ask("status").contains("usable_sectors=8192"));
    // Half a sector more is no size either.
    served.set_len(8 * MIB + 100);
    let answer = served.ask("resize");
    assert!(answer.contains("not a multiple of 512"), "{answer}");
    // Back to what it was: all of it works again. And larger, which the driver is told.
    served.set_len(8 * MIB);
    assert_eq!(served.ask("resize"), "ok 16384 sectors, as before");
    write_and_read(&mut driver, 16384 - 8, 6);
    served.set_len(9 * MIB);
    assert_eq!(served.ask("resize"), "ok 18432 sectors");
    // The first news on the channel: nothing was told before.
    wait_told(&mut channel);
    write_and_read(&mut driver, 18432 - 8, 7);
    driver.finish();
    served.daemon.terminate();
}

#[test]
fn grown_block_device_is_noticed() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let Some(device) = LoopDevice::attach(&image) else {
        return;
    };
    let (socket, control) = (dir.path("disk.sock"), dir.path("disk.ctl"));
    let flag = format!("--control-socket={}", control.display());
    let flags = [flag.as_str(), "--cache=none"];
    let daemon = Daemon::serve(&socket, Path::new(&device.0), &flags);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    let mut channel = open_channel(&mut driver);
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(16 * MIB).unwrap();
    let grown = Command::new("losetup").args(["-c", &device.0]).status();
    assert!(grown.unwrap().success());
    assert_eq!(ask(&control, "resize"), "ok 32768 sectors");
    wait_told(&mut channel);
    assert_eq!(capacity(&mut driver), 32768);
    write_and_read(&mut driver, 32768 - 8, 4);
    driver.finish();
    daemon.terminate();
}

#[test]
fn control_socket_is_refused_where_it_cannot_be_and_gone_at_the_end() {
    let served = Served::new(MIB);
    let in_the_way = served.dir.path("file");
    std::fs::write(&in_the_way, "mine").unwrap();
    let (code, text) = refused(&[
        format!("--blk-file={}", served.dir.image("b.img", MIB).display()),
        format!("--socket-path={}", served.dir.path("b.sock").display()),
        format!("--control-socket={}", in_the_way.display()),
    ]);
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert!(
        text.contains("control socket: socket path") && text.contains("is not a socket"),
        "{text}"
    );
    let control = served.dir.path("disk.ctl");
    assert!(control.exists());
    let Served { dir, daemon, .. } = served;
    daemon.terminate();
    assert!(!control.exists());
    drop(dir);
}
