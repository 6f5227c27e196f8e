//! Balloons and reclaim. A guest that is short comes before everything; then the host; then what guests may have back.
//!
//! ```text
//!   guest stalls, scans, kills, < guest_low ──▶ deflate now, no inflating for calm_s
//!   PRESSURE ──▶ inflate those with most to spare ── nobody has any ──▶ memory.reclaim
//!   plenty for a minute ──▶ deflate a step at a time
//! ```

use super::{Action, Decision, History, State, Step, mib, part};
use crate::config::Config;
use crate::sample::{Balloon, GuestMemory, Sample, Vm};

/// Steps that a guest which is short gets back at least.
const RELIEF_STEPS: f64 = 4.0;
/// Inflating begins after this much of PRESSURE, unless it is bad: merging may be enough.
const PATIENCE_MS: u64 = 3_000;
/// Reclaim begins after this much.
const RECLAIM_AFTER_MS: u64 = 5_000;
/// Guests get memory back after this much without PRESSURE.
const PLENTY_MS: u64 = 60_000;
/// Less than this is not worth a step.
const LEAST_BYTES: u64 = 4 << 20;

pub(super) fn adjust(
    config: &Config,
    next: &mut History,
    last: Option<&Sample>,
    sample: &Sample,
    decision: &mut Decision,
) {
    if config.balloon.enabled {
        relieve(config, next, last, sample, decision);
    }
    let short_for = sample.at_ms.saturating_sub(next.since_ms);
    if next.state == State::Pressure {
        let before = decision.steps.len();
        let bad = sample.host.available_bytes
            < part(sample.host.total_bytes, config.pressure.available_low / 2.0);
        if config.balloon.enabled && (short_for >= PATIENCE_MS || bad) {
            inflate(config, next, sample, decision);
        }
        if config.reclaim.enabled && decision.steps.len() == before && short_for >= RECLAIM_AFTER_MS
        {
            reclaim(config, last, sample, decision);
        }
    } else if config.balloon.enabled && short_for >= PLENTY_MS {
        give_back(config, sample, decision);
    }
}

/// Guests that are short of memory and have a balloon get some of it back now.
fn relieve(
    config: &Config,
    next: &mut History,
    last: Option<&Sample>,
    sample: &Sample,
    decision: &mut Decision,
) {
    for (name, vm) in &sample.vms {
        let Some((balloon, guest)) = with_guest(vm) else {
            continue;
        };
        let before = last
            .and_then(|last| last.vms.get(name))
            .filter(|before| before.pid == vm.pid)
            .and_then(|before| before.balloon?.guest);
        let Some(trouble) = trouble(config, before, guest) else {
            continue;
        };
        if let Some(known) = next.vms.get_mut(name) {
            known.calm_until_ms = sample.at_ms + 1000 * config.balloon.calm_s;
        }
        if balloon.target_bytes == 0 {
            continue;
        }
        let keeps = part(vm.size_bytes, config.balloon.guest_keeps);
        let relief = keeps
            .saturating_sub(guest.available_bytes)
            .max(part(vm.size_bytes, RELIEF_STEPS * config.balloon.step));
        let bytes = match trouble.killed {
            true => 0,
            false => balloon.target_bytes.saturating_sub(relief),
        };
        let why = format!(
            "the guest {}, with {} MiB available: its balloon goes from {} to {} MiB",
            trouble.what,
            mib(guest.available_bytes),
            mib(balloon.target_bytes),
            mib(bytes)
        );
        decision.add(target(name, bytes), why);
    }
}

fn with_guest(vm: &Vm) -> Option<(Balloon, GuestMemory)> {
    let balloon = vm.balloon?;
    Some((balloon, balloon.guest?))
}

fn target(name: &str, bytes: u64) -> Action {
    Action::Balloon {
        vm: name.to_owned(),
        bytes,
    }
}

struct Trouble {
    what: String,
    killed: bool,
}

/// Whether a guest is short of memory.
fn trouble(config: &Config, before: Option<GuestMemory>, now: GuestMemory) -> Option<Trouble> {
    let grew = |of: fn(&GuestMemory) -> Option<u64>| {
        let (before, now) = (of(&before?)?, of(&now)?);
        (now > before).then(|| now - before)
    };
    let trouble = |what: String| {
        Some(Trouble {
            what,
            killed: false,
        })
    };
    if let Some(kills) = grew(|guest| guest.oom_kills) {
        return Some(Trouble {
            what: format!("ended {kills} processes for want of memory"),
            killed: true,
        });
    }
    if let Some(stalls) = grew(|guest| guest.alloc_stalls) {
        return trouble(format!("had {stalls} allocations wait"));
    }
    if let Some(pages) = grew(|guest| guest.direct_scans) {
        return trouble(format!(
            "had programs look through {pages} pages for free ones"
        ));
    }
    if let Some(bytes) = grew(|guest| guest.swap_in) {
        return trouble(format!("read {} KiB back from its swap", bytes >> 10));
    }
    let low = part(now.total_bytes, config.balloon.guest_low);
    if now.total_bytes > 0 && now.available_bytes < low {
        return trouble(format!("is below {} MiB", mib(low)));
    }
    None
}

/// Takes from the guests with most to spare until the host has what it lacks.
fn inflate(config: &Config, next: &History, sample: &Sample, decision: &mut Decision) {
    let wanted = part(sample.host.total_bytes, config.pressure.available_high);
    // Where tasks wait although memory is available, a step of the largest.
    let mut lacks = wanted
        .saturating_sub(sample.host.available_bytes)
        .max(LEAST_BYTES);
    let mut spare: Vec<(u64, &String, &Vm, Balloon)> = Vec::new();
    for (name, vm) in &sample.vms {
        let Some((balloon, guest)) = with_guest(vm) else {
            continue;
        };
        let calm = next
            .vms
            .get(name)
            .is_some_and(|known| known.calm_until_ms <= sample.at_ms);
        let step = part(vm.size_bytes, config.balloon.step);
        // One that has not given what it was asked for is not asked for more.
        let keeps_up = balloon.actual_bytes + step >= balloon.target_bytes;
        let keeps = part(vm.size_bytes, config.balloon.guest_keeps);
        let asked = balloon.target_bytes.saturating_sub(balloon.actual_bytes);
        let free = guest.available_bytes.saturating_sub(keeps + asked);
        if vm.running && calm && keeps_up && free >= LEAST_BYTES {
            spare.push((free, name, vm, balloon));
        }
    }
    spare.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
    for (free, name, vm, balloon) in spare {
        if lacks == 0 {
            break;
        }
        let step = part(vm.size_bytes, config.balloon.step);
        let bytes = step.min(free).min(lacks.max(LEAST_BYTES));
        lacks = lacks.saturating_sub(bytes);
        let why = format!(
            "the host has {} of {} MiB, the guest {} MiB to spare: its balloon goes from {} to {} MiB",
            mib(sample.host.available_bytes),
            mib(wanted),
            mib(free),
            mib(balloon.target_bytes),
            mib(balloon.target_bytes + bytes)
        );
        decision.add(target(name, balloon.target_bytes + bytes), why);
    }
}

/// Has the host swap a little of the largest VM that does not wait for memory.
fn reclaim(config: &Config, last: Option<&Sample>, sample: &Sample, decision: &mut Decision) {
    let Some(last) = last else {
        return;
    };
    let time_us = 1000 * sample.at_ms.saturating_sub(last.at_ms).max(1);
    let step = config.reclaim.step_mib << 20;
    let candidate = sample
        .vms
        .iter()
        .filter_map(|(name, vm)| {
            let cgroup = vm.cgroup.as_ref()?;
            let before = last.vms.get(name)?.cgroup.as_ref()?;
            let waited = cgroup.memory_some_us.saturating_sub(before.memory_some_us);
            let waits = 100.0 * waited as f64 / time_us as f64;
            let swap = cgroup
                .swap_left_bytes
                .unwrap_or(u64::MAX)
                .min(sample.host.swap_free_bytes);
            (waits <= config.reclaim.waiting && swap >= step).then_some((name, cgroup, waits))
        })
        .max_by_key(|(_, cgroup, _)| cgroup.current_bytes);
    if let Some((name, cgroup, waits)) = candidate {
        let why = format!(
            "no guest has memory to spare; of {} MiB of this one, which waited {waits:.1} % of the time, {} go to swap",
            mib(cgroup.current_bytes),
            mib(step)
        );
        let action = Action::Reclaim {
            vm: name.clone(),
            bytes: step,
        };
        decision.add(action, why);
    }
}

/// Gives memory back to guests, as long as the host keeps what it wants.
fn give_back(config: &Config, sample: &Sample, decision: &mut Decision) {
    let wanted = part(sample.host.total_bytes, config.pressure.available_high);
    let mut left = sample.host.available_bytes.saturating_sub(wanted);
    for (name, vm) in &sample.vms {
        let Some(balloon) = vm.balloon.filter(|balloon| balloon.target_bytes > 0) else {
            continue;
        };
        let moved = |step: &Step| matches!(&step.action, Action::Balloon { vm, .. } if vm == name);
        if decision.steps.iter().any(moved) {
            continue;
        }
        let step = part(vm.size_bytes, config.balloon.step)
            .max(LEAST_BYTES)
            .min(balloon.target_bytes);
        if left < 2 * step {
            break;
        }
        left -= step;
        let bytes = balloon.target_bytes - step;
        let why = format!(
            "the host has {} MiB, {} above what it wants: the balloon goes from {} to {} MiB",
            mib(sample.host.available_bytes),
            mib(sample.host.available_bytes.saturating_sub(wanted)),
            mib(balloon.target_bytes),
            mib(bytes)
        );
        decision.add(target(name, bytes), why);
    }
}
