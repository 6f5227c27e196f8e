//! What a confined thread can still do, and how it ends if it does more.
//!
//! Each case is a process of its own: this test binary again, told by the environment what to do
//! once it is confined (`confined_process` below). What it does is seen from its end.
#![allow(clippy::unwrap_used, missing_docs)]
#![expect(
    unsafe_code,
    reason = "raw system calls are what a sandbox is tried with"
)]

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use berth_queue_worker::sandbox::{self, FilesConfined, Mode, Plan, ThreadKind};

const WHAT: &str = "BERTH_TEST_CONFINED";
const DIR: &str = "BERTH_TEST_DIR";

/// Runs `confined_process` in a new process: how it ended and what it said.
fn confined(what: &str, dir: &Path) -> (ExitStatus, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "confined_process",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(WHAT, what)
        .env(DIR, dir)
        .env("RUST_BACKTRACE", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    (child.wait().unwrap(), text)
}

struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> TempDir {
        let name = format!("berth-sandbox-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Call = fn() -> libc::c_long;

fn open_a_file() -> libc::c_long {
    let path = c"/dev/null".as_ptr();
    // SAFETY: a C string that outlives the call.
    unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_RDWR) }
}

/// A system call with integer arguments.
macro_rules! call {
    ($number:expr $(, $arg:expr)*) => {
        || {
            // SAFETY: integers, and null where the kernel expects an address: it would fail.
            unsafe { libc::syscall($number $(, $arg as libc::c_long)*) }
        }
    };
}

/// What no thread may do.
const FORBIDDEN: &[(&str, libc::c_long, Call)] = &[
    ("openat", libc::SYS_openat, open_a_file),
    (
        "openat2",
        libc::SYS_openat2,
        call!(libc::SYS_openat2, 0, 0, 0, 0),
    ),
    (
        "socket",
        libc::SYS_socket,
        call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
    ),
    (
        "connect",
        libc::SYS_connect,
        call!(libc::SYS_connect, 0, 0, 0),
    ),
    ("bind", libc::SYS_bind, call!(libc::SYS_bind, 0, 0, 0)),
    ("execve", libc::SYS_execve, call!(libc::SYS_execve, 0, 0, 0)),
    (
        "execveat",
        libc::SYS_execveat,
        call!(libc::SYS_execveat, 0, 0, 0, 0, 0),
    ),
    (
        "ptrace",
        libc::SYS_ptrace,
        call!(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
    ),
    (
        "process_vm_writev",
        libc::SYS_process_vm_writev,
        call!(libc::SYS_process_vm_writev, 1, 0, 0, 0, 0, 0),
    ),
    ("kill", libc::SYS_kill, call!(libc::SYS_kill, 1, 0)),
    (
        "tgkill of another process",
        libc::SYS_tgkill,
        call!(libc::SYS_tgkill, 1, 1, 0),
    ),
    (
        "clone without CLONE_THREAD",
        libc::SYS_clone,
        call!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
    ),
    (
        "executable memory",
        libc::SYS_mmap,
        call!(
            libc::SYS_mmap,
            0,
            4096,
            libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0
        ),
    ),
    (
        "memory made executable",
        libc::SYS_mprotect,
        call!(libc::SYS_mprotect, 0, 0, libc::PROT_READ | libc::PROT_EXEC),
    ),
    (
        "an ioctl",
        libc::SYS_ioctl,
        call!(libc::SYS_ioctl, 2, libc::TIOCSTI, 0),
    ),
    ("setuid", libc::SYS_setuid, call!(libc::SYS_setuid, 0)),
    ("capset", libc::SYS_capset, call!(libc::SYS_capset, 0, 0)),
    (
        "mount",
        libc::SYS_mount,
        call!(libc::SYS_mount, 0, 0, 0, 0, 0),
    ),
    ("bpf", libc::SYS_bpf, call!(libc::SYS_bpf, 0, 0, 0)),
    (
        "chmod",
        libc::SYS_fchmodat,
        call!(libc::SYS_fchmodat, 0, 0, 0),
    ),
    (
        "io_uring, which this device does not use",
        libc::SYS_io_uring_setup,
        call!(libc::SYS_io_uring_setup, 1, 0),
    ),
];

/// What the control thread may do and others may not.
const CONTROL_ONLY: &[(&str, libc::c_long, Call)] = &[
    (
        "unlinkat",
        libc::SYS_unlinkat,
        call!(libc::SYS_unlinkat, 0, 0, 0),
    ),
    (
        "recvmsg",
        libc::SYS_recvmsg,
        call!(libc::SYS_recvmsg, -1, 0, 0),
    ),
    (
        "memfd_create",
        libc::SYS_memfd_create,
        call!(libc::SYS_memfd_create, 0, 0),
    ),
    (
        "a new thread",
        libc::SYS_clone,
        call!(libc::SYS_clone, libc::CLONE_THREAD, 0, 0, 0, 0),
    ),
    (
        "a filter",
        libc::SYS_seccomp,
        call!(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, 0),
    ),
];

/// The life of a thread that does nothing wrong: memory, time, log, a thread's start and end.
fn behave() {
    let mut blocks: Vec<Vec<u8>> = (1..40).map(|n| vec![n; 1 << (n / 2)]).collect();
    blocks.iter_mut().for_each(Vec::shrink_to_fit);
    assert_eq!(
        blocks
            .iter()
            .map(|block| usize::from(block[0]))
            .sum::<usize>(),
        780
    );
    let map: std::collections::HashMap<_, _> = (0..100).map(|n| (n, n)).collect();
    assert_eq!(map.len(), 100);
    // What the libraries try for themselves, and a program's own attempt that looks the same.
    let error = std::fs::File::open("/dev/null").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    std::thread::sleep(std::time::Duration::from_nanos(1));
    eprintln!("time is {:?}", std::time::SystemTime::now());
    std::io::stderr().flush().unwrap();
}

fn on_thread_of(kind: &str, action: impl FnOnce() + Send + 'static) {
    let kind = match kind {
        "control" => return action(),
        "worker" => ThreadKind::Worker,
        "helper" => ThreadKind::Helper,
        other => panic!("no such kind of thread: {other}"),
    };
    let thread = std::thread::Builder::new().name("test-q0".to_owned());
    let thread = thread.spawn(move || {
        sandbox::enter_thread(kind).unwrap();
        action();
    });
    thread.unwrap().join().unwrap();
}

/// What the other tests start as a process of its own; nothing to do when it is run as a test.
#[test]
fn confined_process() {
    let Ok(what) = std::env::var(WHAT) else {
        return;
    };
    let dir = PathBuf::from(std::env::var(DIR).unwrap());
    let parts: Vec<&str> = what.split(':').collect();
    berth_queue_worker::init_logging();
    match parts[..] {
        ["files"] => {
            try_files(&dir);
            // Not through the harness's end: what it opens is not the question here.
            std::process::exit(0);
        }
        [mode, kind, call] => {
            let mode = match mode {
                "on" => Mode::On,
                "log" => Mode::Log,
                _ => Mode::Off,
            };
            sandbox::enter(mode, &Plan::default()).unwrap();
            let call = call.to_owned();
            on_thread_of(kind, move || make_call(&call));
            std::process::exit(0);
        }
        _ => panic!("{what}"),
    }
}

fn make_call(name: &str) {
    match name {
        "behave" => behave(),
        "panic" => panic!("on purpose"),
        "abort" => std::process::abort(),
        _ => {
            let mut all = FORBIDDEN.iter().chain(CONTROL_ONLY);
            let (_, _, call) = all.find(|(known, _, _)| *known == name).unwrap();
            call();
        }
    }
}

fn try_files(dir: &Path) {
    let (sockets, elsewhere) = (dir.join("sockets"), dir.join("elsewhere"));
    let socket = sockets.join("disk.sock");
    let mut open = std::fs::File::open(elsewhere.join("open")).unwrap();
    let confined = sandbox::confine_files(std::slice::from_ref(&socket)).unwrap();
    if confined == FilesConfined::Not {
        eprintln!("skipped: no Landlock in this kernel");
        return;
    }
    let denied = |result: std::io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::PermissionDenied,
            "{what}: {error}"
        );
    };
    let try_open = |path: &Path| std::fs::File::open(path).map(drop);
    denied(try_open(&elsewhere.join("open")), "reading a file");
    denied(
        try_open(Path::new("/proc/self/mem")),
        "reading a file of /proc",
    );
    denied(try_open(&socket), "reading where a socket is");
    denied(
        std::fs::File::create(sockets.join("new")).map(drop),
        "making a file",
    );
    denied(std::fs::read_dir(dir).map(drop), "listing a directory");
    denied(
        std::fs::remove_file(elsewhere.join("open")),
        "removing a file elsewhere",
    );
    denied(
        std::os::unix::fs::symlink("/", sockets.join("link")),
        "making a link",
    );
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "open", "what is open stays so");
    std::fs::remove_file(&socket).expect("a socket of ours is removed");
    if confined == FilesConfined::Fully {
        denied(
            std::net::TcpListener::bind(("127.0.0.1", 0)).map(drop),
            "a TCP socket",
        );
    }
}

fn expect_death(what: &str, number: libc::c_long, thread: &str) {
    let (status, text) = confined(what, Path::new("/"));
    assert_eq!(
        status.signal(),
        Some(libc::SIGSYS),
        "{what}: {status} {text}"
    );
    let line = format!("sandbox: thread {thread} made system call {number}, which is not allowed");
    assert!(text.contains(&line), "{what}: no {line:?} in {text}");
}

#[test]
fn what_no_daemon_needs_is_death_by_sigsys_with_a_line() {
    for (name, number, _) in FORBIDDEN {
        for kind in ["control", "worker", "helper"] {
            let thread = if kind == "control" {
                "confined_proces"
            } else {
                "test-q0"
            };
            expect_death(&format!("on:{kind}:{name}"), *number, thread);
        }
    }
}

#[test]
fn what_the_control_thread_needs_is_kept_from_others() {
    for (name, number, _) in CONTROL_ONLY {
        let (status, text) = confined(&format!("on:control:{name}"), Path::new("/"));
        assert_eq!(status.code(), Some(0), "{name}: {status} {text}");
        for kind in ["worker", "helper"] {
            expect_death(&format!("on:{kind}:{name}"), *number, "test-q0");
        }
    }
}

#[test]
fn ordinary_life_and_ordinary_death_are_allowed() {
    for kind in ["control", "worker", "helper"] {
        let (status, text) = confined(&format!("on:{kind}:behave"), Path::new("/"));
        assert!(
            status.success() && text.contains("time is"),
            "{kind}: {status} {text}"
        );
        let (status, text) = confined(&format!("on:{kind}:panic"), Path::new("/"));
        assert!(text.contains("on purpose"), "{kind}: {text}");
        assert!(text.contains("stack backtrace"), "{kind}: {text}");
        assert_eq!(status.code(), Some(101), "{kind}: {status} {text}");
        let (status, text) = confined(&format!("on:{kind}:abort"), Path::new("/"));
        assert_eq!(
            status.signal(),
            Some(libc::SIGABRT),
            "{kind}: {status} {text}"
        );
    }
}

#[test]
fn log_and_off_refuse_nothing_and_say_so() {
    for (mode, line) in [("log", "sandbox only logs"), ("off", "sandbox is off")] {
        for kind in ["control", "worker", "helper"] {
            let (status, text) = confined(&format!("{mode}:{kind}:openat"), Path::new("/"));
            assert!(status.success(), "{mode} {kind}: {status} {text}");
            assert!(text.contains(line), "{mode}: {text}");
        }
    }
}

#[test]
fn files_can_be_used_but_not_opened_and_only_sockets_removed() {
    let dir = TempDir::new("files");
    for name in ["sockets", "elsewhere"] {
        std::fs::create_dir(dir.0.join(name)).unwrap();
    }
    std::fs::write(dir.0.join("elsewhere/open"), "open").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.0.join("sockets/disk.sock")).unwrap();
    let (status, text) = confined("files", &dir.0);
    assert!(status.success(), "{status} {text}");
}
