//! What was measured, as a table for people and as JSON for machines.
#![forbid(unsafe_code)]

use std::fmt::Write;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::idle::{self, Idle};
use crate::measure;
use crate::rounds::{CellResult, Latency, Run, Series};

/// Share of the cores that may go elsewhere without a word.
const DISTURBED: f64 = 0.03;
/// Private memory of an idle daemon of ours.
const MEMORY_GOAL_KIB: u64 = 3072;

/// Smallest, middle and largest of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Middle; of an even number the mean of the two middle ones.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// None without numbers.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Spread { min, median, max })
    }
}

/// A subject's runs as shares of the limit's in the same round.
pub fn shares(series: &Series, limit: &Series) -> Option<Spread> {
    let pairs = series.runs.iter().zip(&limit.runs);
    Spread::of(pairs.map(|(run, limit)| run.rate / limit.rate))
}

fn of(series: &Series, pick: impl Fn(&Run) -> f64) -> Option<Spread> {
    Spread::of(series.runs.iter().map(pick))
}

/// Median CPU time per request.
fn cpu_us(series: &Series) -> Option<f64> {
    Spread::of(series.runs.iter().filter_map(|run| run.cpu_us)).map(|spread| spread.median)
}

fn hundredths(number: Option<f64>) -> String {
    number.map_or_else(|| "–".to_owned(), |number| format!("{number:.2}"))
}

impl CellResult {
    /// The series of one subject.
    pub fn series(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.subject == name)
    }

    /// Median share of the limit of one subject.
    fn share(&self, name: &str) -> Option<f64> {
        Some(shares(self.series(name)?, self.series(&self.limit)?)?.median)
    }
}

/// An error where our own daemon has failed; that a peer has is in the table.
pub fn failures(results: &[CellResult]) -> Result<()> {
    let failed = results.iter().filter_map(|result| {
        let failure = result.series(result.row.ours)?.failure.as_ref()?;
        Some(format!(
            "{} in {}: {failure}",
            result.row.ours, result.row.name
        ))
    });
    let failed: Vec<String> = failed.collect();
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

/// Every subject of every cell.
pub fn details(results: &[CellResult]) -> String {
    let mut out = String::new();
    for result in results {
        let _ = writeln!(out, "\n{}", result.row.title);
        let _ = writeln!(
            out,
            "  {:<18} {:>9} {:>7} {:>13} {:>8} {:>8} {:>9} {:>8} {:>6} {:>6} {:>6}",
            "",
            "per s",
            "share",
            "(spread)",
            "p50 µs",
            "p99 µs",
            "p99.9 µs",
            "CPU µs",
            "calls",
            "hands",
            "lost"
        );
        for series in &result.series {
            detail(&mut out, result, series);
        }
    }
    out
}

fn detail(out: &mut String, result: &CellResult, series: &Series) {
    let _ = write!(out, "  {:<18}", series.subject);
    let Some(iops) = of(series, |run| run.rate) else {
        let why = series.failure.as_deref().unwrap_or("not run");
        let _ = writeln!(out, " failed: {why}");
        return;
    };
    let _ = write!(out, " {:>9.0}", iops.median);
    match result
        .series(&result.limit)
        .and_then(|limit| shares(series, limit))
    {
        Some(share) => {
            let spread = format!("({:.2}-{:.2})", share.min, share.max);
            let _ = write!(out, " {:>7.2} {spread:>13}", share.median);
        }
        None => {
            let _ = write!(out, " {:>7} {:>13}", "", "");
        }
    }
    let latency = |pick: fn(Latency) -> f64| {
        let all = series.runs.iter().filter_map(|run| run.latency.map(pick));
        Spread::of(all).map_or_else(|| "–".to_owned(), |spread| format!("{:.1}", spread.median))
    };
    let counts = series.counts;
    let _ = writeln!(
        out,
        " {:>8} {:>8} {:>9} {:>8} {:>6} {:>6} {:>6}",
        latency(|latency| latency.p50_us),
        latency(|latency| latency.p99_us),
        latency(|latency| latency.p999_us),
        hundredths(cpu_us(series)),
        hundredths(counts.map(|counts| counts.system_calls)),
        hundredths(counts.map(|counts| counts.hand_offs)),
        hundredths(Spread::of(series.runs.iter().filter_map(|run| run.lost)).map(|lost| lost.max))
    );
    if let Some(failure) = &series.failure {
        let _ = writeln!(out, "    then failed: {failure}");
    }
}

/// One line per cell: limit, everybody's share, the goal, and whether it was met.
pub fn summary(results: &[CellResult]) -> String {
    let Some(first) = results.first() else {
        return String::new();
    };
    let (limit, ours) = (first.limit.as_str(), first.row.ours);
    let mut names: Vec<&str> = Vec::new();
    for series in results.iter().flat_map(|result| &result.series) {
        let name = series.subject.as_str();
        if name != limit && name != ours && !names.contains(&name) {
            names.push(name);
        }
    }
    let mut out = format!("\n| cell | {limit}, per s |");
    for name in &names {
        let _ = write!(out, " {name} |");
    }
    let _ = writeln!(out, " **{ours}** | goal | |");
    out.push_str(&"|---".repeat(names.len() + 5));
    out.push_str("|\n");
    for result in results {
        let limit = result
            .series(&result.limit)
            .and_then(|limit| of(limit, |run| run.rate));
        let limit = limit.map_or_else(|| "–".to_owned(), |limit| thousands(limit.median));
        let _ = write!(out, "| {} | {limit} |", result.row.title);
        let share = |name: &str| {
            let share = result.share(name);
            share.map_or_else(|| "–".to_owned(), |share| format!("{share:.2}"))
        };
        for name in &names {
            let _ = write!(out, " {} |", share(name));
        }
        let goal = result.row.goal;
        let goal_text = goal.map_or_else(|| "–".to_owned(), |goal| format!("≥ {goal:.2}"));
        let _ = writeln!(
            out,
            " **{}** | {goal_text} | {} |",
            share(ours),
            verdict(result.share(ours), by_io_uring(result), goal)
        );
        cpu_line(&mut out, result, &names);
    }
    disturbance(&mut out, results);
    out
}

/// Says where somebody else was on the cores.
fn disturbance(out: &mut String, results: &[CellResult]) {
    let series = results.iter().flat_map(|result| &result.series);
    let lost: Vec<f64> = series
        .flat_map(|series| &series.runs)
        .filter_map(|run| run.lost)
        .collect();
    let disturbed = lost.iter().filter(|&&lost| lost > DISTURBED).count();
    if disturbed > 0 {
        let _ = writeln!(
            out,
            "\nIn {disturbed} of {} runs somebody else had more than {:.0} % of the cores: compare with care.",
            lost.len(),
            DISTURBED * 100.0
        );
    }
}

/// Daemon CPU per request, for the cells that have a goal for it.
fn cpu_line(out: &mut String, result: &CellResult, names: &[&str]) {
    let Some(goal) = result.row.cpu_goal_us else {
        return;
    };
    let cpu = |name: &str| result.series(name).and_then(cpu_us);
    let text = |name: &str| cpu(name).map_or_else(|| "–".to_owned(), |us| format!("{us:.1}"));
    let _ = write!(
        out,
        "| · CPU per request there, µs | {} |",
        text(&result.limit)
    );
    for name in names {
        let _ = write!(out, " {} |", text(name));
    }
    let met = match cpu(result.row.ours) {
        Some(us) if us <= goal => "met",
        Some(_) => "missed",
        None => "",
    };
    let _ = writeln!(
        out,
        " **{}** | ≤ {goal:.1} | {met} |",
        text(result.row.ours)
    );
}

/// Share of our daemon with io_uring for everything, where it took part.
fn by_io_uring(result: &CellResult) -> Option<f64> {
    result.share(result.row.ours_by_io_uring)
}

fn verdict(share: Option<f64>, by_io_uring: Option<f64>, goal: Option<f64>) -> &'static str {
    // Shares are printed, and goals were set, in hundredths.
    let reached = |share: f64, goal: f64| (share * 100.0).round() >= (goal * 100.0).round();
    match (share, goal) {
        (Some(share), Some(goal)) if !reached(share, goal) => "missed",
        (Some(_), Some(goal)) if by_io_uring.is_some_and(|share| !reached(share, goal)) => {
            "met inline"
        }
        (Some(_), Some(_)) => "met",
        _ => "",
    }
}

fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// What the daemons take while idle.
pub fn idle_table(idle: &[Result<Idle>]) -> String {
    if idle.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "\n| idle for {} s, frontend connected, 4 queues of 256 | CPU, ms | private memory, KiB | goal | |\n|---|---|---|---|---|\n",
        idle::WATCHED.as_secs()
    );
    for idle in idle {
        match idle {
            Ok(idle) => {
                let cpu_ms = idle.cpu.as_secs_f64() * 1000.0;
                let (goal, verdict) = if idle.subject == measure::OURS {
                    let met = idle.cpu.is_zero() && idle.private_kib <= MEMORY_GOAL_KIB;
                    ("0 ms, ≤ 3072 KiB", if met { "met" } else { "missed" })
                } else {
                    ("", "")
                };
                let _ = writeln!(
                    out,
                    "| {} | {cpu_ms:.2} | {} | {goal} | {verdict} |",
                    idle.subject, idle.private_kib
                );
            }
            Err(error) => {
                let _ = writeln!(out, "| {error:#} | – | – | | |");
            }
        }
    }
    out
}

/// Everything.
pub fn as_json(
    results: &[CellResult],
    idle: &[Result<Idle>],
    host: &Value,
    absent: &[String],
) -> Value {
    let cells: Vec<Value> = results.iter().map(cell_json).collect();
    let idle: Vec<Value> = idle.iter().map(idle_json).collect();
    json!({"host": host, "absent": absent, "cells": cells, "idle": idle})
}

fn idle_json(idle: &Result<Idle>) -> Value {
    match idle {
        Ok(idle) => json!({
            "subject": idle.subject,
            "cpu_ms": idle.cpu.as_secs_f64() * 1000.0,
            "private_kib": idle.private_kib,
        }),
        Err(error) => json!({"failure": format!("{error:#}")}),
    }
}

fn cell_json(result: &CellResult) -> Value {
    let limit = result.series(&result.limit);
    let series: Vec<Value> = result
        .series
        .iter()
        .map(|series| {
            let runs: Vec<Value> = series.runs.iter().map(run_json).collect();
            let share = limit.and_then(|limit| shares(series, limit));
            json!({
                "subject": series.subject,
                "rate": of(series, |run| run.rate).map(spread_json),
                "share_of_limit": share.map(spread_json),
                "runs": runs,
                "system_calls_per_request": series.counts.map(|counts| counts.system_calls),
                "hand_offs_per_request": series.counts.map(|counts| counts.hand_offs),
                "failure": series.failure,
            })
        })
        .collect();
    json!({
        "name": result.row.name,
        "limit": result.limit,
        "goal_share": result.row.goal,
        "goal_cpu_us": result.row.cpu_goal_us,
        "subjects": series,
    })
}

fn spread_json(spread: Spread) -> Value {
    json!({"min": spread.min, "median": spread.median, "max": spread.max})
}

fn run_json(run: &Run) -> Value {
    json!({
        "rate": run.rate,
        "p50_us": run.latency.map(|latency| latency.p50_us),
        "p99_us": run.latency.map(|latency| latency.p99_us),
        "p999_us": run.latency.map(|latency| latency.p999_us),
        "cpu_us": run.cpu_us,
        "lost": run.lost,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::Row;

    const OURS: &str = "ours";

    fn series(subject: &str, rates: &[f64]) -> Series {
        let run = |&rate: &f64| Run {
            rate,
            latency: None,
            cpu_us: Some(7.0),
            lost: Some(0.01),
        };
        Series {
            subject: subject.to_owned(),
            runs: rates.iter().map(run).collect(),
            counts: None,
            failure: None,
        }
    }

    fn result(ours: &[f64]) -> CellResult {
        CellResult {
            row: Row {
                name: "qd32".to_owned(),
                title: "zram QD32".to_owned(),
                goal: Some(0.95),
                cpu_goal_us: Some(6.0),
                ours: OURS,
                ours_by_io_uring: "by io_uring",
            },
            limit: "loop-io_uring".to_owned(),
            series: vec![
                series("loop-io_uring", &[100_000.0, 200_000.0, 100_000.0]),
                series(OURS, ours),
                series("peer", &[50_000.0]),
            ],
        }
    }

    #[test]
    fn shares_are_taken_round_by_round() {
        let result = result(&[90_000.0, 190_000.0, 100_000.0]);
        let share = shares(&result.series[1], &result.series[0]).unwrap();
        assert_eq!((share.min, share.median, share.max), (0.9, 0.95, 1.0));
        assert_eq!(result.share("peer"), Some(0.5));
        assert_eq!(result.share("nobody"), None);
    }

    #[test]
    fn the_summary_says_met_or_missed() {
        let met = summary(&[result(&[95_000.0, 190_000.0, 95_000.0])]);
        let line = "| zram QD32 | 100 000 | 0.50 | **0.95** | ≥ 0.95 | met |";
        assert!(met.contains(line), "{met}");
        assert!(
            met.contains("| 7.0 | 7.0 | **7.0** | ≤ 6.0 | missed |"),
            "{met}"
        );
        let mut inline = result(&[95_000.0, 190_000.0, 95_000.0]);
        inline
            .series
            .push(series("by io_uring", &[90_000.0, 180_000.0, 90_000.0]));
        let text = summary(&[inline.clone()]);
        assert!(text.contains("**0.95** | ≥ 0.95 | met inline |"), "{text}");
        inline.series[3] = series("by io_uring", &[99_000.0]);
        assert!(summary(&[inline]).contains("| ≥ 0.95 | met |"));
        let missed = summary(&[result(&[94_000.0, 188_000.0, 94_000.0])]);
        assert!(missed.contains("**0.94** | ≥ 0.95 | missed |"), "{missed}");
    }

    #[test]
    fn runs_that_others_disturbed_are_told_of() {
        let mut disturbed = result(&[95_000.0, 190_000.0, 95_000.0]);
        assert!(!summary(&[disturbed.clone()]).contains("somebody else"));
        disturbed.series[1].runs[2].lost = Some(0.2);
        let text = summary(&[disturbed]);
        assert!(text.contains("In 1 of 7 runs somebody else"), "{text}");
    }

    #[test]
    fn a_subject_that_failed_says_why() {
        let mut broken = result(&[]);
        broken.series[1].failure = Some("it died".to_owned());
        assert!(details(&[broken.clone()]).contains("failed: it died"));
        let error = failures(&[result(&[1.0]), broken]).unwrap_err().to_string();
        assert_eq!(error, "ours in qd32: it died");
        assert!(failures(&[result(&[1.0])]).is_ok());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let spread = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 4.0));
        assert_eq!(Spread::of([]), None);
    }
}
