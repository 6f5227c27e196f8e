//! The program as people run it: what it refuses and how, and what a run leaves behind. No speed is
//! looked at here.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(60);

/// A directory that goes away with the test.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bench-usage-{}-{n}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    fn entries(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-perf"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Exit code and what it said.
fn refused(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = bench(args).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// A run that needs no privilege, no daemon and no io_uring.
fn small_run(dir: &TempDir, run_ms: &str, more: &[&str]) -> Command {
    let mut command = bench(&[
        "blk",
        "--cell=cache-randread-4k-qd1",
        "--limit=loop-pread",
        "--subject=loop-pread",
        // Any program that is there: it is not asked for.
        "--berth-blk=/bin/sh",
        "--client-cpu=0",
        "--daemon-cpu=0",
        "--file-mib=16",
        "--no-counts",
        "--no-idle",
    ]);
    command
        .arg(format!("--run-ms={run_ms}"))
        .arg(format!("--dir={}", dir.0.display()))
        .args(more);
    command
}

#[test]
fn what_is_not_there_is_refused_in_one_line() {
    let with = |arg: &str| refused(&["blk", "--berth-blk=/bin/sh", arg]);
    let (code, text) = with("--cell=zram-qd2");
    assert_eq!(code, Some(1));
    assert!(
        text.contains("no cell 'zram-qd2'; there are zram-"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1);
    let (code, text) = with("--subject=nobody");
    assert_eq!(code, Some(1));
    assert!(text.contains("no subject 'nobody' here"), "{text}");
    let (code, text) = refused(&["blk", "--berth-blk=/nowhere/berth-blk"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("no /nowhere/berth-blk: build it"), "{text}");
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in [
        &["blk", "--daemon-cpu=4096"][..],
        &["blk", "--variant=--poll-us=0"],
        &["blk", "--run-ms=1"],
        &["net", "--no-idle"],
        &[],
    ] {
        assert_eq!(refused(args).0, Some(2), "{args:?}");
    }
}

#[test]
fn help_has_examples() {
    let output = bench(&["blk", "--help"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Examples:") && text.contains("--variant='old=/tmp/berth-blk-old'"));
}

#[test]
fn a_run_prints_the_table_writes_json_and_leaves_nothing() {
    let (dir, out) = (TempDir::new(), TempDir::new());
    let json = out.0.join("table.json");
    let to = format!("--json={}", json.display());
    let output = small_run(&dir, "60", &["--rounds=2", &to])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    assert!(
        text.contains("cache 4k randread QD1, client sleeps"),
        "{text}"
    );
    assert!(text.contains("loop-pread"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    let subject = &json["cells"][0]["subjects"][0];
    assert_eq!(subject["subject"], "loop-pread");
    assert_eq!(subject["runs"].as_array().unwrap().len(), 2);
    assert_eq!(subject["share_of_limit"]["median"], 1.0);
    assert!(subject["runs"][0]["rate"].as_f64().unwrap() > 0.0);
    assert_eq!(dir.entries(), Vec::<PathBuf>::new());
}

#[test]
fn a_run_that_is_killed_leaves_nothing() {
    let dir = TempDir::new();
    let mut child = small_run(&dir, "600000", &[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let wait_for = |what: &str, there: &dyn Fn() -> bool| {
        let deadline = Instant::now() + TIMEOUT;
        while !there() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(10));
        }
    };
    wait_for("it makes a file", &|| {
        let entries = dir.entries();
        entries.iter().any(|entry| entry.join("disk.img").exists())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the janitor clears up", &|| dir.entries().is_empty());
}
