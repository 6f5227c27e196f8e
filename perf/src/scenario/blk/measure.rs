//! Runs of the disk table: one subject on one disk, timed, or counted.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::super::setup::Setup;
use super::backing::{self, Disk};
use super::cells::Cell;
use super::fio;
use super::subject::{self, Direct, Kind, Subject};
use super::target::aio::AioTarget;
use super::target::sync::SyncTarget;
use super::target::uring::UringTarget;
use super::target::virtio::VirtioTarget;
use super::target::{self, Load, Outcome, Target};
use crate::client;
use crate::counts::Counter;
use crate::daemon::Daemon;
use crate::proc;
use crate::scenario::Sample;
use crate::sys;

/// How much longer than its window a run may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// CPU time of a run.
#[derive(Clone, Copy, Debug)]
struct Used {
    served: Duration,
    lost: f64,
}

impl Setup {
    /// Whether a run more counts for it.
    pub fn counts(&self, subject: &Subject) -> bool {
        self.count && subject.kind != Kind::Fio
    }
}

/// A run with the page cache as it should be before, and nothing left to write after.
pub fn prepared(cell: &Cell, disk: &Disk, run: impl FnOnce() -> Result<Sample>) -> Result<Sample> {
    backing::warm(disk)?;
    let sample = run()?;
    if cell.writes() {
        backing::settle(disk)?;
    }
    Ok(sample)
}

/// One run.
pub fn run(setup: &Setup, cell: &Cell, disk: &Disk, subject: &Subject) -> Result<Sample> {
    if let Kind::Fio = subject.kind {
        return fio::run(setup, &cell.load, disk, subject);
    }
    let (outcome, used, ()) = timed_run(setup, cell, disk, subject, |_| Ok(()))?;
    let count = outcome.latency.count();
    if count == 0 {
        bail!("not one request completed in a run");
    }
    Ok(Sample::new()
        .figure("rate", count as f64 / outcome.elapsed.as_secs_f64())
        .figure("p50", outcome.latency.quantile_us(0.5))
        .figure("p99", outcome.latency.quantile_us(0.99))
        .figure("p999", outcome.latency.quantile_us(0.999))
        .figure("cpu", used.served.as_secs_f64() * 1e6 / count as f64)
        .lost(used.lost)
        .latencies(outcome.latency))
}

/// A run more, in which the kernel counts.
pub fn count(setup: &Setup, cell: &Cell, disk: &Disk, subject: &Subject) -> Result<Sample> {
    let (outcome, _, counter) = timed_run(setup, cell, disk, subject, Counter::start)?;
    let counts = counter.finish()?;
    let requests = outcome.all_requests as f64;
    Ok(Sample::new()
        .figure("calls", counts.system_calls as f64 / requests)
        .figure("hands", counts.hand_offs as f64 / requests))
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
