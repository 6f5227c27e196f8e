//! `berth-kvm-unit-tests` with a suite and machines that are shell scripts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const RUNNER: &str = env!("CARGO_BIN_EXE_berth-kvm-unit-tests");
const LIST: &str = "\
[good]
file = good.flat
qemu_params = -cpu max,+x2apic,+pcid
[bad]
file = bad.flat
smp = 2
[off]
file = off.flat
check = /nowhere=Y
[unbuilt]
file = unbuilt.flat
";

/// A folder with a suite, gone with its owner.
struct Suite(PathBuf);

impl Suite {
    fn new(name: &str, list: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kut-{name}-{}", std::process::id()));
        let suite = Self(path);
        fs::create_dir_all(suite.0.join("x86")).expect("a folder");
        fs::write(suite.0.join("x86/unittests.cfg"), list).expect("a list");
        for program in ["good", "bad", "off"] {
            fs::write(suite.0.join(format!("x86/{program}.flat")), "").expect("a program");
        }
        suite
    }

    /// A machine: a shell script, whose `$*` is a machine's command line. Another process writes it: a
    /// descriptor of this one, open for writing in a child that another test has just forked, would keep it
    /// from being executed.
    fn machine(&self, name: &str, script: &str) -> PathBuf {
        let path = self.0.join(name);
        let write = r#"printf '#!/bin/sh\n%s\n' "$2" >"$1" && chmod 755 "$1""#;
        let mut shell = Command::new("sh");
        shell.args(["-c", write, "sh"]).arg(&path).arg(script);
        assert!(shell.status().expect("sh").success());
        path
    }

    fn command(&self, vmm: &Path, qemu: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(RUNNER);
        command.arg("--suite").arg(&self.0);
        command.arg("--vmm").arg(vmm).arg("--qemu").arg(qemu);
        command.arg("--out").arg(self.0.join("out")).args(args);
        command
    }
}

impl Drop for Suite {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(mut command: Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the runner starts");
    let code = status.code().expect("an exit code");
    (code, text(&stdout), text(&stderr))
}

/// Passes what is called good; knows no PCID, as berth-vmm says it.
const OURS: &str = "\
case $* in *+pcid*) echo \"berth-vmm: --cpus: KVM on this host does not support the CPU feature 'pcid'\"; exit 1 ;; esac
case $* in *good.flat*) echo 'PASS: one'; exit 1 ;; esac
echo 'PASS: one'; echo 'FAIL: two'; exit 3";

#[test]
fn what_fails_here_and_not_under_qemu_is_a_failure() {
    let suite = Suite::new("both", LIST);
    let ours = suite.machine("ours", OURS);
    let qemu = suite.machine("qemu", "echo 'PASS: one'; exit 1");
    let (code, table, log) = run(suite.command(&ours, &qemu, &["--all"]));
    assert_eq!(code, 1, "{table}{log}");
    let row = |name: &str| -> Vec<&str> {
        let line = table.lines().find(|line| line.starts_with(name));
        line.unwrap_or_default().split_whitespace().collect()
    };
    assert_eq!(row("good"), ["good", "pass", "1", "pass", "1", "pass", "1"]);
    let bad = ["bad", "fail", "1/2", "fail", "1/2", "pass", "1"];
    assert_eq!(row("bad"), bad, "{table}");
    for line in [
        "good on kernel: without +pcid",
        "bad on split: two",
        "off on qemu: /nowhere is not Y",
        "unbuilt on split: unbuilt.flat is not built",
    ] {
        assert!(table.contains(line), "{line}: {table}");
    }
    let environment = fs::read_to_string(suite.0.join("out/bad.environment")).expect("its module");
    assert_eq!(environment, "NR_CPUS=2\nMEMSIZE=128\nTEST_DEVICE=1\n");

    // The same failure under QEMU is KVM's own.
    let (code, table, _) = run(suite.command(&ours, &ours, &["--tests", "bad,good"]));
    assert_eq!(code, 0, "{table}");
}

#[test]
fn what_cannot_be_run_is_said_in_one_line() {
    let suite = Suite::new("lines", LIST);
    let machine = suite.machine("ours", "exit 1");
    let one_line = |command, expected: &str| {
        let (code, _, log) = run(command);
        assert_eq!((code, log.lines().count()), (2, 1), "{log}");
        assert!(log.contains(expected), "{log}");
    };
    let with = |args: &[&str]| suite.command(&machine, &machine, args);
    one_line(with(&["--tests", "none"]), "the suite has no test 'none'");
    let missing = Path::new("/nowhere/vmm");
    let command = suite.command(missing, &machine, &[]);
    one_line(command, "no such file: /nowhere/vmm");
    let command = suite.command(
        &machine,
        missing,
        &["--tests", "good", "--machines", "qemu"],
    );
    one_line(command, "cannot start /nowhere/vmm");
    let list = suite.0.join("x86/unittests.cfg");
    fs::write(&list, "[a]\nfile = a.flat\nsmp = x\n").expect("a list");
    one_line(
        with(&["--all"]),
        "unittests.cfg: line 3: smp = x: not a number",
    );
    fs::write(&list, b"\xff\xfe[").expect("a list");
    one_line(with(&["--all"]), "unittests.cfg: ");
    fs::remove_file(&list).expect("gone");
    let (code, said, log) = run(with(&[]));
    assert_eq!((code, log.as_str()), (0, ""));
    assert!(
        said.starts_with("skipped kvm-unit-tests: no suite in "),
        "{said}"
    );
}

#[test]
fn a_list_is_printed_and_nothing_runs() {
    let suite = Suite::new("list", LIST);
    let machine = suite.machine("ours", "exit 1");
    let (code, said, log) = run(suite.command(&machine, &machine, &["--all", "--list"]));
    assert_eq!((code, log.as_str()), (0, ""));
    assert!(
        said.starts_with("good\nbad\noff: skip, /nowhere is not Y\n"),
        "{said}"
    );
    assert!(!suite.0.join("out").exists());
}

#[test]
fn an_interrupt_ends_the_machine_too() {
    let suite = Suite::new("interrupt", LIST);
    let pid_file = suite.0.join("pid");
    let script = format!(
        "echo $$ >{0}.new; mv {0}.new {0}; exec sleep 600",
        pid_file.display()
    );
    let machine = suite.machine("ours", &script);
    let mut command = suite.command(&machine, &machine, &["--tests", "good"]);
    let mut runner = Killed(
        command
            .stderr(Stdio::null())
            .spawn()
            .expect("the runner starts"),
    );
    let mut machine_pid = None;
    until("the machine to run", || {
        machine_pid = fs::read_to_string(&pid_file).ok();
        machine_pid.is_some()
    });
    let stat = format!("/proc/{}/stat", machine_pid.unwrap_or_default().trim());
    // Nobody may have asked for its exit code yet.
    let runs = || fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    assert!(runs());
    let pid = runner.0.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status();
    assert!(sent.expect("kill").success());
    let status = runner.0.wait().expect("an end");
    assert_eq!(status.code(), Some(130));
    until("the machine to end", || !runs());
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
