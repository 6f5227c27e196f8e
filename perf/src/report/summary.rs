//! The main table and the main picture: one row for each cell, ours beside the best peer and the reference.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::page::escape;
use super::table::amount;
use crate::results::{Better, CellResult, Results, Role, ScenarioResult, Series, Verdict};
use crate::stats::Spread;
use crate::verdict::timed;

/// One subject's headline.
struct Entry<'a> {
    name: &'a str,
    number: f64,
    ratio: Option<Spread>,
}

/// One cell.
struct Row<'a> {
    scenario: &'a ScenarioResult,
    cell: &'a CellResult,
    metric: &'a str,
    unit: &'a str,
    reference: Option<Entry<'a>>,
    ours: Entry<'a>,
    peer: Option<Entry<'a>>,
}

fn entry<'a>(series: &'a Series, metric: &str) -> Option<Entry<'a>> {
    Some(Entry {
        name: &series.subject,
        number: series.median(metric)?,
        ratio: series.ratio.get(metric).copied(),
    })
}

fn rows(results: &Results) -> Vec<Row<'_>> {
    let cells = results
        .scenarios
        .iter()
        .flat_map(|scenario| scenario.cells.iter().map(move |cell| (scenario, cell)));
    cells
        .filter_map(|(scenario, cell)| row(scenario, cell))
        .collect()
}

fn row<'a>(scenario: &'a ScenarioResult, cell: &'a CellResult) -> Option<Row<'a>> {
    let ours = cell
        .series
        .iter()
        .find(|series| series.role == Role::Ours)?;
    let metric = scenario
        .metrics
        .iter()
        .find(|metric| ours.median(&metric.name).is_some())?;
    let peers = cell
        .series
        .iter()
        .filter(|series| series.role == Role::Peer);
    let mut peers: Vec<Entry> = peers
        .filter_map(|series| entry(series, &metric.name))
        .collect();
    peers.sort_by(|one, other| match metric.better {
        Better::More => other.number.total_cmp(&one.number),
        Better::Less | Better::Neither => one.number.total_cmp(&other.number),
    });
    let reference = cell.reference.as_ref().and_then(|name| cell.series(name));
    Some(Row {
        scenario,
        cell,
        metric: &metric.name,
        unit: &metric.unit,
        reference: reference.and_then(|series| entry(series, &metric.name)),
        ours: entry(ours, &metric.name)?,
        peer: peers.into_iter().next(),
    })
}

impl Row<'_> {
    /// A number, unless it is a time of the lab.
    fn number(&self, entry: &Entry) -> String {
        match self.scenario.emulated && timed(self.unit) {
            true => "·".to_owned(),
            false => format!("{} {}", amount(entry.number), self.unit),
        }
    }

    fn text(&self, entry: Option<&Entry>, named: bool) -> String {
        let Some(entry) = entry else {
            return "–".to_owned();
        };
        let mut text = self.number(entry);
        if let Some(ratio) = entry.ratio.filter(|_| {
            self.reference
                .as_ref()
                .is_some_and(|of| of.name != entry.name)
        }) {
            let _ = write!(
                text,
                " · {:.2} ({:.2}–{:.2})",
                ratio.median, ratio.min, ratio.max
            );
        }
        match named {
            true => format!("{}: {text}", entry.name),
            false => text,
        }
    }

    /// What became of the goals of this metric.
    fn verdicts(&self) -> String {
        let goals = self
            .cell
            .goals
            .iter()
            .filter(|goal| goal.metric == self.metric);
        let texts: Vec<String> = goals
            .map(|goal| match goal.verdict {
                Verdict::NotMeasured => goal.goal.clone(),
                verdict => format!("{}: {}", goal.goal, verdict.text()),
            })
            .collect();
        match texts.is_empty() {
            true => "–".to_owned(),
            false => texts.join("; "),
        }
    }
}

/// As Markdown; nothing where nothing of ours was measured.
pub(super) fn table(results: &Results) -> String {
    let rows = rows(results);
    if rows.is_empty() {
        return String::new();
    }
    let mut out =
        "| | reference | **ours** | best peer | goal |\n|---|---|---|---|---|\n".to_owned();
    for row in rows {
        let _ = writeln!(
            out,
            "| {} · {} | {} | **{}** | {} | {} |",
            row.scenario.name,
            row.cell.title,
            row.text(row.reference.as_ref(), true),
            row.text(Some(&row.ours), false),
            row.text(row.peer.as_ref(), true),
            row.verdicts()
        );
    }
    out.push_str("\nMedians; behind the dot the ratio to the reference in the same round (smallest–largest). · in place of a number: emulated time.\n");
    out
}

const WIDTH: f64 = 760.0;
const ROW: f64 = 34.0;
const LEFT: f64 = 280.0;
/// What a full bar is.
const MOST: f64 = 1.5;

/// Rates as shares of the limit, as a picture of its own.
pub(super) fn picture(results: &Results) -> String {
    let rows = rows(results);
    let rows: Vec<&Row> = rows
        .iter()
        .filter(|row| {
            let limit = row
                .reference
                .as_ref()
                .and_then(|of| row.cell.series(of.name));
            row.unit.ends_with("/s") && limit.is_some_and(|series| series.role == Role::Limit)
        })
        .collect();
    let height = 64.0 + ROW * rows.len() as f64;
    let x = |ratio: f64| LEFT + ratio.clamp(0.0, MOST) / MOST * (WIDTH - LEFT - 48.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\" font-weight=\"700\" fill=\"#1b1f24\">Rate as a share of the limit with no virtio between</text>\n\
         <rect x=\"10\" y=\"32\" width=\"12\" height=\"8\" fill=\"#c2410c\"/><text x=\"26\" y=\"41\" fill=\"#1b1f24\">ours</text>\n\
         <rect x=\"70\" y=\"32\" width=\"12\" height=\"8\" fill=\"#4b7aa8\"/><text x=\"86\" y=\"41\" fill=\"#1b1f24\">best peer here</text>\n\
         <text x=\"{:.0}\" y=\"41\" text-anchor=\"middle\" fill=\"#5b6470\">limit</text>\n",
        x(1.0)
    );
    for (index, row) in rows.iter().enumerate() {
        let top = 54.0 + index as f64 * ROW;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"#1b1f24\">{}</text>",
            LEFT - 8.0,
            top + 15.0,
            escape(&row.cell.title)
        );
        for (offset, entry, colour) in [
            (0.0, Some(&row.ours), "#c2410c"),
            (12.0, row.peer.as_ref(), "#4b7aa8"),
        ] {
            let Some(ratio) = entry.and_then(|entry| entry.ratio) else {
                continue;
            };
            let y = top + offset;
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"10\" fill=\"{colour}\"/>\
                 <path d=\"M{:.1} {}H{:.1}\" stroke=\"#1b1f24\"/><text x=\"{:.1}\" y=\"{}\" font-size=\"11\" fill=\"#1b1f24\">{:.2}</text>",
                x(ratio.median) - LEFT,
                x(ratio.min),
                y + 5.0,
                x(ratio.max),
                x(ratio.max.max(ratio.median)) + 4.0,
                y + 9.0,
                ratio.median
            );
        }
    }
    let _ = writeln!(
        out,
        "<path d=\"M{0:.1} 46V{1}\" stroke=\"#5b6470\" stroke-dasharray=\"4 3\"/>\n</svg>",
        x(1.0),
        height - 8.0
    );
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::results::MetricInfo;

    fn series(subject: &str, role: Role, rate: f64, ratio: f64) -> Series {
        let spread = |number| BTreeMap::from([("rate".to_owned(), Spread::of([number]).unwrap())]);
        Series {
            subject: subject.to_owned(),
            role,
            spread: spread(rate),
            ratio: spread(ratio),
            ..Series::default()
        }
    }

    fn results(emulated: bool) -> Results {
        let cell = CellResult {
            title: "QD1".to_owned(),
            reference: Some("tap".to_owned()),
            series: vec![
                series("tap", Role::Limit, 100.0, 1.0),
                series("ours", Role::Ours, 90.0, 0.9),
                series("slow", Role::Peer, 20.0, 0.2),
                series("fast", Role::Peer, 50.0, 0.5),
            ],
            ..CellResult::default()
        };
        let metric = MetricInfo {
            name: "rate".to_owned(),
            unit: "1/s".to_owned(),
            better: Better::More,
            ..MetricInfo::default()
        };
        Results {
            scenarios: vec![ScenarioResult {
                name: "net".to_owned(),
                emulated,
                metrics: vec![metric],
                cells: vec![cell],
                ..ScenarioResult::default()
            }],
            ..Results::default()
        }
    }

    #[test]
    fn a_row_has_the_best_peer_and_no_speeds_of_the_lab() {
        let text = table(&results(false));
        let line = "| net · QD1 | tap: 100 1/s | **90.0 1/s · 0.90 (0.90–0.90)** | fast: 50.0 1/s · 0.50 (0.50–0.50) | – |";
        assert!(text.contains(line), "{text}");
        assert!(table(&results(true)).contains("| tap: · | **· · 0.90 (0.90–0.90)** |"));
        assert_eq!(table(&Results::default()), "");
    }

    #[test]
    fn the_picture_has_two_bars_a_row() {
        let picture = picture(&results(false));
        assert!(
            picture.contains(">0.90<") && picture.contains(">0.50<") && !picture.contains(">0.20<")
        );
    }
}
