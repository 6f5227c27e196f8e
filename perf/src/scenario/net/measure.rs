//! One subject in one cell: frames that the tap counts in a window.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::super::setup::Setup;
use super::cells::{Cell, Way};
use super::limit::{self, CIRCULATING};
use super::subject::{Kind, Subject};
use super::tap::{self, Counters, Sender};
use super::testpmd::Guest;
use crate::counts::Counter;
use crate::daemon::Daemon;
use crate::interrupt;
use crate::scenario::Sample;
use crate::sys;

/// Until frames flow.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks for that.
const GLANCE: Duration = Duration::from_millis(20);
/// So many in one glance are a flow.
const FLOW: u64 = 500;

/// One run.
pub(super) fn run(setup: &Setup, cell: &Cell, subject: &Subject) -> Result<Sample> {
    let (moved, ()) = once(setup, cell, subject, |_| Ok(()))?;
    Ok(moved.sample(setup))
}

/// A run more, in which the kernel counts.
pub(super) fn count(setup: &Setup, cell: &Cell, subject: &Subject) -> Result<Sample> {
    let (moved, counter) = once(setup, cell, subject, Counter::start)?;
    let counts = counter.finish()?;
    let calls = counts.system_calls as f64 / moved.all_frames as f64;
    Ok(Sample::new().figure("calls", calls))
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
    fn sample(&self, setup: &Setup) -> Sample {
        let cores = if setup.client_cpu == setup.daemon_cpu {
            1.0
        } else {
            2.0
        };
        let there = self.elapsed.as_secs_f64() * cores;
        Sample::new()
            .figure("rate", self.frames as f64 / self.elapsed.as_secs_f64())
            .figure("cpu", self.served.as_secs_f64() * 1e6 / self.frames as f64)
            .lost((1.0 - self.ours.as_secs_f64() / there).max(0.0))
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
        interrupt::sleep(GLANCE)?;
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
    interrupt::sleep(setup.window.warmup)?;
    let (began, first, served_before, ours_before) = read()?;
    interrupt::sleep(setup.window.measured)?;
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
