//! One scenario, on a thread of its own, which it may move to other namespaces and pin; its daemons die with it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::choose::Chosen;
use crate::context::Context;
use crate::engine::{self, Order};
use crate::interrupt;
use crate::peers;
use crate::progress::Progress;
use crate::results::{MetricInfo, ScenarioResult};
use crate::scenario::{Entry, Metric, Need};
use crate::sys;

/// Cloud Hypervisor's names by cell and metric.
pub(super) type Names = BTreeMap<(String, String), String>;

/// Those of a scenario.
pub(super) fn names(one: &Chosen) -> Names {
    let mut names = BTreeMap::new();
    for cell in &one.cells {
        for (metric, theirs) in &cell.names {
            let key = (cell.name.clone(), (*metric).to_owned());
            names.insert(key, (*theirs).to_owned());
        }
    }
    names
}

/// A result without any yet.
pub(super) fn blank(one: &Chosen, emulated: bool) -> ScenarioResult {
    ScenarioResult {
        name: one.entry.name.to_owned(),
        about: one.entry.about.to_owned(),
        emulated,
        metrics: one.entry.metrics.iter().map(Metric::info).collect(),
        ..ScenarioResult::default()
    }
}

/// After every cell.
pub(super) type Keep<'a> = &'a (dyn Fn(&ScenarioResult) -> Result<()> + Sync);

/// One scenario on a thread of its own. Whatever fails is in the result.
pub(super) fn measure(
    one: &Chosen,
    context: &mut Context,
    order: &Order,
    progress: &mut Progress,
    keep: Keep,
) -> ScenarioResult {
    let mut result = blank(one, context.in_lab);
    let outcome = lacking(one.entry).and_then(|()| {
        let result = &mut result;
        std::thread::scope(|scope| {
            let work = move || cells(one, context, order, progress, (result, keep));
            let thread = std::thread::Builder::new().name(one.entry.name.to_owned());
            let thread = thread.spawn_scoped(scope, work)?;
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow!("it panicked")))
        })
    });
    if let Err(error) = outcome {
        result.failure = Some(format!("{error:#}"));
    }
    result
}

fn cells(
    one: &Chosen,
    context: &mut Context,
    order: &Order,
    progress: &mut Progress,
    (result, keep): (&mut ScenarioResult, Keep),
) -> Result<()> {
    context.cells.clone_from(&one.cells);
    progress.say("preparing");
    let mut scenario = (one.entry.prepare)(context)?;
    let subjects = scenario.subjects();
    let there = |name: &String| subjects.iter().any(|subject| subject.name == *name);
    if let Some(limit) = order.reference.as_ref().filter(|name| !there(name)) {
        let names: Vec<&str> = subjects
            .iter()
            .map(|subject| subject.name.as_str())
            .collect();
        bail!("{}", peers::unknown("subject", limit, &names));
    }
    if !order.subjects.is_empty() && !order.subjects.iter().any(there) {
        let names: Vec<&str> = subjects
            .iter()
            .map(|subject| subject.name.as_str())
            .collect();
        bail!("{}", peers::unknown("subject", &order.subjects[0], &names));
    }
    let steps = |cell| engine::steps(scenario.as_ref(), &subjects, cell, order);
    let total = one.cells.iter().map(steps).sum();
    progress.total(total);
    for cell in &one.cells {
        if interrupt::requested() {
            break;
        }
        let scenario = scenario.as_mut();
        let metrics = one.entry.metrics;
        let cell = engine::cell(scenario, &subjects, cell, metrics, order, progress);
        result.cells.push(cell);
        keep(result)?;
    }
    Ok(())
}

/// An error that says what is missing and how to get it.
fn lacking(entry: &Entry) -> Result<()> {
    for need in entry.needs {
        match need {
            Need::Root if !sys::is_root() => {
                bail!("needs the rights of the superuser: run it as root")
            }
            Need::Kvm | Need::Guest => {
                let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
                kvm.context("needs /dev/kvm (load the module kvm, join the group kvm)")?;
            }
            Need::Tool { program, how } if peers::on_path(program).is_none() => {
                bail!("no {program}: {how}");
            }
            Need::Root | Need::Tool { .. } => {}
        }
    }
    Ok(())
}

impl Metric {
    fn info(&self) -> MetricInfo {
        MetricInfo {
            name: self.name.to_owned(),
            unit: self.unit.to_owned(),
            better: self.better,
            about: self.about.to_owned(),
        }
    }
}
