//! Which memory is offered for merging: of the named domain only, where pages have equals, for as long as it pays.
//!
//! To withdraw memory takes its merged pages apart at once, so that is done only where [`Room`] is left for all of them, also at the end.

use std::collections::BTreeMap;

use super::{Action, Decision, History, Step, mib, part};
use crate::config::Config;
use crate::sample::{PAGE, Sample, Vm};

/// Passes of the scanner after which a VM must have brought something.
const TRIAL_PASSES: u64 = 3;
/// First wait between two comparisons.
const COMPARE_MS: u64 = 10_000;
/// Least wait, whoever has come in between.
const COMPARE_LEAST_MS: u64 = 4_000;

/// When pages are compared. That is done with all VMs of the domain at once, and each time the whole of them is read.
#[derive(Debug, Clone, Default)]
pub(super) struct Rhythm {
    at_ms: u64,
    wait_ms: u64,
    /// None before the first.
    last_ms: Option<u64>,
}

impl Rhythm {
    /// Whether it is time; a VM that was never compared starts the waits over.
    fn is_due(&mut self, at_ms: u64, is_new: bool, most_ms: u64) -> bool {
        let first_ms = COMPARE_MS.min(most_ms);
        let rested = self
            .last_ms
            .is_none_or(|last| at_ms >= last + COMPARE_LEAST_MS.min(most_ms));
        let due = rested && (is_new || at_ms >= self.at_ms);
        if due {
            self.wait_ms = match is_new {
                true => first_ms,
                false => (2 * self.wait_ms).clamp(first_ms, most_ms),
            };
            self.at_ms = at_ms + self.wait_ms;
            self.last_ms = Some(at_ms);
        }
        due
    }
}

/// Memory of the host that pages which are taken apart may fill, beyond what has to be kept.
#[derive(Debug)]
struct Room {
    left: u64,
}

impl Room {
    fn beyond(keep: u64, sample: &Sample) -> Self {
        Self {
            left: sample.host.available_bytes.saturating_sub(keep),
        }
    }

    /// Takes what a VM needs when its memory is withdrawn; `false` where there is not so much.
    fn take(&mut self, vm: &Vm) -> bool {
        let needed = apart_bytes(vm);
        let fits = needed < self.left;
        if fits {
            self.left -= needed;
        }
        fits
    }
}

/// What the pages of a VM take when they are no longer merged. A kernel that does not say may have merged all.
fn apart_bytes(vm: &Vm) -> u64 {
    vm.ksm.map_or(vm.advised_bytes, |ksm| {
        (ksm.merging_pages + ksm.zero_pages) * PAGE
    })
}

/// What is withdrawn when the tuner ends, of memory that it has offered: `ours` are process ids of such VMMs.
/// Those with least to take apart come first; the second list names those that have to stay, and why.
pub fn farewell(
    config: &Config,
    sample: &Sample,
    ours: &BTreeMap<String, u32>,
) -> (Vec<Step>, Vec<String>) {
    let keep = part(sample.host.total_bytes, config.pressure.available_low);
    let mut room = Room::beyond(keep, sample);
    let mut vms: Vec<_> = sample
        .vms
        .iter()
        .filter(|(name, vm)| vm.advised_bytes > 0 && ours.get(*name) == Some(&vm.pid))
        .collect();
    vms.sort_by_key(|(_, vm)| apart_bytes(vm));
    let (mut steps, mut stay) = (Vec::new(), Vec::new());
    for (name, vm) in vms {
        let needed = mib(apart_bytes(vm));
        let Some(domain) = &vm.domain else { continue };
        if room.take(vm) {
            let why =
                format!("the tuner ends; {needed} MiB are taken apart, for which there is room");
            steps.push(Step {
                action: all(name, domain, false),
                why,
            });
        } else {
            stay.push(format!(
                "{name}: {needed} MiB would be taken apart, and {} of {} MiB available are for that",
                mib(room.left),
                mib(sample.host.available_bytes)
            ));
        }
    }
    (steps, stay)
}

pub(super) fn advise(
    config: &Config,
    next: &mut History,
    sample: &Sample,
    decision: &mut Decision,
) {
    let mut room = Room::beyond(next.windows.room_for_storm(sample), sample);
    let mut wanted: Option<(&String, bool)> = None;
    for (name, vm) in &sample.vms {
        let (Some(domain), Some(known)) = (&vm.domain, next.vms.get_mut(name)) else {
            continue;
        };
        if config.merge.domain.as_ref() != Some(domain) {
            withdraw_foreign(config, name, (vm, domain), &mut room, decision);
            continue;
        }
        if vm.mergeable_bytes == 0 {
            continue;
        }
        if vm.advised_bytes > 0 {
            let scan = known.offered_at_scan.get_or_insert(sample.ksm.full_scans);
            let passes = sample.ksm.full_scans.saturating_sub(*scan);
            if let Some(why) = loss(vm, passes, &mut room) {
                known.dropped_until_ms = sample.at_ms + 1000 * config.merge.retry_s;
                known.offered_at_scan = None;
                known.burst_bytes = 0;
                decision.add(all(name, domain, false), why);
                continue;
            }
        }
        if sample.at_ms >= known.dropped_until_ms
            && vm.running
            && offer(config, name, vm, domain, decision)
        {
            let is_new = !known.compared;
            wanted = match wanted {
                Some((_, true)) => wanted,
                _ if is_new || wanted.is_none() => Some((name, is_new)),
                _ => wanted,
            };
        }
    }
    let Some((name, is_new)) = wanted else {
        return;
    };
    let most = 1000 * config.merge.probe_last_s;
    if next.compare.is_due(sample.at_ms, is_new, most) {
        next.vms
            .values_mut()
            .for_each(|known| known.compared = true);
        let left: u64 = sample
            .vms
            .values()
            .map(|vm| vm.mergeable_bytes.saturating_sub(vm.advised_bytes))
            .sum();
        let action = Action::Compare { vm: name.clone() };
        let why = format!("{} MiB are not offered for merging", mib(left));
        decision.add(action, why);
    }
}

fn all(name: &str, domain: &str, merge: bool) -> Action {
    Action::Advise {
        vm: name.to_owned(),
        domain: domain.to_owned(),
        merge,
        ranges: Vec::new(),
    }
}

/// One domain a host: what another one still offers is withdrawn as soon as there is room; until then nothing is scanned.
fn withdraw_foreign(
    config: &Config,
    name: &str,
    (vm, domain): (&Vm, &str),
    room: &mut Room,
    decision: &mut Decision,
) {
    if vm.advised_bytes > 0 && room.take(vm) {
        let ours = config.merge.domain.as_deref().unwrap_or("none");
        let why = format!(
            "{} MiB of domain {domain} are open to merging, and this host merges domain {ours}",
            mib(vm.advised_bytes)
        );
        decision.add(all(name, domain, false), why);
    }
}

/// Why a VM is no longer worth the book that is kept on its pages. It stays where there is no room to take it apart.
fn loss(vm: &Vm, passes: u64, room: &mut Room) -> Option<String> {
    let ksm = vm.ksm?;
    let is_loss = ksm.rmap_items > 0 && ksm.profit_bytes < 0 && passes >= TRIAL_PASSES;
    (is_loss && room.take(vm)).then(|| {
        format!(
            "after {passes} passes {} of {} pages are merged: {} KiB lost",
            ksm.merging_pages,
            ksm.rmap_items,
            -(ksm.profit_bytes >> 10)
        )
    })
}

/// Offers what was found to have equals. Whether the VM has memory of which that is not known.
fn offer(config: &Config, name: &str, vm: &Vm, domain: &str, decision: &mut Decision) -> bool {
    if vm.advised_bytes >= vm.mergeable_bytes {
        return false;
    }
    if !config.merge.compare {
        let why = format!(
            "VM {name} is of domain {domain}: all its {} MiB are offered",
            mib(vm.mergeable_bytes)
        );
        decision.add(all(name, domain, true), why);
        return false;
    }
    if let Some(runs) = &vm.compared {
        let chosen = runs.iter().filter(|run| {
            run.sampled > 0
                && f64::from(run.equal) >= config.merge.min_equal * f64::from(run.sampled)
        });
        let ranges: Vec<(u64, u64)> = chosen.map(|run| (run.start, run.len)).collect();
        if !ranges.is_empty() {
            let bytes = ranges.iter().map(|range| range.1).sum();
            let equal: u32 = runs.iter().map(|run| run.equal).sum();
            let sampled: u32 = runs.iter().map(|run| run.sampled).sum();
            let why = format!(
                "of {sampled} pages that were compared {equal} have equals; {} MiB where they do are offered",
                mib(bytes)
            );
            decision.add(
                Action::Advise {
                    vm: name.to_owned(),
                    domain: domain.to_owned(),
                    merge: true,
                    ranges,
                },
                why,
            );
        }
        return false;
    }
    true
}
