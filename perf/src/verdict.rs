//! Goals beside their figures. Who does not know says so: a run that was disturbed, or whose rounds lie on both
//! sides of a goal, has no verdict.
#![forbid(unsafe_code)]

use crate::engine::pairs;
use crate::results::{CellResult, GoalResult, Role, ScenarioResult, Series, Verdict};
use crate::scenario::{Better, Bound, Cell, Goal, Metric, Of};
use crate::stats::Spread;

/// Share of the cores that may go elsewhere in a run. The kernel's own threads take up to 0.07 on a file.
pub const DISTURBED: f64 = 0.10;
/// Rounds whose middle half is narrower than this are clear enough, on whichever side they lie.
const CLEAR: f64 = 0.05;

/// Why nothing can be said of a cell, if so: somebody else was on the cores.
pub fn disturbed(cell: &CellResult) -> Option<String> {
    let judged = |series: &&Series| {
        series.role == Role::Ours || cell.reference.as_ref() == Some(&series.subject)
    };
    let lost = cell
        .series
        .iter()
        .filter(judged)
        .filter_map(|series| series.lost);
    let most = lost.fold(0.0, f64::max);
    (most > DISTURBED).then(|| format!("somebody else had {:.0} % of the cores", most * 100.0))
}

/// Fills in the goals of a cell.
pub fn judge(result: &mut CellResult, cell: &Cell, metrics: &[Metric]) {
    let mut goals = Vec::new();
    for goal in &cell.goals {
        let ours = result
            .series
            .iter()
            .filter(|series| series.role == Role::Ours);
        for series in ours {
            goals.push(judged(result, series, goal, metrics));
        }
    }
    result.goals = goals;
}

/// A look at the host before and after found too much: nothing that is timed in this scenario has a verdict.
pub fn withdraw(scenario: &mut ScenarioResult, why: &str) {
    for cell in &mut scenario.cells {
        cell.too_noisy.get_or_insert_with(|| why.to_owned());
        for goal in &mut cell.goals {
            let metric = scenario
                .metrics
                .iter()
                .find(|metric| metric.name == goal.metric);
            let unit = metric.map(|metric| metric.unit.as_str());
            let decided = matches!(goal.verdict, Verdict::Met | Verdict::Missed);
            if decided && unit.is_some_and(timed) {
                goal.verdict = Verdict::TooNoisy;
            }
        }
    }
}

/// Whether numbers of this unit depend on what else the host does; counts and memory do not.
pub fn timed(unit: &str) -> bool {
    matches!(unit, "ns" | "us" | "µs" | "ms" | "s") || unit.ends_with("/s")
}

fn judged(result: &CellResult, series: &Series, goal: &Goal, metrics: &[Metric]) -> GoalResult {
    let metric = metrics.iter().find(|metric| metric.name == goal.metric);
    let better = metric.map(|metric| metric.better).unwrap_or_default();
    let unit = metric.map_or("", |metric| metric.unit);
    let other = match goal.of {
        Of::Itself => None,
        Of::Limit => result
            .reference
            .as_ref()
            .and_then(|name| result.series(name)),
        Of::BestPeer => best_peer(result, goal.metric, better),
    };
    let numbers = numbers(series, goal, other);
    let spread = Spread::of(numbers);
    GoalResult {
        subject: series.subject.clone(),
        metric: goal.metric.to_owned(),
        goal: text(goal, other, unit),
        figure: spread.map(|spread| spread.median),
        from_to: spread.map(|spread| [spread.low, spread.high]),
        verdict: match spread {
            None => Verdict::NotMeasured,
            Some(_) if timed(unit) && result.too_noisy.is_some() => Verdict::TooNoisy,
            Some(spread) => decide(spread, goal),
        },
    }
}

fn numbers(series: &Series, goal: &Goal, other: Option<&Series>) -> Vec<f64> {
    let samples = |series: &Series| -> Vec<Option<f64>> {
        match series.samples.get(goal.metric) {
            Some(samples) => samples.clone(),
            None => vec![series.counts.get(goal.metric).copied()],
        }
    };
    match (goal.of, other) {
        (Of::Itself, _) => samples(series).into_iter().flatten().collect(),
        (_, Some(other)) => pairs(&samples(series), &samples(other)),
        (_, None) => Vec::new(),
    }
}

fn best_peer<'a>(result: &'a CellResult, metric: &str, better: Better) -> Option<&'a Series> {
    let peers = result
        .series
        .iter()
        .filter(|series| series.role == Role::Peer);
    let known = peers.filter_map(|peer| Some((peer.median(metric)?, peer)));
    let order = |one: &(f64, &Series), other: &(f64, &Series)| one.0.total_cmp(&other.0);
    let best = match better {
        Better::More => known.max_by(order),
        Better::Less | Better::Neither => known.min_by(order),
    };
    best.map(|(_, peer)| peer)
}

fn text(goal: &Goal, other: Option<&Series>, unit: &str) -> String {
    let (word, bound) = match goal.bound {
        Bound::AtLeast(bound) => ("at least", bound),
        Bound::AtMost(bound) => ("at most", bound),
    };
    match (goal.of, other) {
        (Of::Itself, _) => format!("{word} {bound} {unit}").trim_end().to_owned(),
        (Of::Limit, Some(other)) => format!("{word} {bound} of {}", other.subject),
        (Of::Limit, None) => format!("{word} {bound} of the limit"),
        (Of::BestPeer, Some(other)) => {
            format!("{word} {bound} of the best peer ({})", other.subject)
        }
        (Of::BestPeer, None) => format!("{word} {bound} of the best peer"),
    }
}

/// Ratios are printed, and goals were set, in hundredths.
fn decide(spread: Spread, goal: &Goal) -> Verdict {
    let round = |number: f64| match goal.of {
        Of::Itself => number,
        Of::Limit | Of::BestPeer => (number * 100.0).round() / 100.0,
    };
    let reached = |number: f64| match goal.bound {
        Bound::AtLeast(bound) => round(number) >= bound,
        Bound::AtMost(bound) => round(number) <= bound,
    };
    let split = reached(spread.low) != reached(spread.high);
    match (split && spread.width() > CLEAR, reached(spread.median)) {
        (true, _) => Verdict::TooNoisy,
        (false, true) => Verdict::Met,
        (false, false) => Verdict::Missed,
    }
}
