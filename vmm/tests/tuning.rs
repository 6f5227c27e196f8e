//! What a tuner may do with a guest's memory, over the API of a guest that runs in its sandbox.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot look at its process has failed"
)]

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{Code, Guest, eventually, has_kvm};

const MIB: u64 = 1 << 20;
const KEY: &str = "000102030405060708090a0b0c0d0e0f";

/// A guest that runs with this memory and platform.
fn started(memory: &str, platform: &str) -> Guest {
    let code = Code::new().print("here\n").halt();
    let guest = Guest::start_with(
        &code,
        &[
            &format!("--memory=size=64M{memory}"),
            &format!("--platform={platform}"),
        ],
    );
    eventually("the guest runs", || {
        (guest.lines() == ["here"]).then_some(())
    });
    guest
}

/// MiB of the process that the kernel was told to merge.
fn open_to_merging(guest: &Guest) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    let mut kib = 0;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Size:") {
            kib = size.trim().trim_end_matches(" kB").trim().parse().unwrap();
        }
        if line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| flag == "mg") {
            sum += kib;
        }
    }
    sum >> 10
}

fn advise(guest: &Guest, domain: &str, advice: &str, ranges: &Value) -> (u16, String) {
    let body = json!({"trust_domain": domain, "advice": advice, "ranges": ranges});
    guest.put("vm.memory-advice", &body.to_string())
}

fn sample(guest: &Guest, domain: &str, len: u64) -> (u16, String) {
    let range = json!({"start": 0, "len": len});
    let body = json!({"trust_domain": domain, "key": KEY, "one_of": 1, "range": range});
    guest.put("vm.memory-sample", &body.to_string())
}

#[test]
fn a_tuner_of_the_vms_domain_offers_memory_and_withdraws_it() {
    if !has_kvm() || !fs::exists("/sys/kernel/mm/ksm").unwrap() {
        return;
    }
    let guest = started(",mergeable=on", "trust_domain=farm");
    assert_eq!(open_to_merging(&guest), 0, "nothing without a tuner");
    let (status, body) = guest.api("GET", "vm.memory-sample");
    assert_eq!(status, 200, "{body}");
    let seen: Value = serde_json::from_str(&body).unwrap();
    let all = json!([{"start": 0, "len": 64 * MIB}]);
    assert_eq!(
        seen,
        json!({"trust_domain": "farm", "mergeable": all, "offered": []})
    );

    let part = json!([{"start": 0, "len": 16 * MIB}, {"start": 32 * MIB, "len": 8 * MIB}]);
    assert_eq!(advise(&guest, "farm", "mergeable", &part).0, 204);
    assert_eq!(open_to_merging(&guest), 24);
    let seen: Value = serde_json::from_str(&guest.api("GET", "vm.memory-sample").1).unwrap();
    assert_eq!(seen["offered"], part);
    for advice in ["thp", "no-thp"] {
        assert_eq!(
            advise(&guest, "farm", advice, &json!([])).0,
            204,
            "{advice}"
        );
    }
    assert_eq!(advise(&guest, "farm", "unmergeable", &json!([])).0, 204);
    assert_eq!(open_to_merging(&guest), 0);

    let (status, body) = sample(&guest, "farm", 64 * MIB);
    assert_eq!(status, 200, "{body}");
    let hashes: Value = serde_json::from_str(&body).unwrap();
    let extents = hashes["extents"].as_array().unwrap();
    assert!(!extents.is_empty(), "the kernel's pages are there: {body}");
    for extent in extents {
        let hashed = extent["hashes"].as_array().unwrap().len() as u64;
        assert_eq!(Some(hashed), extent["present"].as_u64(), "{extent}");
    }
    assert_eq!(guest.api("GET", "vmm.ping").0, 200);
}

#[test]
fn nobody_else_is_obeyed_and_is_told_why() {
    if !has_kvm() {
        return;
    }
    for (memory, platform, domain, status, why) in [
        (
            ",mergeable=on",
            "trust_domain=farm",
            "stable",
            403,
            "not of trust domain",
        ),
        (
            ",mergeable=on",
            "irqchip=kernel",
            "farm",
            403,
            "names no trust domain",
        ),
        (
            "",
            "trust_domain=farm",
            "farm",
            409,
            "--memory mergeable=on makes it so",
        ),
        (
            ",shared=off",
            "trust_domain=farm",
            "farm",
            409,
            "can be merged",
        ),
    ] {
        let guest = started(memory, platform);
        for answer in [
            advise(&guest, domain, "mergeable", &json!([])),
            sample(&guest, domain, MIB),
        ] {
            assert_eq!(answer.0, status, "{answer:?}");
            assert!(answer.1.contains(why), "{answer:?}");
        }
        assert_eq!(open_to_merging(&guest), 0);
    }
}

#[test]
fn without_a_guest_and_with_nonsense_there_is_an_answer_too() {
    if !has_kvm() {
        return;
    }
    let guest = started(",mergeable=on", "trust_domain=farm");
    let far = json!([{"start": 60 * MIB, "len": 8 * MIB}]);
    assert_eq!(advise(&guest, "farm", "mergeable", &far).0, 400);
    assert_eq!(advise(&guest, "farm", "merge", &json!([])).0, 400);
    assert_eq!(guest.api("PUT", "vm.memory-sample").0, 400);
    assert_eq!(guest.api("GET", "vm.memory-advice").0, 400);
    assert_eq!(open_to_merging(&guest), 0);
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    let (status, body) = guest.api("GET", "vm.memory-sample");
    assert_eq!(status, 500);
    assert!(body.contains("not booted"), "{body}");
}
