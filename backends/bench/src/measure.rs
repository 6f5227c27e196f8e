//! Runs the cells: every subject in turn, and that several times over, so that a drift of the
//! machine meets all alike.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::backing::{self, Disk};
use crate::cells::Cell;
use crate::daemon::Daemon;
use crate::proc;
use crate::progress::Progress;
use crate::subject::{self, Direct, Kind, Subject};
use crate::sys::{self, Interruptible};
use crate::target::aio::AioTarget;
use crate::target::sync::SyncTarget;
use crate::target::uring::UringTarget;
use crate::target::virtio::VirtioTarget;
use crate::target::{self, Load, Outcome, Target, Window};

/// How much longer than its window a run may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Where and how long.
#[derive(Clone, Debug)]
pub struct Setup {
    /// CPU of the client.
    pub client_cpu: usize,
    /// CPU of daemon and limit.
    pub daemon_cpu: usize,
    /// Per run.
    pub window: Window,
    /// Runs of each subject.
    pub rounds: u32,
    /// For sockets and logs.
    pub directory: PathBuf,
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Requests a second.
    pub iops: f64,
    /// Median latency.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// CPU time of daemon or limit per request, kernel workers included.
    pub cpu_us: f64,
}

/// All runs of a subject in a cell.
#[derive(Clone, Debug)]
pub struct Series {
    /// Whose.
    pub subject: String,
    /// One per round.
    pub runs: Vec<Run>,
    /// Why there are no more.
    pub failure: Option<String>,
}

/// A cell with all who took part.
#[derive(Clone, Debug)]
pub struct CellResult {
    /// Which.
    pub cell: Cell,
    /// In the order of running.
    pub series: Vec<Series>,
}

/// Measures one cell.
pub fn cell(
    setup: &Setup,
    cell: &Cell,
    disk: &Disk,
    subjects: &[Subject],
    progress: &mut Progress,
) -> Result<CellResult> {
    let taking_part: Vec<&Subject> = subjects
        .iter()
        .filter(|subject| subject.fits(cell.backing))
        .collect();
    let mut series: Vec<Series> = taking_part
        .iter()
        .map(|subject| Series {
            subject: subject.name.clone(),
            runs: Vec::new(),
            failure: None,
        })
        .collect();
    for _ in 0..setup.rounds {
        for (subject, series) in taking_part.iter().zip(&mut series) {
            if series.failure.is_some() {
                progress.skip();
                continue;
            }
            match run(setup, cell, disk, subject) {
                Ok(run) => {
                    progress.step(&format!(
                        "{} {}: {:.0}/s",
                        cell.name(),
                        subject.name,
                        run.iops
                    ));
                    series.runs.push(run);
                }
                Err(error) => {
                    progress.step(&format!("{} {}: {error:#}", cell.name(), subject.name));
                    series.failure = Some(format!("{error:#}"));
                }
            }
            if cell.writes() {
                backing::settle(disk)?;
            }
        }
    }
    Ok(CellResult {
        cell: *cell,
        series,
    })
}

fn run(setup: &Setup, cell: &Cell, disk: &Disk, subject: &Subject) -> Result<Run> {
    let mut load = cell.load;
    load.depth = subject::effective_depth(&subject.kind, &load);
    let patience = setup.window.warmup + setup.window.measured + PATIENCE;
    let measured = match &subject.kind {
        Kind::Limit(direct) => on_cpu(setup.daemon_cpu, patience, || {
            limit(setup, *direct, disk, &load)
        })?,
        _ => {
            let (daemon, socket) = start(setup, subject, disk, 1)?;
            let pid = daemon.pid();
            on_cpu(setup.client_cpu, patience, || {
                through_virtio(setup, pid, &socket, &load)
            })
            .with_context(|| format!("(daemon: {})", daemon.last_words()))?
        }
    };
    let (outcome, cpu) = measured;
    let count = outcome.latency.count();
    if count == 0 {
        return Err(anyhow!("not one request completed in a run"));
    }
    Ok(Run {
        iops: count as f64 / outcome.elapsed.as_secs_f64(),
        p50_us: outcome.latency.quantile_us(0.5),
        p99_us: outcome.latency.quantile_us(0.99),
        p999_us: outcome.latency.quantile_us(0.999),
        cpu_us: cpu.as_secs_f64() * 1e6 / count as f64,
    })
}

/// The subject's daemon on its CPU, and its socket.
pub fn start(
    setup: &Setup,
    subject: &Subject,
    disk: &Disk,
    queues: u16,
) -> Result<(Daemon, PathBuf)> {
    let socket = setup.directory.join("disk.sock");
    let log = setup.directory.join("daemon.log");
    let command = subject
        .command(disk, &socket, queues)
        .context("the limit has no daemon")?;
    let daemon = Daemon::start(command, setup.daemon_cpu, &socket, &log)?;
    Ok((daemon, socket))
}

/// Runs `work` on a thread of its own that stays on `cpu`. A request that is never answered ends it:
/// after `patience` every wait is cut short.
#[expect(unsafe_code, reason = "signals a thread")]
fn on_cpu<T: Send>(
    cpu: usize,
    patience: Duration,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let (tell, told) = channel();
    let (end, ended) = channel::<()>();
    let client = move || {
        tell.send(Interruptible::this_thread()?)?;
        sys::pin_thread(cpu).with_context(|| format!("cannot run on CPU {cpu}"))?;
        let result = work();
        drop(end);
        result
    };
    thread::scope(|scope| {
        let thread = scope.spawn(client);
        let mut wait = patience;
        if let Ok(waiting) = told.recv() {
            while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                // SAFETY: it is joined below.
                unsafe { waiting.interrupt() };
                wait = Duration::from_millis(100);
            }
        }
        thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the client panicked")))
    })
}

fn through_virtio(
    setup: &Setup,
    pid: u32,
    socket: &Path,
    load: &Load,
) -> Result<(Outcome, Duration)> {
    let memory = target::buffers(load)?;
    let mut target = VirtioTarget::connect(socket, load, memory)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    let span = target.capacity();
    timed(&mut target, load, span, setup.window, || {
        sys::process_cpu(pid)
    })
}

fn limit(setup: &Setup, direct: Direct, disk: &Disk, load: &Load) -> Result<(Outcome, Duration)> {
    let file = disk.open(load.direction == target::Direction::Write)?;
    let memory = target::buffers(load)?;
    let (size, window) = (disk.size, setup.window);
    match direct {
        Direct::Uring => timed(
            &mut UringTarget::new(&file, load, memory)?,
            load,
            size,
            window,
            proc::thread_and_workers_cpu,
        ),
        Direct::Aio => timed(
            &mut AioTarget::new(file, load, memory)?,
            load,
            size,
            window,
            proc::thread_and_workers_cpu,
        ),
        Direct::Sync => timed(
            &mut SyncTarget::new(file, load, memory),
            load,
            size,
            window,
            proc::thread_and_workers_cpu,
        ),
    }
}

/// Drives `target`, and takes the time on `clock` for the window.
fn timed<T: Target>(
    target: &mut T,
    load: &Load,
    span: u64,
    window: Window,
    clock: impl Fn() -> std::io::Result<Duration>,
) -> Result<(Outcome, Duration)> {
    let mut readings = Vec::new();
    let outcome = target::drive(target, load, span, window, || {
        readings.push(clock()?);
        Ok(())
    })?;
    let [from, to] = readings[..] else {
        return Err(anyhow!("the window did not end"));
    };
    Ok((outcome, to.saturating_sub(from)))
}
