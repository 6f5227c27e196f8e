//! What the kernel was asked for: system calls of a process, and io_uring requests that it handed to
//! kernel workers, counted by `perf stat` on tracepoints. Counting costs time, so it has runs of its own.
#![forbid(unsafe_code)]

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys;

const SYSTEM_CALLS: &str = "raw_syscalls:sys_enter";
const HAND_OFFS: &str = "io_uring:io_uring_queue_async_work";
/// How long perf may take to start and to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Counts of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counts {
    /// System calls, the daemon's side only.
    pub system_calls: u64,
    /// Requests that went to a kernel worker.
    pub hand_offs: u64,
}

/// A perf that counts.
pub struct Counter {
    perf: Child,
}

impl Counter {
    /// Counts for all threads that `pid` has and will have.
    pub fn start(pid: u32) -> Result<Counter> {
        let mut command = Command::new("perf");
        command
            .args([
                "stat",
                "--no-big-num",
                "-x,",
                "-e",
                SYSTEM_CALLS,
                "-e",
                HAND_OFFS,
                "-p",
            ])
            .arg(pid.to_string())
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        sys::tie_child(&mut command, &[]);
        let perf = command
            .spawn()
            .context("no perf on the PATH (Debian's package linux-perf)")?;
        let mut counter = Counter { perf };
        counter.wait_until_it_counts()?;
        Ok(counter)
    }

    /// It counts when it has its events and waits for the end of the process.
    fn wait_until_it_counts(&mut self) -> Result<()> {
        let events = format!("/proc/{}/fd", self.perf.id());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let open = std::fs::read_dir(&events).into_iter().flatten().flatten();
            let counting = open.filter(|fd| {
                std::fs::read_link(fd.path())
                    .is_ok_and(|target| target.to_string_lossy().contains("[perf_event]"))
            });
            if counting.count() >= 2 && sleeps(self.perf.id()) {
                return Ok(());
            }
            if self.perf.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("perf cannot count here: {}", self.rest()?);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn rest(&mut self) -> Result<String> {
        let mut text = String::new();
        let _ = self.perf.kill();
        if let Some(mut pipe) = self.perf.stderr.take() {
            pipe.read_to_string(&mut text)?;
        }
        Ok(text.trim().replace('\n', "; "))
    }

    /// What was counted so far.
    pub fn finish(mut self) -> Result<Counts> {
        sys::signal(self.perf.id(), libc::SIGINT);
        let mut text = String::new();
        if let Some(mut pipe) = self.perf.stderr.take() {
            pipe.read_to_string(&mut text)?;
        }
        Ok(Counts {
            system_calls: count(&text, SYSTEM_CALLS)?,
            hand_offs: count(&text, HAND_OFFS)?,
        })
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

fn sleeps(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default();
    state.trim_start().starts_with('S')
}

/// The first field of the line of `event`.
fn count(text: &str, event: &str) -> Result<u64> {
    let line = text
        .lines()
        .find(|line| line.split(',').nth(2) == Some(event))
        .with_context(|| format!("perf said nothing of {event}: {}", text.trim()))?;
    let field = line.split(',').next().unwrap_or_default();
    field
        .parse()
        .with_context(|| format!("perf counts '{field}' of {event}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfs_lines_are_read() {
        let text = "29,,raw_syscalls:sys_enter,2000,100.00,,\n\
                    <not counted>,,io_uring:io_uring_queue_async_work,0,0.00,,\n";
        assert_eq!(count(text, SYSTEM_CALLS).unwrap(), 29);
        let error = count(text, HAND_OFFS).unwrap_err().to_string();
        assert!(error.contains("<not counted>"), "{error}");
        assert!(count("", HAND_OFFS).is_err());
    }
}
