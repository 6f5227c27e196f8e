//! Every subject in turn, and that several times over, so that a drift of the machine meets all alike; and what
//! comes of it.
//!
//! ```text
//!  cell ─ warm-up rounds ─▶ round 0: a b c   round 1: a b c …   ─▶ count: a b c
//!                             │ Sample per subject and round
//!                             ▼
//!                 spread of each metric · ratio to the reference of the same round · goals
//! ```
//! A subject that fails is out of its cell from then on, and the reason is kept.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use anyhow::Result;

use crate::histogram::Histogram;
use crate::interrupt;
use crate::progress::Progress;
use crate::results::{CellResult, Role, Series};
use crate::scenario::{Cell, Metric, Sample, Scenario, Subject};
use crate::stats::Spread;
use crate::verdict;

/// Points of a distribution that are kept.
const SHARES: [f64; 12] = [
    0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 1.0,
];

/// How a scenario is to be run.
#[derive(Clone, Debug)]
pub struct Order {
    /// Only these subjects, and the reference.
    pub subjects: Vec<String>,
    /// The subject that ratios are of, instead of the limit.
    pub reference: Option<String>,
    /// Repetitions, whatever the cell says.
    pub rounds: Option<u32>,
    /// Short.
    pub quick: bool,
    /// Whether runs that count are wanted.
    pub count: bool,
}

impl Order {
    /// Repetitions of a cell.
    pub fn rounds(&self, cell: &Cell) -> u32 {
        let (full, quick) = cell.rounds;
        self.rounds.unwrap_or(if self.quick { quick } else { full })
    }
}

/// A subject on its way through a cell.
struct Runner {
    index: usize,
    series: Series,
    latencies: Option<Histogram>,
}

/// The subject that ratios are of: the one asked for, the first limit, else the first peer.
pub fn reference<'a>(subjects: &'a [Subject], order: &Order) -> Option<&'a Subject> {
    let role = |role| subjects.iter().find(|subject| subject.role == role);
    match &order.reference {
        Some(name) => subjects.iter().find(|subject| subject.name == *name),
        None => role(Role::Limit).or_else(|| role(Role::Peer)),
    }
}

/// Indices of the subjects that take part in a cell, the reference first.
pub fn taking_part(
    scenario: &dyn Scenario,
    subjects: &[Subject],
    cell: &Cell,
    order: &Order,
) -> Vec<usize> {
    let first = reference(subjects, order).map(|subject| subject.name.as_str());
    let wanted = |subject: &Subject| {
        order.subjects.is_empty()
            || first == Some(&subject.name)
            || order.subjects.contains(&subject.name)
    };
    let mut indices: Vec<usize> = (0..subjects.len())
        .filter(|&index| wanted(&subjects[index]) && scenario.fits(cell, index))
        .collect();
    indices.sort_by_key(|&index| first != Some(&subjects[index].name));
    indices
}

/// Steps of one cell, for the time that is left.
pub fn steps(scenario: &dyn Scenario, subjects: &[Subject], cell: &Cell, order: &Order) -> usize {
    let rounds = order.rounds(cell) + cell.warm_up + u32::from(order.count);
    taking_part(scenario, subjects, cell, order).len() * rounds as usize
}

/// Runs one cell. Stops where somebody wants us to; what was measured by then is in the result.
pub fn cell(
    scenario: &mut dyn Scenario,
    subjects: &[Subject],
    cell: &Cell,
    metrics: &[Metric],
    order: &Order,
    progress: &mut Progress,
) -> CellResult {
    let indices = taking_part(scenario, subjects, cell, order);
    let mut runners: Vec<Runner> = indices
        .into_iter()
        .map(|index| Runner::new(index, &subjects[index]))
        .collect();
    for round in 0..order.rounds(cell) + cell.warm_up {
        for runner in &mut runners {
            if runner.series.failure.is_some() || interrupt::requested() {
                progress.skip();
                continue;
            }
            let sample = scenario.measure(cell, runner.index, round);
            let text = runner.take(sample, metrics, round >= cell.warm_up);
            progress.step(&format!("{} {}: {text}", cell.name, runner.series.subject));
        }
    }
    for runner in runners.iter_mut().filter(|_| order.count) {
        if runner.series.failure.is_some() || interrupt::requested() {
            progress.skip();
        } else {
            count(scenario, cell, runner, progress);
        }
    }
    finish(cell, runners, subjects, metrics, order)
}

fn count(scenario: &mut dyn Scenario, cell: &Cell, runner: &mut Runner, progress: &mut Progress) {
    match scenario.count(cell, runner.index) {
        Ok(None) => return progress.skip(),
        Ok(Some(sample)) => {
            let counts = sample.figures.into_iter();
            let counts = counts.map(|(metric, number)| (metric.to_owned(), number));
            runner.series.counts.extend(counts);
        }
        Err(error) if interrupt::requested() => drop(error),
        Err(error) => runner.series.notes.push(format!("not counted: {error:#}")),
    }
    progress.step(&format!("{} {}: counted", cell.name, runner.series.subject));
}

impl Runner {
    fn new(index: usize, subject: &Subject) -> Runner {
        Runner {
            index,
            series: Series {
                subject: subject.name.clone(),
                role: subject.role,
                build: subject.build,
                ..Series::default()
            },
            latencies: None,
        }
    }

    /// Takes what came of a repetition; says it in a few words.
    fn take(&mut self, sample: Result<Sample>, metrics: &[Metric], recorded: bool) -> String {
        let sample = match sample {
            Ok(sample) => sample,
            // A repetition that was cut short has not failed.
            Err(_) if interrupt::requested() => return "stopped".to_owned(),
            Err(error) => {
                let text = format!("{error:#}");
                self.series.failure = Some(text.clone());
                return text;
            }
        };
        let headline = metrics.iter().find_map(|metric| {
            let number = sample.figures.get(metric.name)?;
            Some(format!("{} {}", short(*number), metric.unit))
        });
        if recorded {
            self.record(sample, metrics);
        }
        headline.unwrap_or_default()
    }

    fn record(&mut self, sample: Sample, metrics: &[Metric]) {
        let series = &mut self.series;
        for metric in metrics {
            let number = sample.figures.get(metric.name).copied();
            // What is not finite has no place in JSON, nor in a mean.
            let number = number.filter(|number| number.is_finite());
            let samples = series.samples.entry(metric.name.to_owned()).or_default();
            samples.push(number);
        }
        series.lost = match (series.lost, sample.lost) {
            (Some(before), Some(now)) => Some(before.max(now)),
            (before, now) => before.or(now),
        };
        match (&mut self.latencies, sample.latencies) {
            (Some(all), Some(more)) => all.add(&more),
            (all @ None, more) => *all = more,
            (Some(_), None) => {}
        }
        series.timelines.extend(sample.timelines);
        for note in sample.notes {
            if !series.notes.contains(&note) {
                series.notes.push(note);
            }
        }
    }

    fn finish(mut self) -> Series {
        let series = &mut self.series;
        series
            .samples
            .retain(|_, samples| samples.iter().any(Option::is_some));
        for (metric, samples) in &series.samples {
            let spread = Spread::of(samples.iter().flatten().copied());
            series
                .spread
                .extend(spread.map(|spread| (metric.clone(), spread)));
        }
        if let Some(latencies) = self.latencies {
            let points = SHARES.map(|share| [share, latencies.quantile_us(share)]);
            series.latencies = points.to_vec();
        }
        self.series
    }
}

/// Ratios of `series` to `other` in the same rounds, metric by metric.
pub fn ratios(series: &Series, other: &Series) -> BTreeMap<String, Spread> {
    let of = |(metric, samples): (&String, &Vec<Option<f64>>)| {
        let others = other.samples.get(metric)?;
        Some((metric.clone(), Spread::of(pairs(samples, others))?))
    };
    series.samples.iter().filter_map(of).collect()
}

/// Ratios in the rounds in which both have a number, and a ratio has a meaning.
pub fn pairs(ours: &[Option<f64>], others: &[Option<f64>]) -> Vec<f64> {
    let pairs = ours.iter().zip(others);
    pairs
        .filter_map(|(one, other)| Some((*one)? / (*other)?))
        .filter(|ratio| ratio.is_finite())
        .collect()
}

fn finish(
    cell: &Cell,
    runners: Vec<Runner>,
    subjects: &[Subject],
    metrics: &[Metric],
    order: &Order,
) -> CellResult {
    let mut series: Vec<Series> = runners.into_iter().map(Runner::finish).collect();
    let reference = reference(subjects, order).map(|subject| subject.name.clone());
    let of = series
        .iter()
        .find(|one| Some(&one.subject) == reference.as_ref())
        .cloned();
    let builds: Vec<Series> = series
        .iter()
        .filter(|one| one.build == Some(0))
        .cloned()
        .collect();
    for one in &mut series {
        if let Some(of) = &of {
            one.ratio = ratios(one, of);
        }
        let first = builds.iter().find(|first| program(first) == program(one));
        if let (Some(first), Some(1..)) = (first, one.build) {
            one.against_first_build = ratios(one, first);
        }
    }
    let mut result = CellResult {
        name: cell.name.clone(),
        title: cell.title.clone(),
        reference: of.map(|of| of.subject),
        series,
        goals: Vec::new(),
        too_noisy: None,
    };
    result.too_noisy = verdict::disturbed(&result);
    verdict::judge(&mut result, cell, metrics);
    result
}

/// The name of a subject without that of its build.
fn program(series: &Series) -> &str {
    series.subject.split(':').next().unwrap_or_default()
}

/// Three digits that matter.
pub fn short(number: f64) -> String {
    let size = number.abs();
    if size >= 100.0 || number == 0.0 {
        format!("{number:.0}")
    } else if size >= 10.0 {
        format!("{number:.1}")
    } else if size >= 0.1 {
        format!("{number:.2}")
    } else {
        format!("{number:.4}")
    }
}

#[cfg(test)]
mod tests;
