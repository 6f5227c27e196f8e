//! One test on one machine: its command line, and what its end means.
//!
//! The suite's programs end their machine with a value V at port 0xf4, of which QEMU makes the exit code
//! `V << 1 | 1`, and so does berth-vmm: 1 is success, 77 "skipped", everything else failure. As QEMU's own
//! mistakes are 1 too, a success needs a line from the program.

use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use berth_tests_framework::process::Process;
use berth_tests_framework::wait::is_broken;

use super::suite::Test;

/// The suite's exit code for a program that could check nothing.
const SKIPPED: i32 = 77;
const PASSED: i32 = 1;
/// The suite's exit code for a program that gave up.
const ABORTED: i32 = 127;

/// Who runs the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// berth-vmm with KVM's irqchip.
    Kernel,
    /// berth-vmm with its own IOAPIC.
    Split,
    /// QEMU's `pc`, with KVM's irqchip.
    Qemu,
}

impl Machine {
    /// All, in the table's order.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Split, Self::Qemu];

    /// Name in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Split => "split",
            Self::Qemu => "qemu",
        }
    }
}

/// What became of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All it checked was well.
    Pass,
    /// It checked nothing, or was not run.
    Skip,
    /// It found a fault, died or did not end.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "pass",
            Self::Skip => "skip",
            Self::Fail => "fail",
        })
    }
}

/// A program's run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What became of it.
    pub verdict: Verdict,
    /// How many of its checks passed.
    pub passed: usize,
    /// The checks that failed, as it names them.
    pub failed: Vec<String>,
    /// How many checks it left out.
    pub skipped: usize,
    /// What is to be said about it.
    pub note: String,
    /// How long it took.
    pub took: Duration,
}

impl Outcome {
    fn left_out(note: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Skip,
            passed: 0,
            failed: Vec::new(),
            skipped: 0,
            note: note.into(),
            took: Duration::ZERO,
        }
    }
}

/// Where things are.
#[derive(Debug, Clone)]
pub struct Places {
    /// The built suite.
    pub suite: PathBuf,
    /// berth-vmm.
    pub vmm: PathBuf,
    /// QEMU, by name or path.
    pub qemu: String,
    /// Logs and environments.
    pub out: PathBuf,
}

impl Places {
    /// A file about a test.
    fn file(&self, test: &Test, ending: &str) -> PathBuf {
        let name = test.name.replace('/', "_");
        self.out.join(format!("{name}.{ending}"))
    }
}

/// Runs a test on a machine.
///
/// # Errors
/// The machine's program cannot be started, or a file not be written.
pub fn run(places: &Places, test: &Test, machine: Machine) -> Result<Outcome> {
    if let Some(reason) = &test.skip {
        return Ok(Outcome::left_out(reason));
    }
    let kernel = places.suite.join("x86").join(&test.file);
    if !kernel.exists() {
        return Ok(Outcome::left_out(format!("{} is not built", test.file)));
    }
    let environment = places.file(test, "environment");
    std::fs::write(&environment, environment_of(test))
        .with_context(|| environment.display().to_string())?;
    let mut features = test.features();
    let mut dropped = Vec::new();
    loop {
        let command = match machine {
            Machine::Qemu => qemu(places, test, &kernel, &environment),
            Machine::Kernel | Machine::Split => {
                vmm(places, test, machine, &features, &kernel, &environment)
            }
        };
        let mut outcome = once(places, test, machine, command)?;
        // QEMU warns and goes on without; so does this.
        let lacking = outcome
            .note
            .split_once("CPU feature '")
            .map(|(_, rest)| rest);
        let lacking = lacking.and_then(|rest| rest.split('\'').next());
        let at = lacking.and_then(|name| {
            let asked = |word: &&str| word.strip_prefix('+') == Some(name);
            features.iter().position(asked)
        });
        let Some(at) = at else {
            if !dropped.is_empty() {
                let without = format!("without {}", dropped.join(" "));
                let parts = [outcome.note, without];
                let said: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
                outcome.note = said.join("; ");
            }
            return Ok(outcome);
        };
        dropped.push(features.remove(at));
    }
}

/// What the suite's programs read from their module: the answers that firmware would have.
fn environment_of(test: &Test) -> String {
    format!(
        "NR_CPUS={}\nMEMSIZE={}\nTEST_DEVICE=1\n",
        test.smp, test.memory_mib
    )
}

fn vmm(
    places: &Places,
    test: &Test,
    machine: Machine,
    features: &[&str],
    kernel: &Path,
    environment: &Path,
) -> Command {
    let mut command = Command::new(&places.vmm);
    let list = match features {
        [] => String::new(),
        features => format!(",features={}", features.join(",")),
    };
    command
        .arg("--kernel")
        .arg(kernel)
        .arg("--initramfs")
        .arg(environment)
        .args(["--cmdline", &test.args_at(SystemTime::now())])
        .args(["--cpus", &format!("boot={}{list}", test.smp)])
        .args(["--memory", &format!("size={}M", test.memory_mib)])
        .arg("--platform")
        .arg(format!("test-device=on,irqchip={}", machine.name()));
    command
}

/// As the suite's own `x86/run` does.
fn qemu(places: &Places, test: &Test, kernel: &Path, environment: &Path) -> Command {
    let mut command = Command::new(&places.qemu);
    command
        .args(["-no-reboot", "-nodefaults", "-display", "none"])
        .args(["-global", "kvm-pit.lost_tick_policy=discard"])
        .args(["-device", "pc-testdev"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
        .args(["-serial", "stdio", "-machine", "accel=kvm"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(environment)
        .args(["-smp", &test.smp.to_string()]);
    if !test.args.is_empty() {
        command.args(["-append", &test.args_at(SystemTime::now())]);
    }
    command.args(&test.params);
    command
}

fn once(places: &Places, test: &Test, machine: Machine, command: Command) -> Result<Outcome> {
    let log = places.file(test, &format!("{}.log", machine.name()));
    // The log is added to.
    let _ = std::fs::remove_file(&log);
    std::fs::write(&log, format!("{command:?}\n")).with_context(|| log.display().to_string())?;
    let start = Instant::now();
    let mut process = Process::spawn(machine.name(), command, &log)?;
    let end = match process.wait(Duration::from_secs(test.timeout_s)) {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => End::Code(code),
            (None, signal) => End::Signal(signal.unwrap_or_default()),
        },
        Err(error) if is_broken(&error) => End::Never,
        Err(error) => return Err(error),
    };
    process.kill();
    let took = start.elapsed();
    let mut outcome = judge(end, &process.output()?);
    outcome.took = took;
    Ok(outcome)
}

/// How a machine's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Code(i32),
    Signal(i32),
    /// Not in time.
    Never,
}

/// What an end and what was printed mean.
fn judge(end: End, output: &str) -> Outcome {
    let named = |mark: &str| -> Vec<String> {
        let lines = output.lines().map(str::trim);
        let found = lines.filter_map(|line| line.strip_prefix(mark));
        found.map(|name| name.trim().to_owned()).collect()
    };
    let failed = named("FAIL: ");
    let complaint = || {
        let marks = ["berth-vmm: ", "qemu-system-x86_64: "];
        let is_ours = |line: &&str| marks.iter().any(|mark| line.contains(mark));
        let line = output.lines().skip(1).find(is_ours);
        line.map(|line| line.chars().take(200).collect::<String>())
    };
    // The first line is the command itself; berth-vmm logs with a level, QEMU with its name.
    let said = output.lines().skip(1).map(str::trim).filter(|line| {
        let foreign = [" INFO ", " WARN ", "qemu-system-x86_64: ", "berth-vmm: "];
        !line.is_empty()
            && !foreign
                .iter()
                .any(|mark| line.starts_with(mark.trim_start()))
    });
    let last = said.last();
    let fail = |note: String| (Verdict::Fail, note);
    let (verdict, note) = match end {
        End::Never => fail(match last {
            Some(last) => format!("did not end; its last line: {last}"),
            None => "did not end, and printed nothing".to_owned(),
        }),
        End::Signal(signal) => fail(format!("ended by signal {signal}")),
        End::Code(PASSED)
            if last.is_some() && complaint().is_none_or(|line| line.contains("warning")) =>
        {
            (Verdict::Pass, String::new())
        }
        End::Code(SKIPPED) => (
            Verdict::Skip,
            "nothing to check on this processor".to_owned(),
        ),
        // QEMU's answer to a guest that resets itself or dies.
        End::Code(0) => fail("ended without the test device".to_owned()),
        End::Code(ABORTED) => fail(format!("aborted: {}", last.unwrap_or_default())),
        End::Code(code) => {
            let complaint = complaint().filter(|line| !line.contains("warning"));
            let unsaid = failed.is_empty().then(|| format!("exit code {code}"));
            fail(complaint.or(unsaid).unwrap_or_default())
        }
    };
    Outcome {
        verdict,
        passed: named("PASS: ").len(),
        failed,
        skipped: named("SKIP: ").len(),
        note,
        took: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_mean_what_the_suite_says() {
        let output = "command\nPASS: one\r\nSKIP: two\r\nPASS: three\r\n INFO ended\n";
        let outcome = judge(End::Code(1), output);
        assert_eq!(outcome.verdict, Verdict::Pass);
        assert_eq!((outcome.passed, outcome.skipped), (2, 1));
        assert_eq!(judge(End::Code(77), output).verdict, Verdict::Skip);
        let outcome = judge(End::Code(3), "command\nPASS: one\nFAIL: two\n");
        assert_eq!(
            (outcome.verdict, outcome.failed),
            (Verdict::Fail, vec!["two".to_owned()])
        );
        assert_eq!(outcome.note, "");
    }

    #[test]
    fn a_program_that_did_not_come_to_its_end_says_how() {
        let note = |end, output: &str| {
            let outcome = judge(end, output);
            assert_eq!(outcome.verdict, Verdict::Fail, "{end:?}");
            outcome.note
        };
        let output = "command\nPASS: one\nstarting broadcast\n INFO waits\n";
        assert_eq!(
            note(End::Never, output),
            "did not end; its last line: starting broadcast"
        );
        assert_eq!(
            note(End::Never, "command\n"),
            "did not end, and printed nothing"
        );
        assert_eq!(note(End::Signal(11), output), "ended by signal 11");
        assert_eq!(note(End::Code(127), output), "aborted: starting broadcast");
        assert_eq!(note(End::Code(9), output), "exit code 9");
        // A guest that dies after a failure: both are said.
        let output = "command\nFAIL: one\nberth-vmm: the guest died: triple fault\nrax=0\n";
        assert_eq!(
            note(End::Code(1), output),
            "berth-vmm: the guest died: triple fault"
        );
        assert_eq!(
            note(End::Code(0), "command\nFAIL: one\n"),
            "ended without the test device"
        );
    }

    #[test]
    fn a_machine_that_could_not_start_has_not_passed() {
        for output in [
            "command\nberth-vmm: --cpus: KVM on this host does not support the CPU feature 'pcid'\n",
            "command\nqemu-system-x86_64: -m 1: too small\n",
            "command\n INFO the guest runs\n",
            "command\n",
        ] {
            assert_eq!(
                judge(End::Code(1), output).verdict,
                Verdict::Fail,
                "{output}"
            );
        }
        let warned = "command\nqemu-system-x86_64: warning: no pcid\nenabling apic\n";
        assert_eq!(judge(End::Code(1), warned).verdict, Verdict::Pass);
    }
}
