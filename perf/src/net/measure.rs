//! One subject in one cell: frames that the tap counts in a window.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::cells::{Cell, Way};
use super::limit::{self, CIRCULATING};
use super::subject::{Kind, OURS, Subject};
use super::tap::{self, Counters, Sender};
use super::testpmd::Guest;
use crate::counts::Counter;
use crate::daemon::Daemon;
use crate::progress::Progress;
use crate::rounds::{self, CellResult, PerRequest, Plan, Row, Run};
use crate::sys;
use crate::target::Window;

/// Until frames flow.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks for that.
const GLANCE: Duration = Duration::from_millis(20);
/// So many in one glance are a flow.
const FLOW: u64 = 500;

/// Where and how long.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) client_cpu: usize,
    pub(super) daemon_cpu: usize,
    pub(super) window: Window,
    pub(super) rounds: u32,
    pub(super) limit: String,
    pub(super) count: bool,
    pub(super) directory: PathBuf,
}

/// Measures one cell.
pub(super) fn cell(
    setup: &Setup,
    cell: &Cell,
    subjects: &[Subject],
    progress: &mut Progress,
) -> CellResult {
    let plan = Plan {
        row: Row {
            name: cell.name(),
            title: cell.title(),
            goal: Some(cell.goal),
            cpu_goal_us: None,
            ours: OURS,
            ours_by_io_uring: "",
        },
        limit: setup.limit.clone(),
        subjects: subjects
            .iter()
            .map(|subject| subject.name.clone())
            .collect(),
        rounds: setup.rounds,
    };
    let run = |subject: usize| {
        let (moved, ()) = once(setup, cell, &subjects[subject], |_| Ok(()))?;
        Ok(moved.run(setup))
    };
    let count = |subject: usize| {
        if !setup.count {
            return Ok(None);
        }
        let (moved, counter) = once(setup, cell, &subjects[subject], Counter::start)?;
        let counts = counter.finish()?;
        Ok(Some(PerRequest {
            system_calls: counts.system_calls as f64 / moved.all_frames as f64,
            hand_offs: counts.hand_offs as f64 / moved.all_frames as f64,
        }))
    };
    rounds::interleave(plan, progress, run, count)
}

/// What a window saw.
struct Moved {
    frames: u64,
    elapsed: Duration,
    served: Duration,
    ours: Duration,
    /// Since `watch` was called.
    all_frames: u64,
}

impl Moved {
    fn run(&self, setup: &Setup) -> Run {
        let cores = if setup.client_cpu == setup.daemon_cpu {
            1.0
        } else {
            2.0
        };
        let there = self.elapsed.as_secs_f64() * cores;
        Run {
            rate: self.frames as f64 / self.elapsed.as_secs_f64(),
            latency: None,
            cpu_us: Some(self.served.as_secs_f64() * 1e6 / self.frames as f64),
            lost: Some((1.0 - self.ours.as_secs_f64() / there).max(0.0)),
        }
    }
}

fn once<W>(
    setup: &Setup,
    cell: &Cell,
    subject: &Subject,
    watch: impl FnOnce(u32) -> Result<W>,
) -> Result<(Moved, W)> {
    let us = std::process::id();
    if subject.kind == Kind::Limit {
        return limit::run(cell, setup.daemon_cpu, setup.client_cpu, |thread| {
            wait_for_flow(cell, || Ok(()), || true)?;
            let before = frames(cell)?;
            let watched = watch(us)?;
            let moved = window(setup, cell, before, || sys::thread_cpu_of(thread), &[us])?;
            Ok((moved, watched))
        });
    }
    let socket = setup.directory.join("net.sock");
    let log = setup.directory.join("daemon.log");
    let Some(command) = subject.command(&socket, setup.daemon_cpu) else {
        bail!("a subject without a daemon");
    };
    let mut daemon = Daemon::start(command, setup.daemon_cpu, &socket, &log)?;
    let guest_log = setup.directory.join("guest.log");
    let mut guest = Guest::start(cell, &socket, setup.client_cpu, &guest_log)?;
    let mut sender = None;
    let frame = tap::frame(cell.frame);
    let nudge = || {
        if cell.way == Way::FromTap {
            // The tap may not be there yet, or not be up; the next look tries again.
            if sender.is_none() {
                sender = Sender::new().ok();
            }
            let _ = sender.as_ref().map(|sender| sender.send(&frame, 1));
        }
        Ok(())
    };
    wait_for_flow(cell, nudge, || guest.lives() && daemon.lives())?;
    if let Some(sender) = &sender {
        let mut left = CIRCULATING as usize;
        while left > 0 {
            left -= sender.send(&frame, left)?;
        }
    }
    let before = frames(cell)?;
    let watched = watch(daemon.pid())?;
    let pid = daemon.pid();
    let all = [us, pid, guest.pid()];
    let moved = window(setup, cell, before, || sys::process_cpu(pid), &all)?;
    Ok((moved, watched))
}

/// Until frames flow, or nobody believes any more that they will.
fn wait_for_flow(
    cell: &Cell,
    mut nudge: impl FnMut() -> Result<()>,
    mut lives: impl FnMut() -> bool,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = 0;
    loop {
        nudge()?;
        thread::sleep(GLANCE);
        let now = frames(cell)?;
        if now >= last + FLOW {
            return Ok(());
        }
        last = now;
        if !lives() {
            bail!("testpmd or the daemon ended");
        }
        if Instant::now() >= deadline {
            bail!("no frames flow");
        }
    }
}

/// Frames so far; none while there is no tap.
fn frames(cell: &Cell) -> Result<u64> {
    let Counters { written, read, .. } = tap::counters()?.unwrap_or_default();
    Ok(match cell.way {
        Way::ToTap => written,
        Way::FromTap => read,
    })
}

/// `served` tells the CPU time so far of the one who serves.
fn window(
    setup: &Setup,
    cell: &Cell,
    before: u64,
    served: impl Fn() -> std::io::Result<Duration>,
    all: &[u32],
) -> Result<Moved> {
    let read = || -> Result<(Instant, u64, Duration, Duration)> {
        let mut ours = Duration::ZERO;
        for &pid in all {
            ours += sys::process_cpu(pid)?;
        }
        Ok((Instant::now(), frames(cell)?, served()?, ours))
    };
    thread::sleep(setup.window.warmup);
    let (began, first, served_before, ours_before) = read()?;
    thread::sleep(setup.window.measured);
    let (ended, last, served_after, ours_after) = read()?;
    if last == first {
        bail!("no frame moved in the window: on a busy machine those that go round get lost");
    }
    let elapsed = ended - began;
    Ok(Moved {
        frames: last - first,
        elapsed,
        served: served_after.saturating_sub(served_before),
        ours: ours_after.saturating_sub(ours_before),
        all_frames: last - before,
    })
}
