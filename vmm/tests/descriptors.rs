//! A VMM that may open many files, and one that may open no more.

#![expect(unsafe_code, reason = "limits of another process have no safe wrapper")]
#![expect(
    clippy::unwrap_used,
    reason = "a helper that cannot do its part has failed the test"
)]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::time::Duration;

use support::{Code, Guest, ask, eventually, has_kvm, vmm};
use vmm_sys_util::tempdir::TempDir;

/// How many files a process may open at first; returns what that was.
fn limit(pid: i32, files: libc::rlim_t) -> libc::rlim_t {
    let mut new = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let mut old = new;
    let (none, limits) = (std::ptr::null(), libc::RLIMIT_NOFILE);
    // SAFETY: each call reads or writes one rlimit, which outlives it, or none.
    unsafe {
        assert_eq!(libc::prlimit(pid, limits, none, &raw mut old), 0);
        (new.rlim_cur, new.rlim_max) = (files.min(old.rlim_max), old.rlim_max);
        let nowhere = std::ptr::null_mut();
        assert_eq!(libc::prlimit(pid, limits, &raw const new, nowhere), 0);
    }
    old.rlim_cur
}

fn files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// A client whose connection was taken.
fn client(guest: &Guest) -> UnixStream {
    let path = guest.path("api");
    let mut stream = eventually("the API listens", || UnixStream::connect(&path).ok());
    ping(&mut stream);
    stream
}

fn ping(stream: &mut UnixStream) {
    let request = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    while !answer.ends_with('}') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0].into());
    }
}

fn create(guest: &Guest) {
    let kernel = guest.path("kernel");
    let body = format!(
        r#"{{"payload": {{"kernel": "{}"}}, "memory": {{"size": 33554432}}}}"#,
        kernel.display()
    );
    assert_eq!(guest.put("vm.create", &body), (204, String::new()));
}

#[test]
fn a_guest_has_more_queues_than_most_shells_allow_files_at_first() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = dir.as_path().join("kernel");
    std::fs::write(&kernel, Code::new().halt().elf()).unwrap();
    let mut command = vmm();
    command.arg("--kernel").arg(&kernel);
    command.args(["--memory", "size=32M", "--serial", "null"]);
    for disk in ["a", "b"] {
        let disk = dir.as_path().join(disk);
        command.arg("--disk");
        command.arg(format!("socket={},num_queues=64", disk.display()));
    }
    // SAFETY: prlimit is async-signal-safe, and a failed assertion ends the child.
    unsafe {
        command.pre_exec(|| {
            limit(0, 64);
            Ok(())
        })
    };
    let mut child = command.spawn().unwrap();
    let pid = child.id();
    // A doorbell and an interrupt for each queue. A VMM that has ended has no file.
    let open = eventually("the disks are made, or refused", || {
        let ended = child.try_wait().unwrap().is_some();
        (ended || files(pid) > 256).then_some(!ended)
    });
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(open, "{stderr}");
}

#[test]
fn a_boot_for_which_there_are_no_files_is_refused_and_can_be_tried_again() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&Code::new().halt());
    create(&guest);
    let client = client(&guest);
    let before = limit(guest.pid(), 3);
    let (status, body) = ask(client, "PUT", "vm.boot");
    limit(guest.pid(), before);
    assert_eq!(status, 500, "{body}");
    assert!(body.contains("Too many open files"), "{body}");
    assert_eq!(guest.state(), "Shutdown");
    assert_eq!(guest.api("PUT", "vm.boot").0, 204);
}

#[test]
fn clients_that_cannot_be_taken_are_taken_later_and_fill_no_log() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("log");
    let log = || std::fs::read_to_string(&path).unwrap_or_default();
    let args = ["--log-file", path.to_str().unwrap()];
    let guest = Guest::start_with(&Code::new().halt(), &args);
    eventually("it runs", || (guest.state() == "Running").then_some(()));
    let mut served = client(&guest);
    let before = limit(guest.pid(), 3);
    let waits = UnixStream::connect(guest.path("api")).unwrap();
    eventually("it cannot be taken", || {
        log().contains("cannot take a client").then_some(())
    });
    for _ in 0..100 {
        ping(&mut served);
    }
    limit(guest.pid(), before);
    assert_eq!(ask(waits, "GET", "vmm.ping").0, 200);
    let lines = log().matches("cannot take a client").count();
    assert!(lines < 50, "{lines} lines");
}

/// A VMM that is killed with its test.
struct Vmm(Child);

impl Vmm {
    fn pid(&self) -> u32 {
        self.0.id()
    }

    /// What it has used of the processors.
    fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let fields: Vec<_> = rest.split_whitespace().collect();
        // The 14th and 15th of all, in hundredths of a second.
        let ticks: u64 = [11, 12]
            .map(|at| fields[at].parse::<u64>().unwrap())
            .iter()
            .sum();
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn listeners_that_cannot_take_a_client_rest_and_take_it_later() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name).display().to_string();
    std::fs::write(at("kernel"), Code::new().halt().elf()).unwrap();
    let mut command = vmm();
    command.args(["--kernel", &at("kernel"), "--memory", "size=32M"]);
    command.args(["--serial", &format!("socket={}", at("serial"))]);
    command.args(["--metrics-socket", &at("metrics"), "--log-file", &at("log")]);
    let vmm = Vmm(command.spawn().unwrap());
    let log = || std::fs::read_to_string(at("log")).unwrap_or_default();
    eventually("it runs", || log().contains("the guest runs").then_some(()));
    let open = files(vmm.pid());

    let before = limit(vmm.pid() as i32, 3);
    let connect = |name: &str| UnixStream::connect(at(name)).unwrap();
    let (_serial, mut metrics) = (connect("serial"), connect("metrics"));
    for what in ["serial socket", "metrics"] {
        eventually("it cannot be taken", || {
            let line = format!("cannot take a client of the {what}");
            log().contains(&line).then_some(())
        });
    }
    // A thread that only tried again would use all of this time, and one that rests next to nothing.
    let (window, used) = (Duration::from_millis(1500), vmm.cpu_time());
    std::thread::sleep(window);
    let used = vmm.cpu_time() - used;
    assert!(used < window / 3, "{used:?} of {window:?}");

    limit(vmm.pid() as i32, before);
    let mut text = String::new();
    metrics.read_to_string(&mut text).unwrap();
    assert!(text.contains("berth_vmm_state"), "{text}");
    eventually("the serial port's client is taken", || {
        (files(vmm.pid()) == open + 1).then_some(())
    });
}

#[test]
fn guests_that_come_and_go_leave_nothing_open() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::none(&Code::new().halt());
    let body = format!(
        r#"{{"payload": {{"kernel": "{}"}}, "serial": {{"mode": "Pty"}}}}"#,
        guest.path("kernel").display()
    );
    let count = |folder: &str| {
        let folder = format!("/proc/{}/{folder}", guest.pid());
        std::fs::read_dir(folder).unwrap().count()
    };
    let round = || {
        assert_eq!(guest.put("vm.create", &body).0, 204);
        assert_eq!(guest.api("PUT", "vm.delete").0, 204);
    };
    round();
    let before = [count("fd"), count("task")];
    for _ in 0..10 {
        round();
    }
    eventually("as many as before", || {
        (count("fd") <= before[0] + 2 && count("task") <= before[1] + 1).then_some(())
    });
}
