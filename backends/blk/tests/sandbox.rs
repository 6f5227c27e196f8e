//! The confinement of the running daemon, as /proc shows it.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::time::Instant;

use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
use support::{Daemon, TIMEOUT, TempDir};

/// Name of each thread, and its line of /proc/PID/task/TID/status for `fields`.
fn threads(pid: i32, fields: &[&str]) -> BTreeMap<String, Vec<String>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_task = |task: std::io::Result<std::fs::DirEntry>| {
        // One of the kernel's own workers may go while we look; none of ours does.
        let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let field = |name: &&str| {
            let start = format!("{name}:\t");
            let line = status.lines().find_map(|line| line.strip_prefix(&start));
            line.unwrap().to_owned()
        };
        let name = field(&"Name");
        let of_io_uring = name.starts_with("iou-");
        (!of_io_uring).then(|| (name, fields.iter().map(field).collect()))
    };
    tasks.filter_map(of_task).collect()
}

/// Flushes the disk: queue 0 has run when it returns.
fn flush(driver: &mut FakeDriver) {
    let header = driver
        .ram
        .place(&[4u32.to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat());
    let status = driver.ram.alloc(1, 1);
    driver.queues[0].run(&[Buffer::readable(header, 16), Buffer::writable(status, 1)]);
    assert_eq!(driver.ram.read(status, 1), [0]);
}

/// What of a thread's status is looked at.
const FIELDS: [&str; 5] = [
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "CapEff",
    "CapPrm",
];

/// Rings may need to lock memory.
fn may_lock_all_it_can(pid: i32) {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let locked = limits
        .lines()
        .find(|line| line.starts_with("Max locked memory"));
    let [soft, hard] = [3, 4].map(|at| locked.unwrap().split_whitespace().nth(at));
    assert_eq!(soft, hard);
}

#[test]
fn every_thread_is_confined_unless_told_otherwise() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 1 << 20);
    let socket = dir.path("disk.sock");
    let metrics = format!("--metrics-socket={}", dir.path("metrics.sock").display());
    let control = format!("--control-socket={}", dir.path("control.sock").display());
    let before = threads(std::process::id() as i32, &FIELDS);
    // As this process is, so is a daemon that gives up nothing.
    let ours = before.values().next().unwrap().clone();
    let number = |at: usize| ours[at].parse::<u32>().unwrap();
    for (mode, line) in [
        ("on", "sandbox entered"),
        ("log", "sandbox only logs"),
        ("off", "sandbox is off"),
    ] {
        let mode_flag = format!("--sandbox={mode}");
        let daemon = Daemon::serve(&socket, &image, &[&metrics, &control, &mode_flag]);
        assert!(daemon.log.iter().any(|said| said.contains(line)), "{mode}");
        let mut driver = FakeDriver::connect(&socket, Setup::default());
        flush(&mut driver);
        let expected = |filters: u32| {
            let [mut new_privs, mut seccomp] = [number(0), number(1)];
            let (mut eff, mut prm) = (ours[3].clone(), ours[4].clone());
            if mode != "off" {
                (new_privs, seccomp) = (1, 2);
            }
            if mode == "on" {
                (eff, prm) = ("0".repeat(16), "0".repeat(16));
            }
            let filters = number(2) + filters;
            vec![
                new_privs.to_string(),
                seccomp.to_string(),
                filters.to_string(),
                eff,
                prm,
            ]
        };
        // Each thread adds the filter of its kind to what it inherits.
        let (first, others) = match mode {
            "on" => (3, 4),
            "log" => (1, 2),
            _ => (0, 0),
        };
        let expected: BTreeMap<_, _> = [
            ("berth-blk".to_owned(), expected(first)),
            ("blk-q0".to_owned(), expected(others)),
            ("control-socket".to_owned(), expected(others)),
            ("metrics".to_owned(), expected(others)),
        ]
        .into();
        // The sockets' threads may only just have been started.
        let deadline = Instant::now() + TIMEOUT;
        while threads(daemon.pid(), &FIELDS) != expected {
            if Instant::now() > deadline {
                assert_eq!(threads(daemon.pid(), &FIELDS), expected, "--sandbox={mode}");
            }
            std::thread::yield_now();
        }
        if mode == "on" {
            may_lock_all_it_can(daemon.pid());
        }
        driver.finish();
        daemon.terminate();
        let left =
            ["disk.sock", "metrics.sock", "control.sock"].map(|name| dir.path(name).exists());
        assert_eq!(left, [false; 3], "{mode}: sockets are removed from within");
    }
}
