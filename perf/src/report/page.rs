//! One page that needs nothing else: no script, no font, no picture from elsewhere. Narrow first: on a phone one
//! column, on a wide screen several.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::svg::{self, Axis, Bar, Line};
use super::table;
use crate::engine::short;
use crate::results::{CellResult, GoalResult, Results, Role, ScenarioResult, Series, Verdict};

const STYLE: &str = include_str!("style.css");

/// The page.
pub(super) fn page(results: &Results) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>berth-perf {date}</title>\n<style>\n{STYLE}</style></head><body>\n",
        date = escape(&results.date)
    );
    head(&mut out, results);
    goals(&mut out, results);
    for scenario in &results.scenarios {
        section(&mut out, scenario);
    }
    out.push_str("</body></html>\n");
    out
}

fn head(out: &mut String, results: &Results) {
    out.push_str("<h1>Berth and its peers on one host</h1>\n<p>");
    for (shown, text) in [
        (results.quick, "quick: short runs, few rounds"),
        (results.interrupted, "stopped before its end"),
        (
            results.scenarios.iter().any(|one| one.emulated),
            "partly in the lab: emulated time",
        ),
    ] {
        if shown {
            let _ = write!(out, "<span class=\"badge\">{text}</span>");
        }
    }
    let _ = writeln!(
        out,
        "{} · {}</p>\n<p class=\"soft\">{}</p>",
        escape(&results.date),
        escape(&results.git_human_readable),
        escape(&results.host.line())
    );
    out.push_str("<details><summary>host, noise, who is absent</summary>");
    for (name, text) in &results.host.mitigations {
        let _ = writeln!(
            out,
            "<p class=\"soft\">{}: {}</p>",
            escape(name),
            escape(text)
        );
    }
    for noise in &results.noise {
        let _ = writeln!(
            out,
            "<p class=\"soft\">noise before {}: {}</p>",
            escape(&noise.when),
            escape(&noise.line())
        );
    }
    for absent in &results.absent {
        let _ = writeln!(
            out,
            "<p class=\"soft\">absent: {}: {}</p>",
            escape(&absent.name),
            escape(&absent.why)
        );
    }
    out.push_str("</details>\n");
}

fn verdict(goal: &GoalResult) -> String {
    let class = match goal.verdict {
        Verdict::Met => "met",
        Verdict::Missed => "missed",
        Verdict::TooNoisy => "too-noisy",
        Verdict::NotMeasured => "not-measured",
    };
    format!("<span class=\"{class}\">{}</span>", goal.verdict.text())
}

fn goals(out: &mut String, results: &Results) {
    let mut rows = String::new();
    for scenario in &results.scenarios {
        for cell in &scenario.cells {
            for goal in &cell.goals {
                let _ = writeln!(
                    rows,
                    "<tr><td>{} · {}</td><td>{}: {}</td><td>{}</td><td>{}</td></tr>",
                    scenario.name,
                    escape(&cell.title),
                    escape(&format!("{} {}", goal.subject, goal.metric)),
                    escape(&goal.goal),
                    goal.figure.map_or_else(|| "–".to_owned(), short),
                    verdict(goal)
                );
            }
        }
    }
    if !rows.is_empty() {
        let _ = writeln!(
            out,
            "<h2>Goals</h2>\n<div class=\"wide\"><table class=\"goals\"><tr><th>where</th><th>goal</th><th>figure</th><th></th></tr>\n{rows}</table></div>"
        );
    }
}

fn section(out: &mut String, scenario: &ScenarioResult) {
    let _ = writeln!(
        out,
        "<h2 id=\"{0}\">{0}</h2>\n<p>{1}</p>",
        escape(&scenario.name),
        escape(&scenario.about)
    );
    if scenario.emulated {
        out.push_str("<p class=\"too-noisy\">In the lab, where time is emulated: only ratios and counts mean something.</p>\n");
    }
    if let Some(failure) = &scenario.failure {
        let _ = writeln!(
            out,
            "<p class=\"missed\">not measured: {}</p>",
            escape(failure)
        );
    }
    out.push_str("<div class=\"cells\">\n");
    for cell in &scenario.cells {
        let _ = writeln!(out, "<div class=\"cell\"><h3>{}</h3>", escape(&cell.title));
        bars(out, scenario, cell);
        distributions(out, cell);
        timelines(out, cell);
        for line in table::below(cell) {
            let _ = writeln!(out, "<p class=\"soft\">{}</p>", escape(&line));
        }
        numbers(out, scenario, cell);
        out.push_str("</div>\n");
    }
    out.push_str("</div>\n");
}

/// Bars of the first metric that the cell has; of every metric where it has only two or three.
fn bars(out: &mut String, scenario: &ScenarioResult, cell: &CellResult) {
    let known = scenario.metrics.iter().filter(|metric| {
        cell.series
            .iter()
            .any(|series| series.spread.contains_key(&metric.name))
    });
    let known: Vec<_> = known.collect();
    let shown = if known.len() <= 3 { known.len() } else { 1 };
    for metric in &known[..shown] {
        let bar = |series: &Series| {
            let ratio = series.ratio.get(&metric.name);
            Some(Bar {
                name: series.subject.clone(),
                role: series.role,
                spread: *series.spread.get(&metric.name)?,
                extra: ratio.map_or_else(String::new, |ratio| format!(" · {:.2}", ratio.median)),
            })
        };
        let bars: Vec<Bar> = cell.series.iter().filter_map(bar).collect();
        let of = cell
            .reference
            .as_ref()
            .map_or_else(String::new, |name| format!(" · ratio to {name}"));
        let _ = writeln!(
            out,
            "<p class=\"soft\">{}{}</p>\n{}",
            escape(if metric.about.is_empty() {
                &metric.name
            } else {
                &metric.about
            }),
            escape(&of),
            svg::bars(&bars, &metric.unit)
        );
    }
}

/// Ours gets the first colour, the others the next ones.
fn colour(series: &Series, index: usize) -> usize {
    match series.role {
        Role::Ours if series.build.unwrap_or(0) == 0 => 0,
        // 0 and 8 are the same colour, whole and dashed.
        _ if index < 7 => 1 + index,
        _ => 2 + index,
    }
}

fn distributions(out: &mut String, cell: &CellResult) {
    let with = cell
        .series
        .iter()
        .enumerate()
        .filter(|(_, series)| !series.latencies.is_empty());
    let lines: Vec<Line> = with
        .map(|(index, series)| Line {
            name: series.subject.clone(),
            colour: colour(series, index),
            points: series.latencies.clone(),
        })
        .collect();
    picture(
        out,
        "latency by share of requests, all rounds",
        &lines,
        Axis::Distribution,
        "µs",
    );
}

fn timelines(out: &mut String, cell: &CellResult) {
    let mut names: Vec<&String> = cell
        .series
        .iter()
        .flat_map(|series| series.timelines.keys())
        .collect();
    names.sort();
    names.dedup();
    for name in names {
        let line = |(index, series): (usize, &Series)| {
            Some(Line {
                name: series.subject.clone(),
                colour: colour(series, index),
                points: series.timelines.get(name)?.clone(),
            })
        };
        let lines: Vec<Line> = cell.series.iter().enumerate().filter_map(line).collect();
        picture(out, name, &lines, Axis::Time, "s");
    }
}

fn picture(out: &mut String, title: &str, lines: &[Line], axis: Axis, unit: &str) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "<p class=\"soft\">{}</p>\n{}<div class=\"legend\">",
        escape(title),
        svg::lines(lines, axis, unit)
    );
    for line in lines {
        let _ = write!(
            out,
            "<span><i class=\"{}\"></i>{}</span>",
            line.class(),
            escape(&line.name)
        );
    }
    out.push_str("</div>\n");
}

fn numbers(out: &mut String, scenario: &ScenarioResult, cell: &CellResult) {
    out.push_str("<details><summary>all numbers</summary><div class=\"wide\"><table>");
    for (index, row) in table::grid(scenario, cell).iter().enumerate() {
        let tag = if index == 0 { "th" } else { "td" };
        out.push_str("<tr>");
        for text in row {
            let _ = write!(out, "<{tag}>{}</{tag}>", escape(text));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div></details>\n");
}

/// Text that stands for itself in HTML.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::results::MetricInfo;
    use crate::stats::Spread;

    fn results() -> Results {
        let series = Series {
            subject: "<ours>".to_owned(),
            role: Role::Ours,
            spread: BTreeMap::from([("rate".to_owned(), Spread::of([1.0, 2.0]).unwrap())]),
            latencies: vec![[0.5, 10.0], [0.99, 50.0]],
            timelines: BTreeMap::from([("saved MiB".to_owned(), vec![[0.0, 1.0], [9.0, 4.0]])]),
            ..Series::default()
        };
        let cell = CellResult {
            title: "a & b".to_owned(),
            series: vec![series],
            goals: vec![GoalResult::default()],
            ..CellResult::default()
        };
        Results {
            scenarios: vec![ScenarioResult {
                name: "blk".to_owned(),
                emulated: true,
                metrics: vec![MetricInfo {
                    name: "rate".to_owned(),
                    ..MetricInfo::default()
                }],
                cells: vec![cell],
                ..ScenarioResult::default()
            }],
            ..Results::default()
        }
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_shows_all_kinds_of_pictures() {
        let page = page(&results());
        assert_eq!(page.matches("<svg").count(), 3, "{page}");
        assert!(
            page.contains("&lt;ours&gt;") && page.contains("a &amp; b") && !page.contains("<ours>")
        );
        assert!(page.contains("time is emulated") && page.contains("not measured"));
        for outside in ["http:", "https:", "<script", "src=", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
