//! `berth-perf compare`: what changed between two runs, beyond their noise.
//!
//! Ratios to the reference compare across days; absolute figures do so only where there is no reference (and hosts
//! drift). A change counts when the middle halves of both runs' rounds do not touch, and it is more than the
//! threshold.
#![forbid(unsafe_code)]

use std::fmt::Write;

use anyhow::{Result, bail};

use crate::args::CompareArgs;
use crate::results::{Better, Results, Role, Series};
use crate::stats::Spread;

/// What became of one figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Within the noise, or below the threshold.
    Same,
    /// Better.
    Better,
    /// Worse: a regression.
    Worse,
    /// Different, where neither way is better.
    Other,
}

/// One line of the comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Scenario, cell, subject, metric.
    pub what: String,
    /// Ratios, or the figures themselves.
    pub ratios: bool,
    /// Median before.
    pub before: f64,
    /// Median after.
    pub after: f64,
    /// What of it.
    pub change: Change,
}

/// Prints it; false on a regression.
pub fn run(args: &CompareArgs) -> Result<bool> {
    let (before, after) = (Results::read(&args.before)?, Results::read(&args.after)?);
    let lines = compare(&before, &after, args.threshold / 100.0);
    if lines.is_empty() {
        bail!("the two runs have nothing in common");
    }
    if before.host != after.host {
        println!("The hosts differ, or were set up differently: ratios compare, figures do not.");
        println!(
            "  before: {}\n  after:  {}",
            before.host.line(),
            after.host.line()
        );
    }
    print!("{}", text(&lines));
    let worse = lines
        .iter()
        .filter(|line| line.change == Change::Worse)
        .count();
    println!(
        "{} compared, {} better, {worse} worse by more than {} % and beyond the noise",
        lines.len(),
        lines
            .iter()
            .filter(|line| line.change == Change::Better)
            .count(),
        args.threshold
    );
    Ok(worse == 0)
}

/// Everything of ours that both runs have.
pub fn compare(before: &Results, after: &Results, threshold: f64) -> Vec<Line> {
    let mut lines = Vec::new();
    for new in &after.scenarios {
        let old = before.scenarios.iter().find(|old| old.name == new.name);
        let Some(old) = old.filter(|old| old.emulated == new.emulated) else {
            continue;
        };
        for cell in &new.cells {
            let Some(then) = old.cells.iter().find(|then| then.name == cell.name) else {
                continue;
            };
            let ours = cell
                .series
                .iter()
                .filter(|series| series.role == Role::Ours);
            for series in ours {
                let Some(earlier) = then.series(&series.subject) else {
                    continue;
                };
                let same = cell.reference == then.reference;
                for metric in &new.metrics {
                    let found = figures(
                        earlier,
                        series,
                        &metric.name,
                        same && cell.reference.is_some(),
                    );
                    let Some((ratios, one, other)) = found else {
                        continue;
                    };
                    lines.push(Line {
                        what: format!(
                            "{} {} {} {}",
                            new.name, cell.name, series.subject, metric.name
                        ),
                        ratios,
                        before: one.median,
                        after: other.median,
                        change: change(one, other, metric.better, threshold),
                    });
                }
            }
        }
    }
    lines
}

/// Ratios where both have them, else the figures.
fn figures(
    one: &Series,
    other: &Series,
    metric: &str,
    ratios: bool,
) -> Option<(bool, Spread, Spread)> {
    let both = |pick: fn(&Series, &str) -> Option<Spread>| {
        Some((pick(one, metric)?, pick(other, metric)?))
    };
    let of_reference = both(|series, metric| series.ratio.get(metric).copied());
    if let Some((one, other)) = of_reference.filter(|_| ratios) {
        return Some((true, one, other));
    }
    let (one, other) = both(|series, metric| {
        let spread = series.spread.get(metric).copied();
        spread.or_else(|| Spread::of([*series.counts.get(metric)?]))
    })?;
    Some((false, one, other))
}

fn change(before: Spread, after: Spread, better: Better, threshold: f64) -> Change {
    let apart = before.high < after.low || after.high < before.low;
    let more = after.median > before.median;
    let scale = before.median.abs().max(f64::MIN_POSITIVE);
    let size = (after.median - before.median).abs() / scale;
    if !apart || size <= threshold {
        return Change::Same;
    }
    match better {
        Better::Neither => Change::Other,
        Better::More if more => Change::Better,
        Better::Less if !more => Change::Better,
        Better::More | Better::Less => Change::Worse,
    }
}

fn text(lines: &[Line]) -> String {
    let mut out = String::new();
    for line in lines {
        let mark = match line.change {
            Change::Same => "  ",
            Change::Better => "+ ",
            Change::Worse => "! ",
            Change::Other => "~ ",
        };
        let kind = if line.ratios { "of the reference" } else { "" };
        let percent = (line.after / line.before - 1.0) * 100.0;
        let percent = match percent.is_finite() {
            true => format!("{percent:+.1} %"),
            false => String::new(),
        };
        let _ = writeln!(
            out,
            "{mark}{:<56} {:>12.4} {:>12.4} {percent:>9} {kind}",
            line.what, line.before, line.after
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(numbers: [f64; 3]) -> Spread {
        Spread::of(numbers).unwrap_or_default()
    }

    #[test]
    fn what_lies_in_the_noise_has_not_changed() {
        let old = spread([95.0, 100.0, 105.0]);
        let verdict = |new, better| change(old, spread(new), better, 0.05);
        assert_eq!(verdict([85.0, 90.0, 99.0], Better::More), Change::Worse);
        assert_eq!(verdict([90.0, 93.0, 101.0], Better::More), Change::Worse);
        assert_eq!(verdict([90.0, 96.0, 101.0], Better::More), Change::Same);
        assert_eq!(verdict([60.0, 93.0, 140.0], Better::More), Change::Same);
        assert_eq!(verdict([119.0, 120.0, 121.0], Better::More), Change::Better);
        assert_eq!(verdict([119.0, 120.0, 121.0], Better::Less), Change::Worse);
        assert_eq!(
            verdict([119.0, 120.0, 121.0], Better::Neither),
            Change::Other
        );
        assert_eq!(verdict([103.9, 104.0, 104.1], Better::Less), Change::Same);
    }
}
