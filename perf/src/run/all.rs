//! All scenarios of a run, one after another, with what was measured always on disk.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::one::{Names, blank, measure, names};
use crate::args::RunArgs;
use crate::choose::Chosen;
use crate::context::Context;
use crate::engine::Order;
use crate::host::Noise;
use crate::interrupt;
use crate::lab;
use crate::progress::Progress;
use crate::results::{Results, ScenarioResult};
use crate::verdict;

/// Results on their way to disk.
pub(super) struct Keeper<'a> {
    pub(super) results: &'a mut Results,
    pub(super) out: &'a Path,
    pub(super) stream: bool,
}

impl Keeper<'_> {
    /// Writes what there is, with a scenario that is not through yet.
    fn keep(&self, scenario: &ScenarioResult, names: &Names) -> Result<()> {
        let mut results = self.results.clone();
        results.interrupted = true;
        results.add(scenario.clone(), names);
        self.write(&results)
    }

    fn write(&self, results: &Results) -> Result<()> {
        if self.stream {
            let json = serde_json::to_string(results).context("results as JSON")?;
            println!("{}{json}", lab::RESULTS);
        }
        results.write(self.out)
    }
}

/// Measures all that was chosen; guests in the lab where this host runs none.
pub(super) fn measure_all(
    args: &RunArgs,
    chosen: &[Chosen],
    context: &mut Context,
    keeper: &mut Keeper,
) -> Result<()> {
    let order = Order {
        subjects: wanted(args),
        reference: args.limit.clone(),
        rounds: args.rounds,
        quick: args.quick,
        count: !args.no_counts,
    };
    let (guests, others): (Vec<&Chosen>, Vec<&Chosen>) =
        chosen.iter().partition(|one| lab::needs_guests(one));
    let place = match guests.is_empty() {
        true => Ok(false),
        false => lab::wanted(args, context),
    };
    let here: Vec<&Chosen> = match place {
        Ok(false) => chosen.iter().collect(),
        _ => others,
    };
    let mut progress = Progress::default();
    let cpus = [context.client_cpu, context.daemon_cpu];
    for (index, one) in here.iter().enumerate() {
        if interrupt::requested() {
            break;
        }
        let later = here[index + 1..]
            .iter()
            .map(|next| (next.entry.expected)(args.quick));
        progress.begin(one.entry.name, 0, later.sum());
        let noise = Noise::look(one.entry.name, &cpus)?;
        progress.say(&noise.line());
        keeper.results.noise.push(noise);
        let names = names(one);
        let scenario = measure(one, context, &order, &mut progress, &|scenario| {
            keeper.keep(scenario, &names)
        });
        progress.clear();
        add(keeper, scenario, &names)?;
    }
    if let Err(error) = &place {
        for one in &guests {
            let failed = ScenarioResult {
                failure: Some(format!("{error:#}")),
                ..blank(one, false)
            };
            add(keeper, failed, &Names::new())?;
        }
    } else if here.len() < chosen.len() && !interrupt::requested() {
        in_lab(args, &guests, context, &mut progress, keeper)?;
    }
    keeper.results.noise.push(Noise::look("after all", &cpus)?);
    keeper.results.withdraw();
    keeper.write(keeper.results)
}

fn add(keeper: &mut Keeper, scenario: ScenarioResult, names: &Names) -> Result<()> {
    if let Some(failure) = &scenario.failure {
        eprintln!("not measured: {}: {failure}", scenario.name);
    }
    keeper.results.add(scenario, names);
    keeper.write(keeper.results)
}

/// Adds what the lab tells. What it could not measure says so.
fn in_lab(
    args: &RunArgs,
    guests: &[&Chosen],
    context: &mut Context,
    progress: &mut Progress,
    keeper: &mut Keeper,
) -> Result<()> {
    progress.begin("lab", 0, Duration::ZERO);
    progress.say("booting");
    let before = keeper.results.clone();
    let outcome = lab::run(args, guests, context, progress, |inside| {
        let mut all = before.clone();
        all.interrupted = true;
        all.take_in(inside);
        keeper.write(&all)?;
        *keeper.results = all;
        Ok(())
    });
    progress.clear();
    keeper.results.interrupted = false;
    if let Err(error) = outcome {
        for one in guests {
            let there = keeper
                .results
                .scenarios
                .iter()
                .any(|done| done.name == one.entry.name);
            if !there {
                let failed = ScenarioResult {
                    failure: Some(format!("{error:#}")),
                    ..blank(one, true)
                };
                add(keeper, failed, &Names::new())?;
            }
        }
    }
    Ok(())
}

/// `--subject`, with `--variant`, which is wanted where it is named.
fn wanted(args: &RunArgs) -> Vec<String> {
    let mut wanted = args.subject.clone();
    if !wanted.is_empty() {
        wanted.extend(args.variant.iter().map(|variant| variant.name.clone()));
    }
    wanted
}

impl Results {
    /// Adds what was measured in the lab.
    fn take_in(&mut self, inside: &Results) {
        self.results.extend(inside.results.iter().cloned());
        self.scenarios.extend(inside.scenarios.iter().cloned());
        self.absent.extend(inside.absent.iter().cloned());
    }

    /// Takes back the verdicts of scenarios before or after which the host was too noisy.
    fn withdraw(&mut self) {
        let looks: Vec<Noise> = self.noise.clone();
        for scenario in &mut self.scenarios {
            let Some(at) = looks.iter().position(|look| look.when == scenario.name) else {
                continue;
            };
            let around = looks[at..].iter().take(2);
            if let Some(look) = around.clone().find(|look| look.too_noisy()) {
                verdict::withdraw(scenario, &look.line());
            }
        }
    }
}
