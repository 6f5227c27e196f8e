//! What to do, and why: a function of configuration, history and one sample.
//!
//! ```text
//!                  a VM joins, or offers much more
//!          ┌──────────────────────────────────────────┐
//!          ▼                                          │
//!   OFF ─▶ BURST ──── yield too low, ≥ min_passes ─▶ TRICKLE ◀─┐ one pass now and then,
//!    ▲       ▲                                        │  │  └──┘ each wait twice the last
//!    │       └──────── a pass that found enough ──────┘  │
//!    └── no memory of the domain left ───────────────────┤
//!                                                        ▼
//!   any ─── little available, or tasks wait for it ──▶ PRESSURE: scan, then balloons, then reclaim
//! ```
//!
//! | state | scanner | balloons |
//! |---|---|---|
//! | OFF | stands still: nothing to merge | given back |
//! | BURST | at `cpu_budget` until what it finds is no longer worth it | given back |
//! | TRICKLE | stands still between passes | given back |
//! | PRESSURE | as BURST | taken from guests with memory to spare |
//!
//! In every state a guest that is short of memory gets some back in the step that shows it, memory of a foreign domain is
//! taken out of merging as soon as there is room for it, and not scanned before; and the scanner's CPU is held to the budget by an account that is settled every step.
//! Constant scanning costs the same for each page found and never ends; so it is run fast and then not at all.
//!
//! No clock, no I/O, no randomness: [`decide`] may be replayed. [`History`] is all that it remembers.

mod advice;
mod balloon;
mod pressure;
mod scan;
#[cfg(test)]
mod simulated;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::sample::{Sample, Settings};

pub use self::advice::farewell;
use self::pressure::Windows;
use self::scan::Scanner;

/// What the tuner is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// There is nothing to merge.
    #[default]
    Off,
    /// New memory is merged.
    Burst,
    /// All is merged; now and then it looks for more.
    Trickle,
    /// The host is short of memory.
    Pressure,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Off => "OFF",
            Self::Burst => "BURST",
            Self::Trickle => "TRICKLE",
            Self::Pressure => "PRESSURE",
        })
    }
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Tell the kernel's scanner this; what is `None` stays.
    Scanner(Settings),
    /// Have pages of a VM compared with those of its domain.
    Compare {
        /// Its name.
        vm: String,
    },
    /// Have the VM offer memory for merging, or withdraw it.
    Advise {
        /// Its name.
        vm: String,
        /// Its own domain.
        domain: String,
        /// Offered, or withdrawn.
        merge: bool,
        /// Guest physical start and bytes of each range; none: all of it.
        ranges: Vec<(u64, u64)>,
    },
    /// Have the balloon hold so much.
    Balloon {
        /// Name of the VM.
        vm: String,
        /// Bytes.
        bytes: u64,
    },
    /// Have the host swap so much of a VM.
    Reclaim {
        /// Name of the VM.
        vm: String,
        /// Bytes.
        bytes: u64,
    },
}

/// An action and the reason for it, with numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What.
    pub action: Action,
    /// Why.
    pub why: String,
}

/// What one sample comes to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// When, as the sample has it.
    pub at_ms: u64,
    /// State from now on.
    pub state: State,
    /// If it is another one than before: why.
    pub changed: Option<String>,
    /// In this order.
    pub steps: Vec<Step>,
}

impl Decision {
    fn add(&mut self, action: Action, why: String) {
        self.steps.push(Step { action, why });
    }

    /// Whether nothing is to be done or told.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.changed.is_none()
    }
}

/// All that the policy remembers.
#[derive(Debug, Clone, Default)]
pub struct History {
    state: State,
    /// When the state was entered.
    since_ms: u64,
    last: Option<Sample>,
    scanner: Scanner,
    windows: Windows,
    compare: advice::Rhythm,
    vms: BTreeMap<String, VmHistory>,
}

impl History {
    /// The state as of the last sample, and since when.
    pub fn state(&self) -> (State, u64) {
        (self.state, self.since_ms)
    }

    /// Why the scanner does what it does.
    pub fn scanner_says(&self) -> String {
        self.scanner.says()
    }
}

/// What is remembered of a VM.
#[derive(Debug, Clone, Default)]
struct VmHistory {
    pid: u32,
    /// Its pages were compared at least once.
    compared: bool,
    /// Bytes offered when the last burst began.
    burst_bytes: u64,
    /// Full scans of the kernel when the first memory was offered.
    offered_at_scan: Option<u64>,
    /// It is not offered before this.
    dropped_until_ms: u64,
    /// Its balloon does not grow before this.
    calm_until_ms: u64,
}

/// Decides.
pub fn decide(config: &Config, history: &History, sample: &Sample) -> (History, Decision) {
    let mut next = history.clone();
    let mut decision = Decision {
        at_ms: sample.at_ms,
        state: history.state,
        ..Decision::default()
    };
    next.vms.retain(|name, of| {
        let vm = sample.vms.get(name);
        vm.is_some_and(|vm| vm.pid == of.pid)
    });
    for (name, vm) in &sample.vms {
        let known = next.vms.entry(name.clone()).or_default();
        known.pid = vm.pid;
    }
    next.windows.take(sample);
    let host = pressure::judge(config, history, &next.windows, sample);
    advice::advise(config, &mut next, sample, &mut decision);
    next.scanner
        .account(config, &next.windows, history.last.as_ref(), sample);
    scan::change_state(config, &mut next, sample, &host, &mut decision);
    scan::set(config, &next, sample, &mut decision);
    balloon::adjust(
        config,
        &mut next,
        history.last.as_ref(),
        sample,
        &mut decision,
    );
    next.last = Some(sample.clone());
    decision.state = next.state;
    (next, decision)
}

/// Bytes as MiB.
fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// A part of a number of bytes.
fn part(bytes: u64, of: f64) -> u64 {
    (bytes as f64 * of) as u64
}
