//! Every subject in turn, and that several times over, so that a drift of the machine meets all alike;
//! and what comes of it.
#![forbid(unsafe_code)]

use anyhow::Result;

use crate::progress::Progress;

/// What a cell is called, and what is to be reached in it.
#[derive(Clone, Debug)]
pub struct Row {
    /// What `--cell` knows it by.
    pub name: String,
    /// For the table.
    pub title: String,
    /// Share of the limit to reach.
    pub goal: Option<f64>,
    /// CPU time per request to stay below, µs.
    pub cpu_goal_us: Option<f64>,
    /// Who is to reach it.
    pub ours: &'static str,
    /// The same with io_uring for everything: a goal that it misses is met inline only.
    pub ours_by_io_uring: &'static str,
}

/// Who takes part in a cell, and how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The cell.
    pub row: Row,
    /// The subject that the others are shares of.
    pub limit: String,
    /// Names, in the order of running.
    pub subjects: Vec<String>,
    /// Runs of each.
    pub rounds: u32,
}

/// Latencies of a run.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Requests or frames a second.
    pub rate: f64,
    /// Of requests; frames have none.
    pub latency: Option<Latency>,
    /// CPU time of daemon or limit per request, kernel workers included; not known of fio.
    pub cpu_us: Option<f64>,
    /// Share of both cores that neither we nor the daemon had: somebody else was there, or the
    /// hypervisor took them. Not known of fio.
    pub lost: Option<f64>,
}

/// Counted in a run of its own.
#[derive(Clone, Copy, Debug)]
pub struct PerRequest {
    /// System calls of the daemon or of the limit.
    pub system_calls: f64,
    /// io_uring requests that went to a kernel worker.
    pub hand_offs: f64,
}

/// All runs of a subject in a cell.
#[derive(Clone, Debug)]
pub struct Series {
    /// Whose.
    pub subject: String,
    /// One per round.
    pub runs: Vec<Run>,
    /// Unless nobody counted.
    pub counts: Option<PerRequest>,
    /// Why there are no more.
    pub failure: Option<String>,
}

/// A cell with all who took part.
#[derive(Clone, Debug)]
pub struct CellResult {
    /// Which.
    pub row: Row,
    /// The subject that the others are shares of.
    pub limit: String,
    /// In the order of running.
    pub series: Vec<Series>,
}

/// Runs a plan. `run` and then `count` are called with the index of a subject; one that has failed is
/// left out from then on.
pub fn interleave(
    plan: Plan,
    progress: &mut Progress,
    mut run: impl FnMut(usize) -> Result<Run>,
    mut count: impl FnMut(usize) -> Result<Option<PerRequest>>,
) -> CellResult {
    let new = |subject: &String| Series {
        subject: subject.clone(),
        runs: Vec::new(),
        counts: None,
        failure: None,
    };
    let mut all: Vec<Series> = plan.subjects.iter().map(new).collect();
    let cell = &plan.row.name;
    for _ in 0..plan.rounds {
        for (index, series) in all.iter_mut().enumerate() {
            if series.failure.is_some() {
                progress.skip();
                continue;
            }
            let what = match run(index) {
                Ok(run) => {
                    series.runs.push(run);
                    format!("{:.0}/s", run.rate)
                }
                Err(error) => {
                    series.failure = Some(format!("{error:#}"));
                    format!("{error:#}")
                }
            };
            progress.step(&format!("{cell} {}: {what}", series.subject));
        }
    }
    for (index, series) in all.iter_mut().enumerate() {
        if series.failure.is_some() {
            progress.skip();
            continue;
        }
        match count(index) {
            Ok(None) => continue,
            Ok(counts) => series.counts = counts,
            Err(error) => series.failure = Some(format!("counting: {error:#}")),
        }
        progress.step(&format!("{cell} {}: counted", series.subject));
    }
    CellResult {
        row: plan.row,
        limit: plan.limit,
        series: all,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn all_take_turns_and_one_that_fails_is_left_out() {
        let plan = Plan {
            row: Row {
                name: "cell".to_owned(),
                title: String::new(),
                goal: None,
                cpu_goal_us: None,
                ours: "b",
                ours_by_io_uring: "",
            },
            limit: "a".to_owned(),
            subjects: ["a", "b", "c"].map(str::to_owned).to_vec(),
            rounds: 2,
        };
        let mut turns = Vec::new();
        let run = |index| {
            turns.push(index);
            if index == 1 {
                bail!("it died");
            }
            Ok(Run {
                rate: 1.0,
                latency: None,
                cpu_us: None,
                lost: None,
            })
        };
        let mut counted = Vec::new();
        let count = |index| {
            counted.push(index);
            Ok(None)
        };
        let result = interleave(plan, &mut Progress::new(6), run, count);
        assert_eq!(turns, [0, 1, 2, 0, 2]);
        assert_eq!(counted, [0, 2]);
        assert_eq!(result.series[1].failure.as_deref(), Some("it died"));
        assert_eq!(result.series[2].runs.len(), 2);
    }
}
