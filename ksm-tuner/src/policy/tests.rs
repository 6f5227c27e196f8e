//! The policy over a simulated host.

use super::simulated::{DOMAIN, GIB, Host, Numbers, config};
use super::*;
use crate::sample::{Cgroup, ProcessKsm};

fn balloon_of(decision: &Decision, name: &str) -> Option<u64> {
    decision.steps.iter().find_map(|step| match &step.action {
        Action::Balloon { vm, bytes } if vm == name => Some(*bytes),
        _ => None,
    })
}

#[test]
fn without_a_domain_nothing_is_touched() {
    let mut host = Host::new(Config::default());
    host.add("a", DOMAIN, GIB);
    host.sample.ksm.settings.run = 1;
    host.run(100);
    assert_eq!(host.log, []);
}

#[test]
fn a_new_vm_is_compared_offered_merged_and_left_alone() {
    let mut host = Host::new(config());
    host.add("a", DOMAIN, GIB);
    host.run(60);
    assert_eq!(host.states(), [State::Burst, State::Trickle]);
    let vm = &host.sample.vms["a"];
    assert_eq!(
        vm.advised_bytes,
        GIB / 2,
        "the half without equals stays as it is"
    );
    assert!(vm.ksm.unwrap().merging_pages > 70_000);
    assert_eq!(host.sample.ksm.settings.run, 0);
    // Every step says why, with a number.
    for decision in &host.log {
        for step in &decision.steps {
            assert!(
                step.why.contains(|c: char| c.is_ascii_digit())
                    || step.why.contains("stands still"),
                "{}",
                step.why
            );
        }
    }
}

/// A comparison reads the memory of all guests: a start of many is no reason to do it once for each.
#[test]
fn guests_that_start_together_are_compared_together() {
    let mut host = Host::new(config());
    let compares = |host: &Host| {
        let steps = host.log.iter().flat_map(|decision| &decision.steps);
        let is_one = |step: &&Step| matches!(step.action, Action::Compare { .. });
        steps.filter(is_one).count()
    };
    for index in 0..8 {
        host.add(&format!("vm{index}"), DOMAIN, GIB);
        host.run(1);
    }
    host.run(52);
    let in_a_minute = compares(&host);
    assert!((3..=7).contains(&in_a_minute), "{in_a_minute} in a minute");
    host.run(600);
    let later = compares(&host) - in_a_minute;
    assert!(later <= 6, "{later} in the ten minutes after it");
    // One that comes much later waits for none of that.
    host.add("late", DOMAIN, GIB);
    host.run(2);
    assert_eq!(compares(&host), in_a_minute + later + 1);
}

#[test]
fn a_settled_host_is_left_alone_for_longer_and_longer() {
    let mut host = Host::new(config());
    host.add("a", DOMAIN, 8 * GIB);
    host.config.merge.compare = false;
    host.run(600);
    assert_eq!(host.state(), State::Trickle);
    let (cpu, actions) = (host.sample.scanner_cpu_us, host.log.len());
    host.run(4 * 3600);
    let part = (host.sample.scanner_cpu_us - cpu) as f64 / (4.0 * 3600.0 * 1e6);
    assert!(part <= 0.011, "{part} of a core");
    let looks = (host.log.len() - actions) / 2;
    assert!((3..=20).contains(&looks), "{looks}");
}

#[test]
fn where_nothing_changes_nothing_is_done() {
    let mut host = Host::new(config());
    host.add("a", DOMAIN, GIB);
    host.config.merge.compare = false;
    host.run(120);
    host.config.merge.probe_last_s = 100_000;
    let mut quiet = 0;
    let until = host.history.scanner_says();
    while host.history.scanner_says() == until && quiet < 60 {
        let decision = host.step(1000);
        assert!(decision.is_empty() || quiet > 0, "{decision:?}");
        quiet += 1;
    }
    // The same sample again, later: still nothing.
    let (_, decision) = decide(&host.config, &host.history, &host.sample);
    assert!(decision.is_empty(), "{decision:?}");
}

#[test]
fn a_vm_that_comes_later_starts_a_burst_and_one_that_is_restarted_too() {
    let mut host = Host::new(config());
    host.config.merge.compare = false;
    host.add("a", DOMAIN, GIB);
    host.run(120);
    host.add("b", DOMAIN, GIB);
    host.run(2);
    assert_eq!(host.state(), State::Burst);
    host.run(120);
    let vm = host.sample.vms.get_mut("b").unwrap();
    (vm.pid, vm.advised_bytes) = (999, 0);
    host.run(3);
    assert_eq!(host.state(), State::Burst);
    host.sample.vms.clear();
    host.run(2);
    assert_eq!(host.state(), State::Off);
    assert_eq!(host.sample.ksm.settings.run, 0);
}

#[test]
fn other_domains_are_not_offered_and_taken_out_where_they_are() {
    let mut host = Host::new(config());
    host.add("a", DOMAIN, GIB);
    host.add("b", "other", GIB);
    host.run(30);
    assert_eq!(host.sample.vms["b"].advised_bytes, 0);
    host.sample.vms.get_mut("b").unwrap().advised_bytes = GIB;
    let decision = host.step(1000);
    let taken = Action::Advise {
        vm: "b".to_owned(),
        domain: "other".to_owned(),
        merge: false,
        ranges: Vec::new(),
    };
    assert!(decision.steps.iter().any(|step| step.action == taken));
    // Another domain by a reload.
    host.config.merge.domain = Some("third".to_owned());
    host.run(2);
    assert_eq!(host.sample.vms["a"].advised_bytes, 0);
    assert_eq!(host.state(), State::Off);
}

/// A VM whose merged pages come to so many bytes.
fn merged(host: &mut Host, name: &str, bytes: u64) {
    let vm = host.sample.vms.get_mut(name).unwrap();
    vm.advised_bytes = vm.mergeable_bytes;
    vm.ksm = Some(ProcessKsm {
        rmap_items: vm.mergeable_bytes >> 12,
        merging_pages: bytes >> 12,
        zero_pages: 0,
        profit_bytes: bytes as i64,
    });
}

#[test]
fn without_room_foreign_memory_stays_and_nothing_is_scanned() {
    let mut host = Host::new(config());
    host.add("a", DOMAIN, 4 * GIB);
    host.add("b", "other", 4 * GIB);
    merged(&mut host, "a", 3 * GIB);
    merged(&mut host, "b", 3 * GIB);
    host.sample.host.available_bytes = 2 * GIB;
    host.run(5);
    assert_eq!(
        host.sample.vms["b"].advised_bytes,
        4 * GIB,
        "no room for it"
    );
    assert_eq!(host.sample.ksm.settings.run, 0, "or both would be merged");
    let why = host.history.scanner_says();
    assert!(why.contains("VM b, of another domain"), "{why}");
    host.sample.host.available_bytes = 8 * GIB;
    host.run(3);
    assert_eq!(host.sample.vms["b"].advised_bytes, 0);
    assert_eq!(host.sample.ksm.settings.run, 1);
}

#[test]
fn at_the_end_as_much_is_withdrawn_as_there_is_room_for() {
    let mut host = Host::new(config());
    for (name, bytes) in [
        ("big", 8 * GIB),
        ("mid", 3 * GIB),
        ("small", GIB),
        ("other", GIB),
    ] {
        host.add(name, DOMAIN, 16 * GIB);
        merged(&mut host, name, bytes);
    }
    let mut ours: BTreeMap<String, u32> = host
        .sample
        .vms
        .iter()
        .map(|(name, vm)| (name.clone(), vm.pid))
        .collect();
    // This one was started anew since: what it offers is not ours.
    ours.insert("other".to_owned(), 1);
    let withdrawn = |host: &Host| {
        let (steps, stay) = farewell(&host.config, &host.sample, &ours);
        let names: Vec<String> = steps
            .iter()
            .map(|step| match &step.action {
                Action::Advise {
                    vm, merge: false, ..
                } => vm.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        (names, stay.len())
    };
    // A tenth of 64 GiB is kept.
    let names = |names: &[&str]| {
        names
            .iter()
            .map(|&name| name.to_owned())
            .collect::<Vec<_>>()
    };
    host.sample.host.available_bytes = 48 * GIB;
    assert_eq!(withdrawn(&host), (names(&["small", "mid", "big"]), 0));
    host.sample.host.available_bytes = 12 * GIB;
    assert_eq!(withdrawn(&host), (names(&["small", "mid"]), 1));
    host.sample.host.available_bytes = 7 * GIB;
    assert_eq!(withdrawn(&host), (Vec::new(), 3));
}

#[test]
fn pages_are_shared_more_widely_only_while_none_is_shared() {
    let mut host = Host::new(config());
    host.config.merge.compare = false;
    host.config.merge.max_page_sharing = Some(1000);
    host.add("a", DOMAIN, GIB);
    host.sample.ksm.pages_shared = 1;
    host.run(3);
    assert_eq!(host.sample.ksm.settings.run, 1);
    assert_eq!(host.sample.ksm.settings.max_page_sharing, Some(256));
    host.sample.ksm.pages_shared = 0;
    host.step(1000);
    assert_eq!(host.sample.ksm.settings.max_page_sharing, Some(1000));
}

#[test]
fn the_scanner_never_takes_more_than_its_budget() {
    let mut numbers = Numbers(7);
    for _ in 0..60 {
        let mut host = Host::new(config());
        let merge = &mut host.config.merge;
        merge.cpu_budget = numbers.within(0.01, 1.0);
        merge.min_yield = numbers.within(0.0, 50_000.0);
        merge.max_passes = 1000;
        merge.compare = false;
        host.add("a", DOMAIN, (numbers.within(0.1, 32.0) * GIB as f64) as u64);
        let mut used = Vec::new();
        for second in 0..300 {
            if second % 50 == 0 {
                host.cost_us = numbers.within(0.5, 60.0);
            }
            host.sample.host.cpu_some_us += numbers.within(0.0, 1e6) as u64;
            host.step(1000);
            used.push(host.sample.scanner_cpu_us as f64 / 1e6);
        }
        let budget = host.config.merge.cpu_budget;
        for from in 0..used.len() {
            for to in (from + 1)..used.len() {
                // One step may pass before a change of the cost is seen, and one step's credit is kept.
                let most = budget * (to - from) as f64 + 1.0 + budget;
                let cpu = used[to] - used[from];
                assert!(cpu <= most, "{cpu} s from {from} to {to} at {budget}");
            }
        }
    }
}

#[test]
fn the_scanner_uses_most_of_its_budget_in_a_burst() {
    let mut host = Host::new(config());
    host.config.merge.compare = false;
    host.add("a", DOMAIN, 32 * GIB);
    host.run(10);
    let before = host.sample.scanner_cpu_us;
    host.run(20);
    let part = (host.sample.scanner_cpu_us - before) as f64 / 20e6;
    assert!((0.4..=0.5).contains(&part), "{part}");
}

#[test]
fn pressure_takes_from_the_guest_with_most_to_spare_and_gives_back_later() {
    let mut host = Host::new(config());
    host.add("rich", DOMAIN, 16 * GIB);
    host.add("poor", DOMAIN, 16 * GIB);
    host.add_balloon("rich", 12 * GIB);
    host.add_balloon("poor", 3 * GIB);
    host.run(60);
    host.sample.host.available_bytes = 5 * GIB;
    host.run(2);
    assert_eq!(host.state(), State::Pressure);
    host.run(60);
    let held = |host: &Host, name: &str| host.sample.vms[name].balloon.unwrap().actual_bytes;
    assert!(held(&host, "rich") > 4 * GIB, "{}", held(&host, "rich"));
    assert_eq!(held(&host, "poor"), 0);
    assert!(host.guest("rich").available_bytes >= 3 * GIB);
    assert_ne!(host.state(), State::Pressure, "it helped");
    host.sample.host.available_bytes = 40 * GIB;
    host.run(120);
    assert_eq!(held(&host, "rich"), 0);
}

#[test]
fn a_guest_in_need_gets_memory_back_in_the_step_that_shows_it() {
    let mut numbers = Numbers(11);
    for round in 0..200 {
        let mut host = Host::new(config());
        host.add("a", DOMAIN, 4 * GIB);
        host.add_balloon("a", 3 * GIB);
        host.sample.host.available_bytes = (numbers.within(0.5, 40.0) * GIB as f64) as u64;
        host.run(20 + numbers.next() % 40);
        let balloon = host
            .sample
            .vms
            .get_mut("a")
            .unwrap()
            .balloon
            .as_mut()
            .unwrap();
        balloon.target_bytes = GIB;
        balloon.actual_bytes = GIB;
        let guest = host.guest("a");
        let kills = round % 5 == 0;
        match round % 5 {
            0 => guest.oom_kills = Some(1),
            1 => guest.alloc_stalls = Some(3),
            2 => guest.direct_scans = Some(100),
            3 => guest.swap_in = Some(4096),
            _ => guest.available_bytes = GIB / 8,
        }
        let decision = host.step(1000);
        let bytes = balloon_of(&decision, "a").expect("it is relieved");
        assert!(bytes < GIB * 3 / 4, "{bytes}");
        assert_eq!(kills, bytes == 0 && kills, "after a kill all of it");
        let moves = decision
            .steps
            .iter()
            .filter(|step| matches!(step.action, Action::Balloon { .. }));
        assert_eq!(moves.count(), 1);
        // And it is left alone for a while, however short the host is.
        host.sample.host.available_bytes = GIB;
        for _ in 0..50 {
            let bytes = balloon_of(&host.step(1000), "a");
            assert!(bytes.is_none_or(|bytes| bytes <= GIB), "{bytes:?}");
        }
    }
}

#[test]
fn no_guest_is_asked_for_memory_it_needs() {
    let mut numbers = Numbers(3);
    for _ in 0..100 {
        let mut host = Host::new(config());
        for name in ["a", "b", "c"] {
            let size = (1 + numbers.next() % 16) * GIB;
            host.add(name, DOMAIN, size);
            host.add_balloon(name, (numbers.within(0.0, 1.0) * size as f64) as u64);
        }
        let keeps = host.config.balloon.guest_keeps;
        for _ in 0..120 {
            host.sample.host.available_bytes = (numbers.within(0.1, 8.0) * GIB as f64) as u64;
            let before = host.sample.clone();
            host.step(1000);
            for (name, vm) in &host.sample.vms {
                let held = vm.balloon.unwrap().actual_bytes;
                let (was, guest) = (
                    before.vms[name].balloon.unwrap(),
                    vm.balloon.unwrap().guest.unwrap(),
                );
                let least = (keeps * vm.size_bytes as f64) as u64;
                assert!(
                    held <= was.actual_bytes || guest.available_bytes >= least,
                    "{name}"
                );
                assert!(
                    held <= was.actual_bytes + vm.size_bytes / 20,
                    "{name}: a step is a twentieth"
                );
            }
        }
    }
}

#[test]
fn when_no_guest_has_any_to_spare_the_host_swaps() {
    let mut host = Host::new(config());
    host.config.reclaim.enabled = true;
    host.add("a", DOMAIN, 4 * GIB);
    host.add("b", DOMAIN, 4 * GIB);
    host.sample.host.swap_free_bytes = 8 * GIB;
    for (name, current) in [("a", 3 * GIB), ("b", 2 * GIB)] {
        let vm = host.sample.vms.get_mut(name).unwrap();
        vm.cgroup = Some(Cgroup {
            current_bytes: current,
            ..Cgroup::default()
        });
    }
    host.sample.host.available_bytes = 4 * GIB;
    host.run(20);
    let reclaimed = |host: &Host, name: &str| {
        let steps = host.log.iter().flat_map(|decision| &decision.steps);
        steps
            .filter(|step| matches!(&step.action, Action::Reclaim { vm, .. } if vm == name))
            .count()
    };
    assert!(reclaimed(&host, "a") > 5);
    assert_eq!(reclaimed(&host, "b"), 0);
    // The larger one waits for memory now: it is left alone.
    let before = reclaimed(&host, "a");
    for _ in 0..5 {
        host.sample
            .vms
            .get_mut("a")
            .unwrap()
            .cgroup
            .as_mut()
            .unwrap()
            .memory_some_us += 500_000;
        host.step(1000);
    }
    assert_eq!(reclaimed(&host, "a"), before);
    assert!(reclaimed(&host, "b") > 0);
}

#[test]
fn a_vm_that_merging_does_not_pay_for_is_taken_out_where_there_is_room() {
    let mut host = Host::new(config());
    host.config.merge.compare = false;
    host.equal = 0.001;
    host.add("a", DOMAIN, GIB);
    host.run(20);
    assert_eq!(host.sample.vms["a"].advised_bytes, 0);
    let dropped = host.sample.at_ms;
    host.run(600);
    assert_eq!(host.sample.vms["a"].advised_bytes, 0, "not tried again yet");
    host.run(1300);
    let again = host.log.iter().any(|decision| {
        decision.at_ms > dropped + 1000
            && decision
                .steps
                .iter()
                .any(|step| matches!(step.action, Action::Advise { merge: true, .. }))
    });
    assert!(again);
    // Without room to take it apart it stays.
    let vm = host.sample.vms.get_mut("a").unwrap();
    vm.advised_bytes = GIB;
    vm.ksm = Some(ProcessKsm {
        rmap_items: 1 << 18,
        merging_pages: 1000,
        zero_pages: 0,
        profit_bytes: -1,
    });
    host.sample.host.available_bytes = 1 << 20;
    let decision = host.step(1000);
    assert!(
        !decision
            .steps
            .iter()
            .any(|step| matches!(step.action, Action::Advise { .. }))
    );
}

#[test]
fn a_storm_of_copies_stops_the_scanner_and_keeps_room() {
    let mut host = Host::new(config());
    host.config.merge.compare = false;
    host.add("a", DOMAIN, 16 * GIB);
    host.run(5);
    assert_eq!(host.state(), State::Burst);
    for _ in 0..5 {
        *host.sample.host.cow_ksm.as_mut().unwrap() += 100_000;
        host.step(1000);
    }
    assert_eq!(host.sample.ksm.settings.run, 0);
    let last = host.log.last().unwrap();
    assert!(
        last.changed
            .as_ref()
            .unwrap()
            .contains("are written to and copied"),
        "{last:?}"
    );
    // 500 000 pages in 5 s: about 2 GiB must stay available, whatever the configuration says.
    host.config.pressure.available_low = 0.0;
    host.config.pressure.available_high = 0.0;
    host.sample.host.available_bytes = GIB;
    host.step(1000);
    assert_eq!(host.state(), State::Pressure);
    assert!(
        host.log
            .last()
            .unwrap()
            .changed
            .as_ref()
            .unwrap()
            .contains("merged pages may need")
    );
}

#[test]
fn waiting_tasks_are_pressure_and_it_does_not_come_and_go() {
    let mut host = Host::new(config());
    host.add("a", DOMAIN, GIB);
    host.run(30);
    let waiting = |host: &mut Host, part: f64, seconds: u64| {
        for _ in 0..seconds {
            host.sample.host.memory_some_us += (part * 1e6) as u64;
            host.step(1000);
        }
    };
    waiting(&mut host, 0.04, 30);
    assert_ne!(host.state(), State::Pressure);
    waiting(&mut host, 0.10, 10);
    assert_eq!(host.state(), State::Pressure);
    waiting(&mut host, 0.04, 30);
    assert_eq!(host.state(), State::Pressure, "above half of the limit");
    waiting(&mut host, 0.01, 12);
    assert_ne!(host.state(), State::Pressure);
}
