//! Runs of the disk table: one subject on one disk, timed, or counted.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::backing::{self, Disk};
use crate::cells::Cell;
use crate::client;
use crate::counts::Counter;
use crate::daemon::Daemon;
use crate::fio;
use crate::proc;
use crate::progress::Progress;
use crate::rounds::{self, CellResult, Latency, PerRequest, Plan, Row, Run};
use crate::subject::{self, Direct, Kind, Subject};
use crate::sys;
use crate::target::aio::AioTarget;
use crate::target::sync::SyncTarget;
use crate::target::uring::UringTarget;
use crate::target::virtio::VirtioTarget;
use crate::target::{self, Load, Outcome, Target, Window};

/// Whose goals the cells have.
pub const OURS: &str = "berth-blk";
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
    /// The subject that the others are shares of.
    pub limit: String,
    /// Whether a run more counts system calls.
    pub count: bool,
    /// For sockets and logs.
    pub directory: PathBuf,
}

/// CPU time of a run.
#[derive(Clone, Copy, Debug)]
struct Used {
    served: Duration,
    lost: f64,
}

/// Measures one cell.
pub fn cell(
    setup: &Setup,
    cell: &Cell,
    disk: &Disk,
    subjects: &[Subject],
    progress: &mut Progress,
) -> Result<CellResult> {
    let fitting = subjects.iter().filter(|subject| subject.fits(cell.backing));
    let taking_part: Vec<&Subject> = fitting.collect();
    let plan = Plan {
        row: Row {
            name: cell.name(),
            title: cell.title(),
            goal: cell.goal,
            cpu_goal_us: cell.cpu_goal_us,
            ours: OURS,
            ours_by_io_uring: subject::IO_URING_ONLY,
        },
        limit: setup.limit.clone(),
        subjects: taking_part.iter().map(|s| s.name.clone()).collect(),
        rounds: setup.rounds,
    };
    let settle = || match cell.writes() {
        true => backing::settle(disk),
        false => Ok(()),
    };
    let run = |subject: usize| {
        backing::warm(disk)?;
        let run = run(setup, cell, disk, taking_part[subject])?;
        settle()?;
        Ok(run)
    };
    let count = |subject: usize| {
        if !counted(setup, taking_part[subject]) {
            return Ok(None);
        }
        backing::warm(disk)?;
        let counts = count(setup, cell, disk, taking_part[subject])?;
        settle()?;
        Ok(Some(counts))
    };
    Ok(rounds::interleave(plan, progress, run, count))
}

/// Steps of [`cell`].
pub fn steps(setup: &Setup, cell: &Cell, subjects: &[Subject]) -> usize {
    let fitting = subjects.iter().filter(|subject| subject.fits(cell.backing));
    fitting
        .map(|subject| setup.rounds as usize + usize::from(counted(setup, subject)))
        .sum()
}

/// Whether a run more counts for it.
fn counted(setup: &Setup, subject: &Subject) -> bool {
    setup.count && subject.kind != Kind::Fio
}

fn run(setup: &Setup, cell: &Cell, disk: &Disk, subject: &Subject) -> Result<Run> {
    if let Kind::Fio = subject.kind {
        return fio::run(setup, &cell.load, disk, subject);
    }
    let (outcome, used, ()) = timed_run(setup, cell, disk, subject, |_| Ok(()))?;
    let count = outcome.latency.count();
    if count == 0 {
        bail!("not one request completed in a run");
    }
    Ok(Run {
        rate: count as f64 / outcome.elapsed.as_secs_f64(),
        latency: Some(Latency {
            p50_us: outcome.latency.quantile_us(0.5),
            p99_us: outcome.latency.quantile_us(0.99),
            p999_us: outcome.latency.quantile_us(0.999),
        }),
        cpu_us: Some(used.served.as_secs_f64() * 1e6 / count as f64),
        lost: Some(used.lost),
    })
}

/// A run more, in which the kernel counts.
fn count(setup: &Setup, cell: &Cell, disk: &Disk, subject: &Subject) -> Result<PerRequest> {
    let (outcome, _, counter) = timed_run(setup, cell, disk, subject, Counter::start)?;
    let counts = counter.finish()?;
    let requests = outcome.all_requests as f64;
    Ok(PerRequest {
        system_calls: counts.system_calls as f64 / requests,
        hand_offs: counts.hand_offs as f64 / requests,
    })
}

/// Runs a subject once. `watch` is called with the process that serves, before the first request.
fn timed_run<W>(
    setup: &Setup,
    cell: &Cell,
    disk: &Disk,
    subject: &Subject,
    watch: impl FnOnce(u32) -> Result<W>,
) -> Result<(Outcome, Used, W)> {
    let mut load = cell.load;
    load.depth = subject::effective_depth(&subject.kind, &load);
    let patience = setup.window.warmup + setup.window.measured + PATIENCE;
    if let Kind::Limit(direct) = &subject.kind {
        let watch = watch(std::process::id())?;
        let work = || limit(setup, *direct, disk, &load);
        let (outcome, used) = client::on_cpu(setup.daemon_cpu, patience, work)?;
        return Ok((outcome, used, watch));
    }
    let (daemon, socket) = start(setup, subject, disk, 1)?;
    let watch = watch(daemon.pid())?;
    let work = || through_virtio(setup, daemon.pid(), &socket, &load);
    let (outcome, used) = client::on_cpu(setup.client_cpu, patience, work)
        .with_context(|| format!("daemon: {}", daemon.last_words()))?;
    Ok((outcome, used, watch))
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

fn through_virtio(setup: &Setup, pid: u32, socket: &Path, load: &Load) -> Result<(Outcome, Used)> {
    let memory = target::buffers(load)?;
    let mut target = VirtioTarget::connect(socket, load, memory)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    let span = target.capacity();
    timed(setup, &mut target, load, span, || {
        let daemon = sys::process_cpu(pid)?;
        let all = sys::process_cpu(std::process::id())? + daemon;
        Ok((daemon, all))
    })
}

fn limit(setup: &Setup, direct: Direct, disk: &Disk, load: &Load) -> Result<(Outcome, Used)> {
    let file = disk.open(load.direction == target::Direction::Write)?;
    let memory = target::buffers(load)?;
    let clock = || {
        let all = sys::process_cpu(std::process::id())?;
        Ok((proc::thread_and_workers_cpu()?, all))
    };
    match direct {
        Direct::Uring => {
            let mut target = UringTarget::new(&file, load, memory)?;
            timed(setup, &mut target, load, disk.size, clock)
        }
        Direct::Aio => {
            let mut target = AioTarget::new(file, load, memory)?;
            timed(setup, &mut target, load, disk.size, clock)
        }
        Direct::Sync => {
            let mut target = SyncTarget::new(file, load, memory);
            timed(setup, &mut target, load, disk.size, clock)
        }
    }
}

/// Drives `target`. `clock` tells the CPU time so far of the one who serves, and of all who belong to
/// the run: spinners, client, daemon. Time in which a core had nothing to do is not lost either.
fn timed<T: Target>(
    setup: &Setup,
    target: &mut T,
    load: &Load,
    span: u64,
    clock: impl Fn() -> std::io::Result<(Duration, Duration)>,
) -> Result<(Outcome, Used)> {
    let mut readings = Vec::new();
    let cpus = [setup.client_cpu, setup.daemon_cpu];
    let outcome = target::drive(target, load, span, setup.window, || {
        let (served, all) = clock()?;
        let all = all + proc::idle_of(&cpus)?;
        readings.push((Instant::now(), (served, all)));
        Ok(())
    })?;
    let [(began, from), (ended, to)] = readings[..] else {
        bail!("the window did not end");
    };
    let cores = if setup.client_cpu == setup.daemon_cpu {
        1.0
    } else {
        2.0
    };
    let there = (ended - began).as_secs_f64() * cores;
    let ours = to.1.saturating_sub(from.1).as_secs_f64();
    let used = Used {
        served: to.0.saturating_sub(from.0),
        lost: (1.0 - ours / there).max(0.0),
    };
    Ok((outcome, used))
}
