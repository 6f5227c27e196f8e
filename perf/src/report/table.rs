//! Tables: every subject of every cell, and the goals.
#![forbid(unsafe_code)]

use std::fmt::Write;

use crate::engine::short;
use crate::results::{CellResult, Results, ScenarioResult, Series};

/// For the terminal.
pub fn text(results: &Results) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", results.host.line());
    for noise in &results.noise {
        let _ = writeln!(out, "noise before {}: {}", noise.when, noise.line());
    }
    for absent in &results.absent {
        let _ = writeln!(out, "absent: {}: {}", absent.name, absent.why);
    }
    for scenario in &results.scenarios {
        scenario_text(&mut out, scenario);
    }
    out
}

fn scenario_text(out: &mut String, scenario: &ScenarioResult) {
    let _ = writeln!(
        out,
        "\n{}: {}",
        scenario.name.to_uppercase(),
        scenario.about
    );
    if scenario.emulated {
        let _ = writeln!(
            out,
            "In the lab, where time is emulated: only ratios and counts mean something."
        );
    }
    for cell in &scenario.cells {
        let table = grid(scenario, cell);
        let _ = write!(out, "\n{}\n{}", cell.title, aligned(&table));
        for line in below(cell) {
            let _ = writeln!(out, "  {line}");
        }
    }
    if let Some(failure) = &scenario.failure {
        let _ = writeln!(out, "not measured: {failure}");
    }
}

/// As Markdown: a table for each cell.
pub fn markdown(results: &Results) -> String {
    let mut out = format!("{}\n", results.host.line());
    for scenario in &results.scenarios {
        let _ = writeln!(out, "\n## {}: {}", scenario.name, scenario.about);
        for cell in &scenario.cells {
            let mut rows = grid(scenario, cell).into_iter();
            let head = rows.next().unwrap_or_default();
            let _ = writeln!(out, "\n{}\n\n| {} |", cell.title, head.join(" | "));
            let _ = writeln!(out, "{}|", "|---".repeat(head.len()));
            for row in rows {
                let _ = writeln!(out, "| {} |", row.join(" | "));
            }
            for line in below(cell) {
                let _ = writeln!(out, "\n{line}");
            }
        }
    }
    out
}

/// Goals, and what else there is to say of a cell.
pub(super) fn below(cell: &CellResult) -> Vec<String> {
    let mut lines = Vec::new();
    for goal in &cell.goals {
        let figure = goal.figure.map_or_else(|| "–".to_owned(), short);
        lines.push(format!(
            "goal: {} of {} {}: {figure}: {}",
            goal.metric,
            goal.subject,
            goal.goal,
            goal.verdict.text()
        ));
    }
    if let Some(why) = &cell.too_noisy {
        lines.push(format!("too noisy for a verdict: {why}"));
    }
    for series in &cell.series {
        for note in &series.notes {
            lines.push(format!("{}: {note}", series.subject));
        }
        if let Some(failure) = &series.failure {
            lines.push(format!("{} failed: {failure}", series.subject));
        }
    }
    lines
}

/// Head and rows: the subject, the first metric with its ratio and spread, then the other metrics.
pub(super) fn grid(scenario: &ScenarioResult, cell: &CellResult) -> Vec<Vec<String>> {
    let known = |name: &str| {
        cell.series
            .iter()
            .any(|series| series.median(name).is_some())
    };
    let metrics: Vec<_> = scenario
        .metrics
        .iter()
        .filter(|metric| known(&metric.name))
        .collect();
    let mut head = vec![String::new()];
    for (index, metric) in metrics.iter().enumerate() {
        head.push(format!("{}, {}", metric.name, metric.unit));
        if index == 0 && cell.reference.is_some() {
            head.push("ratio".to_owned());
            head.push("(spread)".to_owned());
        }
    }
    let mut rows = vec![head];
    for series in &cell.series {
        let mut row = vec![series.subject.clone()];
        for (index, metric) in metrics.iter().enumerate() {
            let number = series.median(&metric.name);
            row.push(number.map_or_else(|| "–".to_owned(), amount));
            if index == 0 && cell.reference.is_some() {
                row.extend(ratio(series, &metric.name));
            }
        }
        rows.push(row);
    }
    rows
}

fn ratio(series: &Series, metric: &str) -> [String; 2] {
    match series.ratio.get(metric) {
        Some(ratio) => [
            format!("{:.2}", ratio.median),
            format!("({:.2}-{:.2})", ratio.min, ratio.max),
        ],
        None => ["–".to_owned(), String::new()],
    }
}

/// Large numbers in groups of three digits.
pub(super) fn amount(number: f64) -> String {
    let digits = short(number);
    if digits.contains('.') || digits.trim_start_matches('-').len() <= 4 {
        return digits;
    }
    let (sign, digits) = match digits.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", digits.as_str()),
    };
    let mut out = sign.to_owned();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// Columns below each other: names to the left, numbers to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        out.push_str("  ");
        for (column, cell) in row.iter().enumerate() {
            let gap = widths[column] - cell.chars().count();
            match column {
                0 => out.push_str(&format!("{cell}{}", " ".repeat(gap))),
                _ => out.push_str(&format!("  {}{cell}", " ".repeat(gap))),
            }
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_are_grouped_and_small_ones_keep_their_digits() {
        assert_eq!(amount(1_234_567.0), "1\u{202f}234\u{202f}567");
        assert_eq!(amount(1234.0), "1234");
        assert_eq!(amount(0.4567), "0.46");
        assert_eq!(amount(-12_345.0), "-12\u{202f}345");
    }

    #[test]
    fn columns_stand_below_each_other() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let rows = [row(["", "rate"]), row(["ours", "1"])];
        assert_eq!(aligned(&rows), "        rate\n  ours     1\n");
    }
}
