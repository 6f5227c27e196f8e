//! A child process with its log: killed on drop, and by the kernel when the story's thread dies.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys;
use crate::wait::{Broken, patient, seconds};

/// Signals that cases send, by their usual names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// An orderly end.
    Term,
    /// An end at once.
    Kill,
    /// Stands still until [`Signal::Cont`].
    Stop,
    /// Goes on.
    Cont,
    /// Looks again at what it was given.
    Hangup,
}

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    log: PathBuf,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; what it prints on stdout and stderr goes to `log`, which is added to.
    ///
    /// Call it on a thread that lives as long as the process shall.
    ///
    /// # Errors
    /// The program cannot be started, or the log cannot be written.
    pub fn spawn(name: &str, command: Command, log: &Path) -> Result<Self> {
        Self::spawn_with_stdin(name, command, Stdio::null(), log)
    }

    /// The same, with this standard input.
    ///
    /// # Errors
    /// As [`Process::spawn`].
    pub fn spawn_with_stdin(
        name: &str,
        command: Command,
        stdin: Stdio,
        log: &Path,
    ) -> Result<Self> {
        let out = Stdio::from(open_log(log)?);
        Self::spawn_with_stdio(name, command, (stdin, out), log)
    }

    /// The same with these standard input and output; what it prints on stderr goes to `log`.
    ///
    /// # Errors
    /// As [`Process::spawn`].
    pub fn spawn_with_stdio(
        name: &str,
        mut command: Command,
        (stdin, stdout): (Stdio, Stdio),
        log: &Path,
    ) -> Result<Self> {
        let err = open_log(log)?;
        command.stdin(stdin).stdout(stdout).stderr(err);
        sys::die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let pidfd = sys::pidfd_open(child.id()).context("pidfd_open")?;
        let (name, log) = (name.to_owned(), log.to_owned());
        Ok(Self {
            name,
            child,
            pidfd,
            log,
            status: None,
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Name given at the start.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has printed so far.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn output(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| self.log.display().to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Sends a signal, to this process only. [`Signal::Stop`] has been obeyed by all threads on return: until
    /// then those on other CPUs go on.
    ///
    /// # Errors
    /// The process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let number = match signal {
            Signal::Term => libc::SIGTERM,
            Signal::Kill => libc::SIGKILL,
            Signal::Stop => libc::SIGSTOP,
            Signal::Cont => libc::SIGCONT,
            Signal::Hangup => libc::SIGHUP,
        };
        sys::pidfd_send_signal(&self.pidfd, number)
            .with_context(|| format!("cannot signal {}", self.name))?;
        if signal != Signal::Stop {
            return Ok(());
        }
        crate::wait::until(
            &format!("{} to stand still", self.name),
            seconds(20),
            || Ok(sys::is_stopped(&self.pidfd)?.then_some(())),
        )
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status.is_none()
            && !matches!(
                sys::poll_readable(&[self.pidfd.as_raw_fd()], Duration::ZERO),
                Ok(Some(_))
            )
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// It did not within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        if sys::poll_readable(&[self.pidfd.as_raw_fd()], patient(limit))?.is_none() {
            return Err(Broken::deadline(&format!("end of {}", self.name), limit));
        }
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// Waits for an end with exit code 0.
    ///
    /// # Errors
    /// It ended otherwise, or not in time.
    pub fn wait_success(&mut self, limit: Duration) -> Result<()> {
        let status = self.wait(limit)?;
        if !status.success() {
            bail!("{} ended with {}", self.name, describe(status));
        }
        Ok(())
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            // Fails only when it has ended already.
            let _ = self.signal(Signal::Kill);
            self.status = self.child.wait().ok();
        }
    }

    /// Waits until the file or socket `path` exists; fails at once when the process ends first.
    ///
    /// # Errors
    /// The process ended or `limit` passed.
    pub fn wait_path(&self, path: &Path, limit: Duration) -> Result<()> {
        let directory = path.parent().context("a path without a directory")?;
        let watch = sys::watch_directory(directory)?;
        let end = Instant::now() + patient(limit);
        while !path.exists() {
            let left = end.saturating_duration_since(Instant::now());
            match sys::poll_readable(&[self.pidfd.as_raw_fd(), watch.as_raw_fd()], left)? {
                Some(0) => return Err(self.gone()),
                Some(_) => sys::drain(&watch),
                None => return Err(Broken::deadline(&path.display().to_string(), limit)),
            }
        }
        Ok(())
    }

    /// Connects to the socket at `path` once it is there.
    ///
    /// # Errors
    /// As [`Process::wait_path`], or nobody accepts.
    pub fn connect(&self, path: &Path, limit: Duration) -> Result<UnixStream> {
        self.wait_path(path, limit)?;
        // Between bind and listen a connection is refused.
        crate::wait::until(&format!("connection to {}", path.display()), limit, || {
            match UnixStream::connect(path) {
                Ok(stream) => Ok(Some(stream)),
                Err(_) if self.is_running() => Ok(None),
                Err(_) => Err(self.gone()),
            }
        })
    }

    /// Waits until the log holds `text`.
    ///
    /// # Errors
    /// The process ended or `limit` passed.
    pub fn wait_output(&self, text: &str, limit: Duration) -> Result<()> {
        crate::wait::until(&format!("'{text}' from {}", self.name), limit, || {
            let alive = self.is_running();
            if self.output()?.contains(text) {
                return Ok(Some(()));
            }
            if alive { Ok(None) } else { Err(self.gone()) }
        })
    }

    /// Private memory in bytes: what would be free if this process alone went away.
    ///
    /// # Errors
    /// The process has ended.
    pub fn private_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        Ok(private_kib(&text) * 1024)
    }

    /// The ids and names of its threads.
    ///
    /// # Errors
    /// The process has ended.
    pub fn threads(&self) -> Result<Vec<(i32, String)>> {
        let mut threads = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let entry = entry?;
            let Some(tid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            threads.push((tid, name.trim_end().to_owned()));
        }
        threads.sort();
        Ok(threads)
    }

    fn gone(&self) -> anyhow::Error {
        let last = self.output().unwrap_or_default();
        let last = last.lines().last().unwrap_or("it said nothing").to_owned();
        Broken::Gone(format!("{} ended: {last}", self.name)).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn open_log(log: &Path) -> Result<File> {
    let mut options = File::options();
    let file = options.create(true).append(true).open(log);
    file.with_context(|| format!("cannot write {}", log.display()))
}

/// Exit code or signal in words.
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".to_owned(),
    }
}

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// It cannot be started or fails; the message holds what it printed on standard error.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let words: Vec<_> = args
            .iter()
            .map(|arg| arg.as_ref().to_string_lossy())
            .collect();
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {}: {}: {}",
            words.join(" "),
            describe(output.status),
            complaint.trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Sum of the `Private_*` lines of a smaps_rollup, in KiB.
fn private_kib(smaps_rollup: &str) -> u64 {
    smaps_rollup
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempPath;

    #[test]
    fn private_memory_is_the_sum_of_private_lines() {
        let text = "Rss: 10 kB\nPrivate_Clean: 3 kB\nPrivate_Dirty: 4 kB\nPrivate_Hugetlb: 0 kB\n";
        assert_eq!(private_kib(text), 7);
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let log = TempPath::new("drop.log");
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = Process::spawn("sleep", command, &log).expect("sleep starts");
        let pid = process.pid();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_stopped_process_stands_still_and_goes_on() {
        let log = TempPath::new("stop.log");
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        let process = Process::spawn("sh", command, &log).expect("sh starts");
        let state = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid()));
            stat.expect("it lives").contains(") T ")
        };
        assert!(!state());
        for _ in 0..3 {
            process.signal(Signal::Stop).expect("stopped");
            assert!(state());
            process.signal(Signal::Cont).expect("going on");
            assert!(!state());
        }
        drop(process);
    }

    #[test]
    fn waiting_for_a_path_ends_when_the_process_does() {
        let log = TempPath::new("path.log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo no luck >&2; exit 1"]);
        let process = Process::spawn("sh", command, &log).expect("sh starts");
        let error = process
            .wait_path(&TempPath::new("never-made"), seconds(20))
            .expect_err("nobody makes it");
        assert!(error.to_string().contains("no luck"), "{error}");
    }
}
