//! A daemon under measurement: started on its CPU, ready when it listens, gone when dropped.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use berth_tests_framework::process::Process;

use crate::{interrupt, sys};

/// How long it may take to come up or to go.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks for an event that nothing announces.
const GLANCE: Duration = Duration::from_millis(5);

/// The same where nothing else waits for us, and where the machine may be busy.
const SHORT_GLANCE: Duration = Duration::from_micros(200);
const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` on `cpu` (what it says goes to `log`) and waits until it listens on `socket`.
    pub fn start(mut command: Command, cpu: usize, socket: &Path, log: &Path) -> Result<Daemon> {
        let _ = fs::remove_file(socket);
        let out = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        command
            // Kept open: some end when it ends.
            .stdin(Stdio::piped())
            .stdout(out.try_clone()?)
            .stderr(out);
        sys::tie_child(&mut command, &[cpu]);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let mut daemon = Daemon {
            child,
            log: log.to_owned(),
        };
        let deadline = Instant::now() + PATIENCE;
        while !listens(socket)? {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("{program} ended with {status}: {}", daemon.last_words());
            }
            if Instant::now() >= deadline {
                bail!("{program} does not listen: {}", daemon.last_words());
            }
            thread::sleep(GLANCE);
        }
        Ok(daemon)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The last line that it wrote.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("it said nothing").to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        sys::signal(self.child.id(), libc::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            thread::sleep(GLANCE);
        }
    }
}

/// Waits until a daemon listens, and looks often, as the time counts; an error where it ends instead.
pub fn wait_listens(process: &Process, socket: &Path) -> Result<()> {
    let deadline = Instant::now() + LONG_PATIENCE;
    while !listens(socket)? {
        interrupt::check()?;
        if !process.is_running() {
            let said = process.output()?;
            let last = said.lines().last().unwrap_or("it said nothing");
            bail!("{} ended: {last}", process.name());
        }
        ensure!(
            Instant::now() < deadline,
            "{} does not listen",
            process.name()
        );
        thread::sleep(SHORT_GLANCE);
    }
    Ok(())
}

/// Whether a unix socket at `path` accepts connections; asking by a connection would be a session.
pub fn listens(path: &Path) -> Result<bool> {
    const ACCEPTS: &str = "00010000";
    let path = path.to_str().context("a socket path that is not UTF-8")?;
    let table = fs::read_to_string("/proc/thread-self/net/unix")?;
    Ok(table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(ACCEPTS) && fields.last() == Some(path)
    }))
}
