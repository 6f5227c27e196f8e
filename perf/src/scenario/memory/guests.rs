//! The holders of guests' memory, as the scenario sees them: processes that obey a command a line.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::holder::{self, Figures};
use crate::interrupt;

/// How long a holder may take for anything but loading.
const PATIENCE: Duration = Duration::from_secs(120);

/// What all holders share.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The set of dumps.
    pub(super) dumps: PathBuf,
    /// Whose pages are whose own.
    pub(super) own: PathBuf,
    /// Folder of the API sockets.
    pub(super) sockets: PathBuf,
}

/// One of them. Its end is that of its standard input, or the drop of this.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) name: String,
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    /// Commands that were not answered yet, and when each was given.
    open: VecDeque<(String, Instant)>,
    api_thread: Option<PathBuf>,
}

impl Holder {
    /// Starts one; in a control group if there is one for it.
    pub(super) fn start(place: &Place, name: &str, groups: &[PathBuf]) -> Result<Self> {
        let socket = place.sockets.join(format!("{name}.sock"));
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(holder::SUBCOMMAND)
            .arg("--socket")
            .arg(&socket)
            .arg("--dumps")
            .arg(&place.dumps)
            .args(["--guest", name])
            .arg("--own")
            .arg(&place.own)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start the holder of {name}"))?;
        for group in groups {
            let path = group.join("cgroup.procs");
            fs::write(&path, child.id().to_string()).with_context(|| path.display().to_string())?;
        }
        let stdin = child.stdin.take().context("no stdin")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (sender, answers) = channel();
        std::thread::Builder::new()
            .name(format!("answers of {name}"))
            .spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            name: name.to_owned(),
            child,
            stdin,
            answers,
            open: VecDeque::new(),
            api_thread: None,
        })
    }

    /// Gives a command; [`Holder::poll`] and [`Holder::finish`] see its end.
    pub(super) fn tell(&mut self, command: &str) -> Result<()> {
        let told = writeln!(self.stdin, "{command}").and_then(|()| self.stdin.flush());
        if told.is_err() {
            return Err(self.gone());
        }
        self.open.push_back((command.to_owned(), Instant::now()));
        Ok(())
    }

    /// Whether nothing is under way, without waiting.
    pub(super) fn poll(&mut self) -> Result<bool> {
        while !self.open.is_empty() {
            match self.answers.try_recv() {
                Ok(_) => self.open.pop_front(),
                Err(std::sync::mpsc::TryRecvError::Empty) => return Ok(false),
                Err(_) => return Err(self.gone()),
            };
        }
        Ok(true)
    }

    /// The answer to the last command, when all are done.
    pub(super) fn finish(&mut self) -> Result<String> {
        let mut last = String::new();
        let end = Instant::now() + PATIENCE;
        while let Some((command, _)) = self.open.front() {
            interrupt::check()?;
            if Instant::now() > end {
                bail!("the holder of {} does not end '{command}'", self.name);
            }
            match self.answers.recv_timeout(Duration::from_millis(50)) {
                Ok(answer) => {
                    last = answer;
                    self.open.pop_front();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone()),
            }
        }
        Ok(last)
    }

    /// Its figures since the last time.
    pub(super) fn figures(&mut self) -> Result<Figures> {
        self.tell("figures")?;
        let answer = self.finish()?;
        serde_json::from_str(&answer).with_context(|| format!("figures of {}", self.name))
    }

    fn gone(&mut self) -> anyhow::Error {
        match self.child.wait() {
            Ok(status) => anyhow::anyhow!("the holder of {} ended: {status}", self.name),
            Err(error) => error.into(),
        }
    }

    /// CPU time of its API's thread, which works for the tuner alone.
    pub(super) fn api_cpu(&mut self) -> Duration {
        let pid = self.child.id();
        if self.api_thread.is_none() {
            self.api_thread = thread(pid, "api");
        }
        let time = self.api_thread.as_ref().and_then(|path| on_cpu(path));
        time.unwrap_or_default()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `schedstat` of a process's thread of that name.
fn thread(pid: u32, name: &str) -> Option<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let comm = fs::read_to_string(task.path().join("comm")).ok()?;
        (comm.trim() == name).then(|| task.path().join("schedstat"))
    })
}

/// First field of a schedstat.
pub(super) fn on_cpu(schedstat: &Path) -> Option<Duration> {
    let text = fs::read_to_string(schedstat).ok()?;
    let ns = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(ns))
}
