//! The real daemon: its sockets, its life, bad input, and frontends that misbehave.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::testing::{Buffer, FakeDriver, FakeFrontend, Setup};
use support::{Daemon, TIMEOUT, TempDir, command, refused, write_and_read};

const MIB: u64 = 1 << 20;

#[test]
fn serves_one_frontend_after_the_other_and_removes_its_socket() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    let mut daemon = Daemon::serve(&socket, &image, &["--num-queues=2"]);
    for round in 0..3u8 {
        let setup = Setup {
            num_queues: 2,
            ..Setup::default()
        };
        let mut driver = FakeDriver::connect(&socket, setup);
        write_and_read(&mut driver, u64::from(round) * 8, round + 1);
        driver.finish();
    }
    // A second frontend waits until the first has gone.
    let first = FakeDriver::connect(&socket, Setup::default());
    let mut second = FakeFrontend::new(UnixStream::connect(&socket).unwrap());
    second.send(FrontendReq::GET_FEATURES, &[], &[]);
    first.finish();
    assert_ne!(second.number_reply(FrontendReq::GET_FEATURES), 0);
    assert!(daemon.is_running());
    daemon.terminate();
    assert!(!socket.exists(), "the socket is removed");
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!((bytes[0], bytes[4096], bytes[8192]), (1, 2, 3));
}

#[test]
fn killed_daemon_is_followed_by_one_on_the_same_socket_and_image() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    for round in 0..5 {
        let daemon = Daemon::serve(&socket, &image, &["--cache=none"]);
        let mut driver = FakeDriver::connect(&socket, Setup::default());
        write_and_read(&mut driver, 0, round);
        daemon.signal("KILL");
        drop(daemon);
        assert!(socket.exists(), "a stale socket is left behind");
    }
}

#[test]
fn daemon_killed_in_the_middle_of_direct_writes_is_followed_at_once() {
    // The kernel still writes, and holds the image's lock, when the process has gone.
    let dir = TempDir::new();
    let image = dir.image("disk.img", 64 * MIB);
    let socket = dir.path("disk.sock");
    let setup = Setup {
        ram_size: 64 * MIB,
        ..Setup::default()
    };
    for _ in 0..5 {
        let daemon = Daemon::serve(&socket, &image, &["--cache=none"]);
        let mut driver = FakeDriver::connect(&socket, setup);
        let ram = Arc::clone(&driver.ram);
        for n in 0..32u64 {
            // A write to sector n * 2048.
            let header = [1, n * 2048].map(u64::to_le_bytes).concat();
            let data = ram.alloc(MIB, 4096);
            driver.queues[0].add(&[
                Buffer::readable(ram.place(&header), 16),
                Buffer::readable(data, MIB as u32),
                Buffer::writable(ram.place(&[0xff]), 1),
            ]);
        }
        driver.queues[0].kick();
        driver.queues[0].wait_used();
        daemon.signal("KILL");
    }
    Daemon::serve(&socket, &image, &[]).terminate();
}

#[test]
fn connected_fd_is_one_session_and_listening_fd_serves_on() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let blk_file = format!("--blk-file={}", image.display());
    let with_fd = |fd: OwnedFd| {
        // The shell hands the fd over without close-on-exec.
        let mut shell = Command::new("sh");
        shell
            .env("RUST_LOG", "debug")
            .arg("-c")
            .arg(format!("exec \"$0\" --fd=7 {blk_file} 7<&0 </dev/null"))
            .arg(command().get_program())
            .stdin(Stdio::from(fd))
            .stderr(Stdio::piped());
        Daemon::spawn(shell)
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = with_fd(theirs.into());
    let mut driver = FakeDriver::attach(FakeFrontend::new(ours), Setup::default());
    write_and_read(&mut driver, 0, 5);
    driver.finish();
    assert!(daemon.wait().success(), "{:#?}", daemon.log);

    let socket = dir.path("listen.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let daemon = with_fd(listener.into());
    for round in 0..2 {
        let mut driver = FakeDriver::connect(&socket, Setup::default());
        write_and_read(&mut driver, 0, round);
        driver.finish();
    }
    daemon.terminate();
    assert!(socket.exists(), "a socket that is not ours stays");
}

#[test]
fn systemd_socket_is_served() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("systemd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut shell = Command::new("sh");
    shell
        .env("RUST_LOG", "info")
        .arg("-c")
        .arg("LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$1\" 3<&0 </dev/null")
        .arg(command().get_program())
        .arg(format!("--blk-file={}", image.display()))
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stderr(Stdio::piped());
    let mut daemon = Daemon::spawn(shell);
    daemon.wait_for("ready");
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 9);
    driver.finish();
    daemon.terminate();
}

#[test]
fn told_to_stop_in_a_session_it_finishes_what_is_in_flight() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    let daemon = Daemon::serve(&socket, &image, &[]);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 1);
    daemon.terminate();
    assert!(driver.frontend.is_closed());
}

#[test]
fn misbehaving_frontends_and_guests_leave_the_daemon_alive() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    let mut daemon = Daemon::serve(&socket, &image, &[]);
    // Bytes that are no message, half a message, nothing.
    for bytes in [&[0xff; 64][..], &[1, 0, 0], &[]] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(bytes).unwrap();
    }
    // Nonsense in the ring.
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    driver.queues[0].offer(0xffff);
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    driver.finish();
    daemon.wait_for("queue stopped until it is set up again");
    // A request without room for its status.
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    let place = driver.ram.place(&[0; 16]);
    driver.queues[0].add(&[Buffer::readable(place, 16)]);
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    driver.finish();
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 3);
    driver.finish();
    daemon.terminate();
}

#[test]
fn guest_memory_that_is_cut_off_ends_the_session_and_nothing_else() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let socket = dir.path("disk.sock");
    let mut daemon = Daemon::serve(&socket, &image, &[]);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 2);
    driver.ram.truncate();
    driver.queues[0].kick();
    assert!(driver.frontend.is_closed());
    daemon.wait_for("session ended: the frontend took guest memory away");
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 3);
    driver.finish();
    daemon.terminate();
}

#[test]
fn metrics_socket_answers_http_and_plain_readers() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let (socket, metrics) = (dir.path("disk.sock"), dir.path("metrics.sock"));
    let flag = format!("--metrics-socket={}", metrics.display());
    let daemon = Daemon::serve(&socket, &image, &[&flag]);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 3);
    let kicks = driver.queues[0].kicks();
    driver.frontend.stop_queue(0);
    let ask = |request: &[u8]| {
        let mut stream = UnixStream::connect(&metrics).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let http = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(http.starts_with("HTTP/1.0 200 OK\r\n"), "{http}");
    let plain = ask(b"");
    assert!(plain.starts_with("# HELP"), "{plain}");
    for line in [
        format!("berth_kicks_total{{device=\"blk\",queue=\"0\"}} {kicks}"),
        "berth_requests_total{device=\"blk\",queue=\"0\"} 2".to_owned(),
        "berth_bytes_to_guest_total{device=\"blk\",queue=\"0\"} 4096".to_owned(),
        "berth_latency_seconds_count{device=\"blk\",queue=\"0\"} 2".to_owned(),
    ] {
        assert!(plain.contains(&line), "{line} not in {plain}");
    }
    driver.finish();
    daemon.terminate();
    assert!(!metrics.exists());
}

#[test]
fn limited_disk_answers_every_request() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let (socket, metrics) = (dir.path("disk.sock"), dir.path("metrics"));
    let metrics_flag = format!("--metrics-socket={}", metrics.display());
    // Each request is larger than the bucket, so each has to wait, however slow this machine is.
    let limit = "--rate-limit=bw_size=1024,bw_refill_time=1,ops_size=100000,ops_refill_time=1000";
    let daemon = Daemon::serve(&socket, &image, &[limit, &metrics_flag]);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    for n in 0..8 {
        write_and_read(&mut driver, u64::from(n) * 8, n);
    }
    let mut text = String::new();
    let mut stream = UnixStream::connect(&metrics).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_to_string(&mut text).unwrap();
    let throttled = "berth_throttled_total{device=\"blk\",queue=\"0\"} 16\n";
    assert!(text.contains(throttled), "{text}");
    driver.finish();
    daemon.terminate();
}

#[test]
fn bad_input_is_one_clear_line() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let odd = dir.image("odd.img", 1000);
    let empty = dir.image("empty.img", 0);
    let socket = dir.path("disk.sock");
    let cases: [(&Path, &str); 5] = [
        (&dir.path("none.img"), "cannot open image"),
        (&dir.0, "is a directory, expected a regular file"),
        (&odd, "has 1000 bytes, which is not a multiple of 512"),
        (&empty, "is empty"),
        (Path::new("/dev/null"), "is a character device"),
    ];
    for (path, message) in cases {
        let (code, text) = refused(&[
            format!("--socket-path={}", socket.display()),
            format!("--blk-file={}", path.display()),
        ]);
        assert_eq!((code, text.lines().count()), (1, 1), "{text}");
        assert!(
            text.starts_with("berth-blk: ") && text.contains(message),
            "{text}"
        );
    }
    let image_flag = format!("--blk-file={}", image.display());
    let (code, text) = refused(std::slice::from_ref(&image_flag));
    assert_eq!(code, 1);
    assert!(text.contains("give --socket-path=PATH or --fd=N"), "{text}");
    let (code, text) = refused(&[image_flag.clone(), "--fd=99".to_owned()]);
    assert_eq!(code, 1);
    assert!(text.contains("file descriptor 99"), "{text}");
    // Values that make no sense, and a flag that is nearly one.
    for (flag, message) in [
        ("--num-queues=0", "0 is not in 1..=16"),
        ("--queue-size=100", "expected a power of two"),
        ("--serial-id=123456789012345678901", "longer than 20 bytes"),
        ("--cache=fast", "(expected: none, writeback)"),
        ("--blk-fil=x", "(nearest: '--blk-file')"),
        ("--rate-limit=bw_sise=1", "(nearest: 'bw_size')"),
        (
            "--rate-limit=ops_size=9",
            "ops_size needs ops_refill_time beside it",
        ),
    ] {
        let (code, text) = refused(&[image_flag.clone(), flag.to_owned()]);
        assert_eq!((code, text.lines().count()), (2, 1), "{text}");
        assert!(text.contains(message), "{text}");
    }
}

#[test]
fn socket_paths_that_are_files_or_in_use_are_refused_and_left_alone() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let precious = dir.path("precious");
    std::fs::write(&precious, "do not lose me").unwrap();
    let blk = |path: &Path| format!("--blk-file={}", path.display());
    let sock = |path: &Path| format!("--socket-path={}", path.display());
    let (code, text) = refused(&[sock(&precious), blk(&image)]);
    assert_eq!(code, 1);
    assert!(text.contains("is not a socket"), "{text}");
    assert_eq!(
        std::fs::read_to_string(&precious).unwrap(),
        "do not lose me"
    );

    let socket = dir.path("disk.sock");
    let daemon = Daemon::serve(&socket, &image, &[]);
    let other = dir.image("other.img", MIB);
    let (code, text) = refused(&[sock(&socket), blk(&other)]);
    assert_eq!(code, 1);
    assert!(text.contains("is in use"), "{text}");
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    write_and_read(&mut driver, 0, 1);
    driver.finish();
    daemon.terminate();
}

#[test]
fn help_version_and_capabilities() {
    let run = |arg: &str| {
        let output = Command::new(command().get_program())
            .arg(arg)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let capabilities = run("--print-capabilities");
    let json: serde_json::Value = serde_json::from_str(&capabilities).unwrap();
    assert_eq!(json["type"], "block");
    assert_eq!(
        json["features"],
        serde_json::json!(["read-only", "blk-file"])
    );
    assert!(run("--version").starts_with("berth-blk "));
    let help = run("--help");
    assert!(help.contains("Examples:") && help.contains("--socket-path"));
    // Values follow their flag with a blank as well as with an equals sign.
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let mut command = command();
    command
        .arg("--socket-path")
        .arg(dir.path("s.sock"))
        .arg("--blk-file")
        .arg(&image)
        .args(["--num-queues", "3", "--serial", "X", "--cache", "none"]);
    let mut daemon = Daemon::spawn(command);
    daemon.wait_for("ready");
    daemon.terminate();
}
