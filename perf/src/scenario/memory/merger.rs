//! Who has the kernel merge: `berth-tuner`, and what else a host could do.
//!
//! | merger | the scanner |
//! |---|---|
//! | `none` | stands still: what guests are measured against |
//! | `kernel` | as the kernel comes: 100 pages, 20 ms |
//! | `advisor` | the kernel's own advisor, `scan-time`, as it comes |
//! | `constant` | 5000 pages, 10 ms |
//! | `two-passes` | the same, stopped two passes after the last guest has started |
//! | `ksmtuned` | the algorithm of the package `ksmtuned`, once a minute, its threshold always exceeded |
//! | `berth-tuner` | the daemon; holders offer it memory through their API |
//!
//! All others have all memory advised as mergeable from the start, as QEMU has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use berth_tests_framework::process::{Process, Signal};
use berth_tests_framework::wait::seconds;

use super::guests::Place;
use super::holder::DOMAIN;
use super::kernel::{Counters, set};
use crate::sys;

/// Kinds, in the order of running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nobody.
    None,
    /// The kernel's defaults.
    Kernel,
    /// The kernel's advisor.
    Advisor,
    /// 5000 pages, 10 ms.
    Constant,
    /// The same, until two passes are done.
    TwoPasses,
    /// As `ksmtuned`.
    Ksmtuned,
    /// Ours.
    Tuner,
}

/// All of them.
pub(super) const KINDS: [Kind; 7] = [
    Kind::None,
    Kind::Kernel,
    Kind::Advisor,
    Kind::Constant,
    Kind::TwoPasses,
    Kind::Ksmtuned,
    Kind::Tuner,
];

/// `ksmtuned`: seconds between two rounds.
const KSMTUNED_EVERY_S: f64 = 60.0;
/// Pages more each round while memory is short, least and most pages.
const KSMTUNED_PAGES: (u64, u64, u64) = (300, 64, 1250);

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Kernel => "kernel",
            Self::Advisor => "advisor",
            Self::Constant => "constant",
            Self::TwoPasses => "two-passes",
            Self::Ksmtuned => "ksmtuned",
            Self::Tuner => "berth-tuner",
        }
    }

    /// Whether memory is advised from the start.
    pub(super) const fn offers_all(self) -> bool {
        !matches!(self, Self::None | Self::Tuner)
    }
}

/// One at work.
#[derive(Debug)]
pub(super) struct Merger {
    kind: Kind,
    /// Full scans after which it stops.
    stop_at: Option<u64>,
    rounds: u64,
    pages: u64,
    tuner: Option<Process>,
}

impl Merger {
    /// Begins; KSM is as the kernel comes.
    pub(super) fn start(
        kind: Kind,
        program: Option<&Path>,
        place: &Place,
        logs: &Path,
    ) -> Result<Self> {
        let mut merger = Self {
            kind,
            stop_at: None,
            rounds: 0,
            pages: 0,
            tuner: None,
        };
        match kind {
            Kind::None => {}
            Kind::Kernel => set("run", "1")?,
            Kind::Advisor => {
                set("advisor_mode", "scan-time")?;
                set("run", "1")?;
            }
            Kind::Constant | Kind::TwoPasses => {
                set("pages_to_scan", "5000")?;
                set("sleep_millisecs", "10")?;
                set("run", "1")?;
            }
            // It sees to it once a round.
            Kind::Ksmtuned => {}
            Kind::Tuner => {
                let program = program.context("no berth-tuner")?;
                merger.tuner = Some(tuner(program, place, logs)?);
            }
        }
        Ok(merger)
    }

    /// Takes note of a guest that has started.
    pub(super) fn guest_started(&mut self, now: &Counters) -> Result<()> {
        if self.kind == Kind::TwoPasses {
            // The pass under way does not count.
            self.stop_at = Some(now.full_scans + 3);
            set("run", "1")?;
        }
        Ok(())
    }

    /// Does what is due.
    pub(super) fn step(&mut self, at_s: f64, now: &Counters) -> Result<()> {
        match self.kind {
            Kind::TwoPasses if self.stop_at.is_some_and(|at| now.full_scans >= at) => {
                self.stop_at = None;
                set("run", "0")
            }
            Kind::Ksmtuned if at_s >= self.rounds as f64 * KSMTUNED_EVERY_S => {
                self.rounds += 1;
                let (more, least, most) = KSMTUNED_PAGES;
                self.pages = (self.pages + more).clamp(least, most);
                set("pages_to_scan", &self.pages.to_string())?;
                set("sleep_millisecs", &ksmtuned_sleep_ms()?.to_string())?;
                set("run", "1")
            }
            _ => Ok(()),
        }
    }

    /// CPU time that it has used itself.
    pub(super) fn cpu(&self) -> Duration {
        let pid = self.tuner.as_ref().map(Process::pid);
        pid.and_then(|pid| sys::process_cpu(pid).ok())
            .unwrap_or_default()
    }

    /// Ends; KSM stays as it is but for what `berth-tuner` puts back.
    pub(super) fn end(mut self) -> Result<()> {
        match &mut self.tuner {
            Some(tuner) => {
                tuner.signal(Signal::Term)?;
                tuner.wait_success(seconds(60))
            }
            None => Ok(()),
        }
    }
}

fn tuner(program: &Path, place: &Place, logs: &Path) -> Result<Process> {
    let run_dir = logs.join("tuner");
    fs::create_dir_all(&run_dir)?;
    let text = format!(
        "[general]\nvms = {:?}\nrun_dir = {run_dir:?}\n[merge]\ndomain = \"{DOMAIN}\"\n",
        place.sockets
    );
    let config = logs.join("tuner.toml");
    fs::write(&config, text)?;
    let mut command = Command::new(program);
    command.arg("run").arg("--config").arg(&config);
    command.env("NO_COLOR", "1");
    let log: PathBuf = logs.join("tuner.log");
    Process::spawn("berth-tuner", command, &log)
}

/// 10 ms at 16 GiB, in proportion more for less memory, and never less.
fn ksmtuned_sleep_ms() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .context("no MemTotal in /proc/meminfo")?;
    Ok((10 * (16 << 20) / kib.max(1)).max(10))
}
