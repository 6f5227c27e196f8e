//! What can be measured. A scenario is one file or folder here and one line in [`ALL`].
//!
//! ```text
//!  Entry ─ name, needs, metrics, cells          known before anything runs (list, --cell, time left)
//!    └ prepare(&mut Context) ─▶ Scenario        makes disks, finds programs: once
//!         └ subjects() ─▶ for each cell: warm-up, then round by round every subject in turn: measure()
//!                                        then count() of each, where counting would disturb
//! ```
//!
//! A scenario measures one subject once; turns, repetitions, medians, ratios, goals and verdicts are made in one
//! place, `crate::engine`. All calls come from the main thread. What must not outlive the run is told to
//! `Context::janitor` before it is made. What takes longer than a second asks `crate::interrupt`.

pub mod blk;
pub mod boot;
pub mod crash;
pub mod exits;
mod guest;
pub mod irq;
pub mod memory;
pub mod net;
pub mod overhead;
pub mod scale;
pub mod setup;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::context::Context;
use crate::histogram::Histogram;
pub use crate::results::{Better, Role};

/// All of them, in the order of running.
pub const ALL: &[Entry] = &[
    blk::ENTRY,
    net::ENTRY,
    irq::ENTRY,
    crash::ENTRY,
    memory::ENTRY,
    scale::ENTRY,
    boot::ENTRY,
    overhead::ENTRY,
    exits::ENTRY,
];

/// A scenario that can be run.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What `run` calls it.
    pub name: &'static str,
    /// In one line.
    pub about: &'static str,
    /// Without which it cannot run.
    pub needs: &'static [Need],
    /// What it measures; the first is the headline, which ratios are shown of.
    pub metrics: &'static [Metric],
    /// All of its cells.
    pub cells: fn() -> Vec<Cell>,
    /// Makes what is needed for the cells that were chosen (`Context::cells`).
    pub prepare: fn(&mut Context) -> Result<Box<dyn Scenario>>,
    /// How long it takes, roughly; with `--quick` or without.
    pub expected: fn(quick: bool) -> Duration,
}

/// A scenario that is prepared.
pub trait Scenario {
    /// Who takes part, in the order of running; asked once, after `prepare`.
    fn subjects(&self) -> Vec<Subject>;

    /// Whether a subject (its index) makes sense in a cell.
    fn fits(&self, _cell: &Cell, _subject: usize) -> bool {
        true
    }

    /// One repetition. An error takes the subject out of this cell, and is shown there.
    fn measure(&mut self, cell: &Cell, subject: usize, round: u32) -> Result<Sample>;

    /// Once more, with something that counts and thereby disturbs. None where nobody counts.
    fn count(&mut self, _cell: &Cell, _subject: usize) -> Result<Option<Sample>> {
        Ok(None)
    }
}

/// Without which a scenario cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Rights of the superuser.
    Root,
    /// Any `/dev/kvm`, as micro-guests run on.
    Kvm,
    /// A KVM that runs ordinary guests; where the host has none the scenario runs in the lab.
    Guest,
    /// A program on the PATH.
    Tool {
        /// Its name.
        program: &'static str,
        /// How to get it.
        how: &'static str,
    },
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its key in samples; with the unit in it.
    pub name: &'static str,
    /// Unit of its numbers.
    pub unit: &'static str,
    /// Which way is better.
    pub better: Better,
    /// In one line.
    pub about: &'static str,
}

impl Metric {
    pub(super) const fn new(
        name: &'static str,
        unit: &'static str,
        better: Better,
        about: &'static str,
    ) -> Self {
        Self {
            name,
            unit,
            better,
            about,
        }
    }
}

/// One thing to measure, as all subjects do it.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What `--cell` knows it by: parts with dashes between.
    pub name: String,
    /// For tables.
    pub title: String,
    /// Part of `--quick`.
    pub quick: bool,
    /// Repetitions, in full and with `--quick`; `--rounds` has the last word.
    pub rounds: (u32, u32),
    /// Rounds before those, which are not recorded.
    pub warm_up: u32,
    /// What is to be reached.
    pub goals: Vec<Goal>,
    /// Cloud Hypervisor's names of metrics here.
    pub names: BTreeMap<&'static str, &'static str>,
}

impl Cell {
    /// Five rounds (three with `--quick`), no goal, not part of `--quick`.
    pub fn new(name: impl Into<String>, title: impl Into<String>) -> Cell {
        Cell {
            name: name.into(),
            title: title.into(),
            quick: false,
            rounds: (5, 3),
            warm_up: 0,
            goals: Vec::new(),
            names: BTreeMap::new(),
        }
    }

    /// Also part of `--quick`.
    pub fn quick(mut self) -> Cell {
        self.quick = true;
        self
    }

    /// Repetitions, in full and with `--quick`.
    pub fn rounds(mut self, full: u32, quick: u32) -> Cell {
        self.rounds = (full, quick);
        self
    }

    /// Rounds before those, which are not recorded.
    pub fn warm_up(mut self, rounds: u32) -> Cell {
        self.warm_up = rounds;
        self
    }

    /// One more goal.
    pub fn goal(mut self, metric: &'static str, of: Of, bound: Bound) -> Cell {
        self.goals.push(Goal { metric, of, bound });
        self
    }

    /// What Cloud Hypervisor calls a metric here.
    pub fn named(mut self, metric: &'static str, theirs: &'static str) -> Cell {
        self.names.insert(metric, theirs);
        self
    }
}

/// What every subject of ours is to reach in a cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Of which metric.
    pub metric: &'static str,
    /// Itself, or a ratio.
    pub of: Of,
    /// To be reached.
    pub bound: Bound,
}

/// What a goal's figure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// The metric itself.
    Itself,
    /// Its ratio to that of the cell's reference (the limit) in the same round.
    Limit,
    /// Its ratio to that of the best peer in the same round.
    BestPeer,
}

/// What a goal's figure is to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// So much or more.
    AtLeast(f64),
    /// So much or less.
    AtMost(f64),
}

/// One of those who are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// What tables and `--subject` call it.
    pub name: String,
    /// Its side.
    pub role: Role,
    /// Which of `--builds`, from 0.
    pub build: Option<usize>,
}

impl Subject {
    /// Nothing of ours or a peer's between.
    pub fn limit(name: impl Into<String>) -> Subject {
        Subject::new(name, Role::Limit)
    }

    /// What people would otherwise use.
    pub fn peer(name: impl Into<String>) -> Subject {
        Subject::new(name, Role::Peer)
    }

    /// What goals are for.
    pub fn ours(name: impl Into<String>) -> Subject {
        Subject::new(name, Role::Ours)
    }

    /// Ours with other flags.
    pub fn variant(name: impl Into<String>) -> Subject {
        Subject::new(name, Role::Variant)
    }

    fn new(name: impl Into<String>, role: Role) -> Subject {
        Subject {
            name: name.into(),
            role,
            build: None,
        }
    }
}

/// A program of ours with the subject that it is: one for each of `--builds`.
#[derive(Clone, Debug)]
pub struct Ours {
    /// Named after the program and the build.
    pub subject: Subject,
    /// Where it is.
    pub program: PathBuf,
}

/// What came of one repetition.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Metric and number.
    pub figures: BTreeMap<&'static str, f64>,
    /// Share of the cores that neither the subject nor we had.
    pub lost: Option<f64>,
    /// Of requests.
    pub latencies: Option<Histogram>,
    /// What changed over time: seconds, value.
    pub timelines: BTreeMap<String, Vec<[f64; 2]>>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

impl Sample {
    /// Nothing yet.
    pub fn new() -> Sample {
        Sample::default()
    }

    /// One more number, of a metric that the entry names.
    pub fn figure(mut self, metric: &'static str, number: f64) -> Sample {
        self.figures.insert(metric, number);
        self
    }

    /// Share of the cores that neither the subject nor we had.
    pub fn lost(mut self, share: f64) -> Sample {
        self.lost = Some(share);
        self
    }

    /// Of requests; the engine adds up the rounds'.
    pub fn latencies(mut self, histogram: Histogram) -> Sample {
        self.latencies = Some(histogram);
        self
    }

    /// What changed over time: seconds, value.
    pub fn timeline(mut self, name: impl Into<String>, points: Vec<[f64; 2]>) -> Sample {
        self.timelines.insert(name.into(), points);
        self
    }

    /// What else there is to say; the same words only once per subject.
    pub fn note(mut self, text: impl Into<String>) -> Sample {
        self.notes.push(text.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_scenarios_cells_and_metrics_are_told_apart() {
        let unique = |mut names: Vec<String>| {
            let all = names.len();
            names.sort();
            names.dedup();
            names.len() == all
        };
        assert!(unique(
            ALL.iter().map(|entry| entry.name.to_owned()).collect()
        ));
        for entry in ALL {
            let cells = (entry.cells)();
            assert!(
                unique(cells.iter().map(|cell| cell.name.clone()).collect()),
                "{}",
                entry.name
            );
            let metrics: Vec<String> = entry.metrics.iter().map(|m| m.name.to_owned()).collect();
            for cell in &cells {
                for goal in &cell.goals {
                    assert!(
                        metrics.iter().any(|name| name == goal.metric),
                        "{} {}",
                        entry.name,
                        cell.name
                    );
                }
            }
            assert!(unique(metrics) && !cells.is_empty(), "{}", entry.name);
        }
    }
}
