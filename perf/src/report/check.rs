//! Whether a run is complete, and its file has the shape that readers of Cloud Hypervisor's metrics expect.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};

use crate::results::{Results, Role};

/// What was measured, in one line.
pub(super) fn check(results: &Results) -> Result<String> {
    ensure!(!results.interrupted, "it was stopped before its end");
    ensure!(
        !results.host.kernel.is_empty() && !results.noise.is_empty(),
        "it says nothing of its host"
    );
    ensure!(!results.date.is_empty(), "it has no date");
    ensure!(!results.results.is_empty(), "it has no results");
    for figure in &results.results {
        // A mean of equal numbers may be off by its last digit.
        let slack = figure.max.abs().max(figure.min.abs()) * 1e-9;
        let ordered = figure.min - slack <= figure.mean && figure.mean <= figure.max + slack;
        let sound = ordered && figure.std_dev >= 0.0 && !figure.name.is_empty();
        ensure!(sound, "a result that cannot be: {figure:?}");
    }
    let mut names: Vec<&str> = results
        .results
        .iter()
        .map(|figure| figure.name.as_str())
        .collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        anyhow::bail!("two results are called {}", twice[0]);
    }
    let mut measured = Vec::new();
    for scenario in results
        .scenarios
        .iter()
        .filter(|scenario| scenario.failure.is_none())
    {
        for cell in &scenario.cells {
            let ours = cell
                .series
                .iter()
                .filter(|series| series.role == Role::Ours);
            for series in ours {
                let silent = series.spread.is_empty() && series.counts.is_empty();
                ensure!(!silent, "{} has no figure in {}", series.subject, cell.name);
            }
        }
        measured.push(format!(
            "{} ({} cells)",
            scenario.name,
            scenario.cells.len()
        ));
    }
    ensure!(!measured.is_empty(), "no scenario was measured");
    Ok(format!("measured: {}", measured.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Noise;
    use crate::results::{Figure, ScenarioResult};

    #[test]
    fn a_complete_run_is_sound_and_one_that_was_stopped_or_lies_is_not() {
        let mut results = Results {
            date: "today".to_owned(),
            noise: vec![Noise::default()],
            results: vec![Figure {
                name: "blk".to_owned(),
                ..Figure::default()
            }],
            scenarios: vec![ScenarioResult::default()],
            ..Results::default()
        };
        results.host.kernel = "6.12".to_owned();
        assert!(check(&results).is_ok());
        let broken = |change: fn(&mut Results)| {
            let mut other = results.clone();
            change(&mut other);
            check(&other).is_err()
        };
        assert!(broken(|run| run.interrupted = true));
        assert!(broken(|run| run.results[0].mean = 7.0));
        assert!(broken(|run| run.results.push(run.results[0].clone())));
        assert!(broken(|run| run.scenarios.clear()));
    }
}
