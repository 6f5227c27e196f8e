//! What the tests of the real daemon need: a network namespace, a packet socket, a process.
#![allow(dead_code, reason = "each test file uses its part")]
#![expect(
    unsafe_code,
    reason = "unshare, kill and packet sockets have no safe form in libc"
)]

pub(crate) mod guest;

use std::io::{self, BufRead, BufReader, Read};
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs `test` on a thread in a network namespace of its own. Interfaces, and processes that it
/// starts, live there; the namespace goes when they have gone, whatever happens.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let body = move || {
        // SAFETY: unshare takes flags; it affects this thread only, which was made for it.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            println!(
                "skipped: no network namespace ({})",
                io::Error::last_os_error()
            );
            return;
        }
        if let Err(error) = std::fs::File::open("/dev/net/tun") {
            println!("skipped: /dev/net/tun: {error}");
            return;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            println!("skipped: no ip command");
            return;
        }
        // No neighbour discovery between the test's own frames.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    };
    if let Err(panic) = thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with these blank-separated arguments; true if it worked.
pub(crate) fn try_ip(args: &str) -> bool {
    let output = Command::new("ip")
        .args(args.split_whitespace())
        .output()
        .unwrap();
    output.status.success()
}

/// Runs `ip`, which must work.
pub(crate) fn ip(args: &str) {
    assert!(try_ip(args), "ip {args}");
}

/// Whether the interface exists.
pub(crate) fn exists(interface: &str) -> bool {
    try_ip(&format!("link show dev {interface}"))
}

/// Waits until the interface is gone: a killed daemon's io_uring keeps it for some milliseconds.
pub(crate) fn wait_until_gone(interface: &str) {
    let deadline = Instant::now() + TIMEOUT;
    while exists(interface) {
        assert!(Instant::now() < deadline, "{interface} is still there");
        thread::yield_now();
    }
}

/// What `ip -d link show` says of the interface.
pub(crate) fn describe(interface: &str) -> String {
    let output = Command::new("ip")
        .args(["-d", "link", "show", "dev", interface])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A path for a socket that no other test uses; what is there goes when this is dropped, as a daemon
/// that is killed leaves its sockets behind.
pub(crate) struct SocketPath(PathBuf);

impl SocketPath {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("berth-net-test-{}-{n}.sock", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Deref for SocketPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_berth-net"))
}

/// Runs the program to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    run_with_stdin(args, Stdio::null())
}

fn run_with_stdin(args: &[&str], stdin: Stdio) -> Output {
    command().args(args).stdin(stdin).output().unwrap()
}

/// Runs the program, which must fail with exit code `code` and one line on stderr; the line.
pub(crate) fn fails(code: i32, args: &[&str]) -> String {
    fails_with_stdin(code, args, Stdio::null())
}

/// The same, with this standard input.
pub(crate) fn fails_with_stdin(code: i32, args: &[&str], stdin: Stdio) -> String {
    let output = run_with_stdin(args, stdin);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    text
}

/// IFF_VNET_HDR, for [`attach`].
pub(crate) const VNET_HDR: i32 = libc::IFF_VNET_HDR;

/// A descriptor attached to a tap, with IFF_TAP, IFF_NO_PI and `flags`.
pub(crate) fn attach(tap: &str, flags: i32) -> OwnedFd {
    let fd = OwnedFd::from(
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap(),
    );
    // SAFETY: ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(tap.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | flags;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is, exclusively borrowed.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "attach to {tap}: {}", io::Error::last_os_error());
    fd
}

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    socket: SocketPath,
    lines: Receiver<String>,
}

impl Daemon {
    /// Starts it and waits until it listens.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_with_stdin(args, Stdio::null())
    }

    /// The same, with this standard input.
    pub(crate) fn start_with_stdin(args: &[&str], stdin: Stdio) -> Self {
        let socket = SocketPath::new();
        let mut child = command()
            .arg(format!("--socket-path={}", socket.display()))
            .args(args)
            .env("RUST_LOG", "info")
            .stdin(stdin)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let daemon = Self {
            child,
            socket,
            lines,
        };
        daemon.wait_for_line("ready for a frontend");
        daemon
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of its log with `text`.
    pub(crate) fn wait_for_line(&self, text: &str) {
        let mut seen = String::new();
        loop {
            match self.lines.recv_timeout(TIMEOUT) {
                Ok(line) if line.contains(text) => return,
                Ok(line) => seen.push_str(&format!("{line}\n")),
                Err(_) => panic!("no '{text}' in the log:\n{seen}"),
            }
        }
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn end(mut self, signal: i32) -> ExitStatus {
        // SAFETY: kill takes integers; the child has not been waited for, so the id is its own.
        let sent = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        assert_eq!(sent, 0);
        self.child.wait().unwrap()
    }

    /// Processor time used so far, in clock ticks.
    pub(crate) fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1;
        fields
            .split(' ')
            .skip(11)
            .take(2)
            .map(|n| n.parse::<u64>().unwrap())
            .sum()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a process ended by this signal.
pub(crate) fn ended_by(status: ExitStatus, signal: i32) -> bool {
    status.signal() == Some(signal)
}

/// The host's end of an interface: frames as they are, behind a virtio-net header of ten bytes
/// (PACKET_VNET_HDR), so that segmentation offload is visible.
pub(crate) struct PacketSocket {
    file: std::fs::File,
}

impl PacketSocket {
    /// Sends to `interface`, and receives what comes in from it with this EtherType.
    pub(crate) fn new(interface: &str, ether_type: u16) -> Self {
        let protocol = ether_type.to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes integers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: the call just made `fd`, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let on: libc::c_int = 1;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on);
        let timeout = libc::timeval {
            tv_sec: 20,
            tv_usec: 0,
        };
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout);
        let buffer: libc::c_int = 4 << 20;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &buffer);
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: sockaddr_ll is plain data, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        // SAFETY: a NUL-terminated string that outlives the call.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` is a sockaddr_ll of `len` bytes that outlives the call.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(
            bound,
            0,
            "bind to {interface}: {}",
            io::Error::last_os_error()
        );
        Self {
            file: std::fs::File::from(fd),
        }
    }

    /// Sends header and frame.
    pub(crate) fn send(&self, bytes: &[u8]) {
        let sent = io::Write::write(&mut &self.file, bytes).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// Waits for a frame; with its header.
    pub(crate) fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; 128 << 10];
        let n = (&self.file).read(&mut bytes).expect("a frame in time");
        bytes.truncate(n);
        bytes
    }
}

fn set_option<T>(fd: &OwnedFd, level: i32, name: i32, value: &T) {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is `len` bytes that outlive the call.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const *value).cast(), len) };
    assert_eq!(
        result,
        0,
        "setsockopt {name}: {}",
        io::Error::last_os_error()
    );
}
