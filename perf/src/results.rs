//! What a run leaves behind: one JSON file, which reports and comparisons are made from.
//!
//! Its head and `results` have the shape of Cloud Hypervisor's performance metrics, with the same names where the
//! thing is the same, so that what reads those reads ours. The rest is ours:
//!
//! ```text
//!  Results ─ host, noise, absent peers
//!     ├─ results: [{name, mean, std_dev, max, min}]       one per metric, cell and subject
//!     └─ scenarios ─ cells ─ series (a subject's samples, ratios, latencies, timelines)
//!                          └ goals  (figure, bound, verdict)
//! ```
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::host::{Facts, Noise};
use crate::stats::{Spread, mean_and_deviation};

/// Of the format below.
pub const VERSION: u32 = 1;
/// The file in a run's folder.
pub const FILE: &str = "results.json";

/// A run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// As `git describe` says it; of the source tree around the program.
    pub git_human_readable: String,
    /// The commit.
    pub git_revision: String,
    /// When it was made.
    pub git_commit_date: String,
    /// When the run began.
    pub date: String,
    /// In Cloud Hypervisor's shape.
    pub results: Vec<Figure>,
    /// [`VERSION`].
    pub format: u32,
    /// Short windows and few cells.
    pub quick: bool,
    /// It was stopped before its end: what is here was measured.
    pub interrupted: bool,
    /// Where.
    pub host: Facts,
    /// What else the host did, measured before each scenario and after the last.
    pub noise: Vec<Noise>,
    /// Who could not be measured, and why.
    pub absent: Vec<Absent>,
    /// In the order of running.
    pub scenarios: Vec<ScenarioResult>,
}

/// One line of Cloud Hypervisor's `results`, with what is needed to find it again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Theirs where the thing is the same; who was measured follows behind an `@`, unless it is ours.
    pub name: String,
    /// Of the repetitions.
    pub mean: f64,
    /// Of the repetitions.
    pub std_dev: f64,
    /// Largest.
    pub max: f64,
    /// Smallest.
    pub min: f64,
    /// Middle.
    pub median: f64,
    /// Of all of these.
    pub unit: String,
    /// Whose it is.
    pub scenario: String,
}

/// Who could not be measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Absent {
    /// A peer or a tool.
    pub name: String,
    /// And how to get it.
    pub why: String,
}

/// One scenario.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ScenarioResult {
    /// Which.
    pub name: String,
    /// In one line.
    pub about: String,
    /// It ran in the lab, where time is emulated: only ratios and counts mean something.
    pub emulated: bool,
    /// What was measured; the first is the headline.
    pub metrics: Vec<MetricInfo>,
    /// In the order of running.
    pub cells: Vec<CellResult>,
    /// Why there is nothing, or no more.
    pub failure: Option<String>,
}

/// A metric as the file has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricInfo {
    /// Its key in samples.
    pub name: String,
    /// Unit of its numbers.
    pub unit: String,
    /// Whether more is better; neither is, where it only explains.
    pub better: Better,
    /// In one line.
    pub about: String,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Rates.
    More,
    /// Times, memory.
    Less,
    /// It explains the others.
    #[default]
    Neither,
}

/// One thing that was measured, with all who took part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    /// What `--cell` knows it by.
    pub name: String,
    /// For tables.
    pub title: String,
    /// The subject that ratios are of.
    pub reference: Option<String>,
    /// In the order of running.
    pub series: Vec<Series>,
    /// What is to be reached here.
    pub goals: Vec<GoalResult>,
    /// Why there is no verdict on anything here, if there is none.
    pub too_noisy: Option<String>,
}

/// Whose side a subject is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Nothing of ours or a peer's between: what is possible.
    Limit,
    /// A variant of ours, beside the one that goals are for.
    Variant,
    /// What goals are for.
    Ours,
    /// What people would otherwise use.
    #[default]
    Peer,
}

/// A subject's repetitions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Who.
    pub subject: String,
    /// Its side.
    pub role: Role,
    /// Which of `--builds`, from 0.
    pub build: Option<usize>,
    /// For each metric one number per round, in order. A round in which it had none is `null`.
    pub samples: BTreeMap<String, Vec<Option<f64>>>,
    /// Of the samples.
    pub spread: BTreeMap<String, Spread>,
    /// Of the ratios to the reference in the same round.
    pub ratio: BTreeMap<String, Spread>,
    /// Of the ratios to the first of `--builds` in the same round.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub against_first_build: BTreeMap<String, Spread>,
    /// Counted in runs of their own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub counts: BTreeMap<String, f64>,
    /// Share of the cores that neither it nor we had, largest of the rounds.
    pub lost: Option<f64>,
    /// Points of the latencies' distribution, all rounds together: share of requests, µs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latencies: Vec<[f64; 2]>,
    /// Of the last round: seconds, value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub timelines: BTreeMap<String, Vec<[f64; 2]>>,
    /// What else there is to say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Why there are no more.
    pub failure: Option<String>,
}

/// A goal beside its figure.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GoalResult {
    /// Who is to reach it.
    pub subject: String,
    /// Of which metric.
    pub metric: String,
    /// "at least 0.95 of fio-io_uring".
    pub goal: String,
    /// What came out, if anything did.
    pub figure: Option<f64>,
    /// Middle half of the rounds.
    pub from_to: Option<[f64; 2]>,
    /// What of it.
    pub verdict: Verdict,
}

/// Of a goal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Reached.
    Met,
    /// Not reached.
    Missed,
    /// The host was too noisy, or the rounds differ too much.
    TooNoisy,
    /// Somebody who is needed for it was not there.
    #[default]
    NotMeasured,
}

impl Verdict {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::TooNoisy => "no verdict: too noisy",
            Verdict::NotMeasured => "not measured",
        }
    }
}

impl CellResult {
    /// The series of one subject.
    pub fn series(&self, subject: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.subject == subject)
    }
}

impl Series {
    /// The median of a metric, whether it was timed or counted.
    pub fn median(&self, metric: &str) -> Option<f64> {
        let spread = self.spread.get(metric).map(|spread| spread.median);
        spread.or_else(|| self.counts.get(metric).copied())
    }
}

impl Results {
    /// Reads a run: its folder, or the file itself.
    pub fn read(path: &Path) -> Result<Results> {
        let file = if path.is_dir() {
            path.join(FILE)
        } else {
            path.to_owned()
        };
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let results: Results = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a result of berth-perf", file.display()))?;
        if results.format != VERSION {
            bail!(
                "{} has format {}; this program reads {VERSION}",
                file.display(),
                results.format
            );
        }
        Ok(results)
    }

    /// Writes the file into `folder`, whole or not at all.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let (path, new) = (folder.join(FILE), folder.join("results.json.new"));
        let text = serde_json::to_string_pretty(self).context("results as JSON")?;
        fs::write(&new, text + "\n")
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Forgets what it has of some scenarios, which are measured anew.
    pub fn forget(&mut self, scenarios: &[&str]) {
        let kept = |name: &str| !scenarios.contains(&name);
        self.scenarios.retain(|scenario| kept(&scenario.name));
        self.results.retain(|figure| kept(&figure.scenario));
        self.noise.retain(|look| kept(&look.when));
    }

    /// Adds a scenario and its lines in Cloud Hypervisor's shape. `names` maps cell and metric to theirs.
    pub fn add(&mut self, scenario: ScenarioResult, names: &BTreeMap<(String, String), String>) {
        for cell in &scenario.cells {
            for series in &cell.series {
                for metric in &scenario.metrics {
                    let name = names.get(&(cell.name.clone(), metric.name.clone()));
                    let own = || format!("{}_{}_{}", scenario.name, cell.name, metric.name);
                    let name = name.cloned().unwrap_or_else(own);
                    let figure = figure(name, series, metric).map(|figure| Figure {
                        scenario: scenario.name.clone(),
                        ..figure
                    });
                    self.results.extend(figure);
                }
            }
        }
        self.scenarios.push(scenario);
    }
}

fn figure(name: String, series: &Series, metric: &MetricInfo) -> Option<Figure> {
    let numbers: Vec<f64> = match series.samples.get(&metric.name) {
        Some(samples) => samples.iter().flatten().copied().collect(),
        None => vec![*series.counts.get(&metric.name)?],
    };
    let spread = Spread::of(numbers.iter().copied())?;
    let (mean, std_dev) = mean_and_deviation(&numbers);
    let name = match (series.role, series.build) {
        (Role::Ours, None) => name,
        _ => format!("{name}@{}", series.subject),
    };
    Some(Figure {
        name,
        mean,
        std_dev,
        max: spread.max,
        min: spread.min,
        median: spread.median,
        unit: metric.unit.clone(),
        scenario: String::new(),
    })
}
