//! Hosts as they were recorded (`berth-tuner run --record`), replayed through the policy: what it decides, and when.
//!
//! A replay does not act: the host goes on as it did, with what the tuner of the recording had decided. Decisions must fit it.
//! `tests/traces/README.md` says what each trace is.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::Path;

use berth_tuner::config::Config;
use berth_tuner::policy::{Action, Decision, History, State, decide};
use berth_tuner::sample::Sample;

fn trace(name: &str) -> Vec<Sample> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces");
    let text = std::fs::read_to_string(folder.join(name)).unwrap();
    let samples: Vec<Sample> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(samples.len() > 20, "{name} has {} samples", samples.len());
    samples
}

fn config(text: &str) -> Config {
    let config: Config = toml::from_str(text).unwrap();
    config.check().unwrap();
    config
}

const FARM: &str = "[merge]\ndomain = \"farm\"\n";

fn replay(config: &Config, samples: &[Sample]) -> Vec<Decision> {
    let mut history = History::default();
    samples
        .iter()
        .map(|sample| {
            let (next, decision) = decide(config, &history, sample);
            history = next;
            decision
        })
        .collect()
}

/// When a state was entered.
fn entered(decisions: &[Decision]) -> Vec<(State, u64)> {
    let changes = decisions
        .iter()
        .filter(|decision| decision.changed.is_some());
    changes
        .map(|decision| (decision.state, decision.at_ms))
        .collect()
}

fn actions(decision: &Decision) -> impl Iterator<Item = &Action> {
    decision.steps.iter().map(|step| &step.action)
}

fn offers(decision: &Decision) -> Vec<&str> {
    actions(decision)
        .filter_map(|action| match action {
            Action::Advise {
                vm, merge: true, ..
            } => Some(vm.as_str()),
            _ => None,
        })
        .collect()
}

#[test]
fn memory_is_offered_in_the_step_in_which_the_comparison_is_there() {
    let samples = trace("four-guests.jsonl");
    let decisions = replay(&config(FARM), &samples);
    let mut offered = Vec::new();
    for (sample, decision) in samples.iter().zip(&decisions) {
        for name in offers(decision) {
            let vm = &sample.vms[name];
            assert!(vm.compared.is_some(), "{name} at {} ms", sample.at_ms);
            offered.push(name.to_owned());
        }
    }
    assert_eq!(offered, ["a", "b", "c", "d"]);
    // Two thirds of what these guests have in memory have equals; the rest is not open to merging.
    for (decision, name) in decisions.iter().flat_map(|decision| {
        let names = offers(decision);
        names.into_iter().map(move |name| (decision, name))
    }) {
        let bytes: u64 = actions(decision)
            .filter_map(|action| match action {
                Action::Advise { vm, ranges, .. } if vm == name => Some(ranges),
                _ => None,
            })
            .flatten()
            .map(|range| range.1)
            .sum();
        assert!((112 << 20..=116 << 20).contains(&bytes), "{name}: {bytes}");
    }
}

#[test]
fn a_burst_begins_with_new_memory_and_ends_when_all_is_merged() {
    let samples = trace("four-guests.jsonl");
    let decisions = replay(&config(FARM), &samples);
    let states: Vec<State> = entered(&decisions).into_iter().map(|of| of.0).collect();
    use State::{Burst, Trickle};
    assert_eq!(states, [Burst, Trickle, Burst, Trickle]);
    // The first sample that shows new memory begins it; all that could be merged was when it ended.
    let times = entered(&decisions);
    let first = |name: &str| {
        let shows = |sample: &&Sample| sample.vms.get(name).is_some_and(|vm| vm.advised_bytes > 0);
        samples.iter().find(shows).unwrap().at_ms
    };
    assert_eq!(times[0].1, first("a"));
    assert_eq!(times[2].1, first("d"));
    let merged = |at_ms: u64| {
        let sample = samples.iter().find(|sample| sample.at_ms == at_ms).unwrap();
        sample.ksm.pages_sharing
    };
    let most = samples.iter().map(|sample| sample.ksm.pages_sharing).max();
    assert_eq!(Some(merged(times[3].1)), most);
    assert!(times[1].1 - times[0].1 < 30_000 && times[3].1 - times[2].1 < 30_000);
}

#[test]
fn once_settled_it_takes_a_hundredth_of_a_core() {
    let samples = trace("four-guests.jsonl");
    let times = entered(&replay(&config(FARM), &samples));
    let settled: Vec<&Sample> = samples
        .iter()
        .filter(|sample| (times[1].1..times[2].1).contains(&sample.at_ms))
        .collect();
    let (first, last) = (settled[0], settled[settled.len() - 1]);
    let cpu = (last.scanner_cpu_us - first.scanner_cpu_us) as f64;
    let part = cpu / (1000.0 * (last.at_ms - first.at_ms) as f64);
    assert!(last.at_ms - first.at_ms > 30_000 && part <= 0.01, "{part}");
}

#[test]
fn without_room_nothing_that_is_merged_is_withdrawn() {
    let mut samples = trace("four-guests.jsonl");
    // Another domain from the middle on, as after a reload, and a host that has no room for what it saves.
    let from = samples
        .iter()
        .position(|sample| sample.ksm.pages_sharing > 40_000)
        .unwrap();
    for sample in &mut samples[from..] {
        sample.host.available_bytes = 64 << 20;
    }
    let mut history = History::default();
    let (ours, theirs) = (config(FARM), config("[merge]\ndomain = \"other\"\n"));
    for (at, sample) in samples.iter().enumerate() {
        let now = if at < from { &ours } else { &theirs };
        let (next, decision) = decide(now, &history, sample);
        history = next;
        for action in actions(&decision).filter(|_| at >= from) {
            match action {
                Action::Advise {
                    vm, merge: false, ..
                } => {
                    // One that has nothing merged yet takes no room.
                    let pages = sample.vms[vm].ksm.map_or(0, |ksm| ksm.merging_pages);
                    assert!(pages << 12 < 64 << 20, "{vm}: {pages} pages");
                }
                Action::Scanner(settings) => assert_eq!(settings.run, 0),
                _ => {}
            }
        }
    }
}

#[test]
fn a_replay_is_the_same_every_time() {
    let samples = trace("four-guests.jsonl");
    let config = config(FARM);
    assert_eq!(replay(&config, &samples), replay(&config, &samples));
}

#[test]
fn a_guest_in_need_has_memory_back_within_a_second() {
    let samples = trace("guest-in-need.jsonl");
    let short = config("[pressure]\navailable_low = 0.99\navailable_high = 0.995\n");
    let decisions = replay(&short, &samples);
    let balloon = |sample: &Sample| sample.vms["guest"].balloon.unwrap();
    let moved = |decision: &Decision| {
        actions(decision).find_map(|action| match action {
            Action::Balloon { bytes, .. } => Some(*bytes),
            _ => None,
        })
    };
    let needs = |sample: &Sample| {
        let guest = balloon(sample).guest.unwrap();
        guest.available_bytes < guest.total_bytes / 20
    };
    let at = samples.iter().position(needs).unwrap();
    // Until then it was asked for more and more, and for less in the sample that shows its need.
    assert!(balloon(&samples[at]).target_bytes > 200 << 20);
    let back = moved(&decisions[at]).unwrap();
    assert!(
        back + (100 << 20) <= balloon(&samples[at]).target_bytes,
        "{back}"
    );
    assert!(
        samples[at].at_ms - samples[at - 1].at_ms <= 1000,
        "samples are not older"
    );
    // It has all of it back soon after, is not asked again, and ended no process.
    let all = samples
        .iter()
        .skip(at)
        .find(|sample| balloon(sample).actual_bytes == 0);
    assert!(all.unwrap().at_ms - samples[at].at_ms <= 2000);
    for (sample, decision) in samples.iter().zip(&decisions).skip(at) {
        let target = balloon(sample).target_bytes;
        assert!(moved(decision).is_none_or(|bytes| bytes <= target));
        assert_eq!(balloon(sample).guest.unwrap().oom_kills, Some(0));
    }
}
