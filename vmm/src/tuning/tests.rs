//! Requests over memory of our own.

use super::*;
use crate::config::MemoryConfig;
use crate::memory::Mode;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const KEY: &str = "000102030405060708090a0b0c0d0e0f";

fn ram(mode: Mode, mergeable: Mergeable) -> GuestRam {
    let config = MemoryConfig {
        mergeable,
        ..MemoryConfig::of(16 * MIB)
    };
    GuestRam::with_mode(&config, mode).unwrap()
}

fn tuning(domain: Option<&str>) -> (GuestRam, Tuning) {
    let ram = ram(Mode::Private, Mergeable::Eligible);
    let tuning = Tuning::new(&ram, domain.map(str::to_owned), Mergeable::Eligible);
    (ram, tuning)
}

fn advice(domain: &str, advice: wire::Advice, ranges: &[(u64, u64)]) -> Request {
    let range = |of: &(u64, u64)| wire::MemoryRange {
        start: of.0,
        len: of.1,
    };
    Request::Advise(wire::MemoryAdvice {
        trust_domain: domain.to_owned(),
        advice,
        ranges: ranges.iter().map(range).collect(),
    })
}

fn sample(domain: &str, key: &str, one_of: u32, start: u64, len: u64) -> Request {
    Request::Hash(wire::MemorySample {
        trust_domain: domain.to_owned(),
        key: key.to_owned(),
        one_of,
        range: wire::MemoryRange { start, len },
    })
}

fn hashes(tuning: &Tuning, request: &Request) -> Vec<wire::MemoryExtent> {
    match tuning.serve(request) {
        Ok(Outcome::Hashed(hashes)) => hashes.extents,
        other => panic!("{other:?}"),
    }
}

fn offered(tuning: &Tuning) -> Vec<(u64, u64)> {
    let seen = tuning.look().offered;
    seen.iter().map(|range| (range.start, range.len)).collect()
}

#[test]
fn only_who_names_the_vms_own_domain_is_obeyed() {
    let (_ram, own) = tuning(Some("farm"));
    let (_other, none) = tuning(None);
    for request in [
        advice("stable", wire::Advice::Mergeable, &[]),
        sample("stable", KEY, 1, 0, MIB),
        sample("", KEY, 1, 0, MIB),
    ] {
        let refusal = own.serve(&request).unwrap_err();
        assert!(matches!(refusal, Refusal::OtherDomain(_)), "{refusal}");
        assert_eq!(none.serve(&request).unwrap_err(), Refusal::NoDomain);
    }
    assert_eq!(offered(&own), []);
    let request = advice("farm", wire::Advice::Mergeable, &[]);
    own.serve(&request).unwrap();
    assert_eq!(offered(&own), [(0, 16 * MIB)]);
    assert_eq!(none.serve(&request).unwrap_err(), Refusal::NoDomain);
    assert_eq!(own.look().trust_domain.as_deref(), Some("farm"));
}

#[test]
fn what_is_offered_is_listed_and_can_be_withdrawn() {
    let (_ram, tuning) = tuning(Some("farm"));
    let ask = |what, ranges: &[(u64, u64)]| tuning.serve(&advice("farm", what, ranges));
    ask(wire::Advice::Mergeable, &[(0, 4 * MIB), (8 * MIB, MIB)]).unwrap();
    assert_eq!(offered(&tuning), [(0, 4 * MIB), (8 * MIB, MIB)]);
    ask(wire::Advice::Unmergeable, &[(MIB, MIB)]).unwrap();
    assert_eq!(
        offered(&tuning),
        [(0, MIB), (2 * MIB, 2 * MIB), (8 * MIB, MIB)]
    );
    ask(wire::Advice::Thp, &[]).unwrap();
    ask(wire::Advice::NoThp, &[]).unwrap();
    ask(wire::Advice::Unmergeable, &[]).unwrap();
    assert_eq!(offered(&tuning), []);
}

#[test]
fn a_request_with_one_wrong_range_changes_nothing() {
    let (_ram, tuning) = tuning(Some("farm"));
    for wrong in [
        (16 * MIB, MIB),
        (15 * MIB, 2 * MIB),
        (1, 4096),
        (0, 4095),
        (0, 0),
        (u64::MAX - 4095, 4096),
    ] {
        let request = advice("farm", wire::Advice::Mergeable, &[(0, MIB), wrong]);
        let refusal = tuning.serve(&request).unwrap_err();
        assert!(matches!(refusal, Refusal::Range { .. }), "{refusal}");
        let refusal = tuning.serve(&sample("farm", KEY, 1, wrong.0, wrong.1));
        assert!(matches!(refusal, Err(Refusal::Range { .. })), "{refusal:?}");
    }
    assert_eq!(offered(&tuning), []);
}

#[test]
fn memory_that_others_share_or_that_is_not_eligible_is_refused() {
    for (mode, mergeable) in [
        (Mode::Shared, Mergeable::Eligible),
        (Mode::Private, Mergeable::Off),
    ] {
        let ram = ram(mode, mergeable);
        let tuning = Tuning::new(&ram, Some("farm".to_owned()), mergeable);
        let request = advice("farm", wire::Advice::Mergeable, &[]);
        let text = tuning.serve(&request).unwrap_err().to_string();
        assert_eq!(
            text,
            "no memory of this VM can be merged (--memory mergeable=on makes it so)"
        );
        assert_eq!(
            tuning.serve(&sample("farm", KEY, 1, 0, MIB)).unwrap_err(),
            Refusal::NotMergeable
        );
        assert_eq!(tuning.look().mergeable, []);
    }
}

#[test]
fn what_is_merged_from_the_start_is_offered_from_the_start() {
    let ram = ram(Mode::Private, Mergeable::Always);
    let tuning = Tuning::new(&ram, None, Mergeable::Always);
    assert_eq!(offered(&tuning), [(0, 16 * MIB)]);
}

#[test]
fn equal_pages_have_equal_hashes_wherever_they_are_and_under_one_key_only() {
    let (first, one) = tuning(Some("farm"));
    let (second, two) = tuning(Some("farm"));
    let page = |number: u64| -> Vec<u8> {
        let byte = |at: u64| (number.wrapping_mul(2_654_435_761) >> (at % 24)) as u8 ^ at as u8;
        (0..4096).map(byte).collect()
    };
    for number in 0..256 {
        let put = |ram: &GuestRam, gpa: u64| {
            ram.memory()
                .write_slice(&page(number), GuestAddress(gpa))
                .unwrap();
        };
        put(&first, number * 4096);
        put(&second, 8 * MIB + (255 - number) * 4096);
    }
    let sorted = |tuning: &Tuning, key: &str, start: u64| {
        let extents = hashes(tuning, &sample("farm", key, 8, start, 2 * MIB));
        let mut all: Vec<u64> = extents
            .into_iter()
            .flat_map(|extent| extent.hashes)
            .collect();
        all.sort_unstable();
        all
    };
    let all = sorted(&one, KEY, 0);
    assert!(
        (8..=90).contains(&all.len()),
        "{} of 256, one of 8",
        all.len()
    );
    assert_eq!(all, sorted(&two, KEY, 8 * MIB));
    assert_ne!(all, sorted(&one, "ff0102030405060708090a0b0c0d0e0f", 0));
}

#[test]
fn pages_of_zeros_are_known_and_those_that_were_never_touched_are_left_alone() {
    let (ram, tuning) = tuning(Some("farm"));
    assert_eq!(hashes(&tuning, &sample("farm", KEY, 1, 0, 16 * MIB)), []);
    for page in 0..64u64 {
        ram.memory()
            .write_slice(&[1], GuestAddress(4 * MIB + page * 4096))
            .unwrap();
        ram.memory()
            .write_slice(&[0], GuestAddress(4 * MIB + page * 4096))
            .unwrap();
    }
    // A page that is zero where pages are looked at first.
    ram.memory()
        .write_slice(&[7; 8], GuestAddress(4 * MIB))
        .unwrap();
    let extents = hashes(&tuning, &sample("farm", KEY, 1, 4 * MIB, 4 * MIB));
    assert_eq!(extents.len(), 1);
    let zeros = extents[0].hashes.iter().filter(|hash| **hash == 0).count();
    let others = extents[0].hashes.iter().filter(|hash| **hash != 0).count();
    // With huge pages on the host more pages are there than were touched.
    assert!(zeros >= 63 && others == 1, "{zeros} zero, {others} not");
}

#[test]
fn a_sample_that_makes_no_sense_is_refused() {
    let (_ram, tuning) = tuning(Some("farm"));
    let refusal = |key: &str, one_of| {
        tuning
            .serve(&sample("farm", key, one_of, 0, MIB))
            .unwrap_err()
    };
    assert_eq!(refusal("00", 1), Refusal::Key);
    assert_eq!(refusal("+00102030405060708090a0b0c0d0e0f", 1), Refusal::Key);
    assert_eq!(refusal(KEY, 0), Refusal::OneOf(0));
    assert_eq!(refusal(KEY, 5000), Refusal::OneOf(5000));
}

#[test]
fn clients_that_hang_up_leave_no_more_than_a_few_requests_behind() {
    let (_ram, tuning) = tuning(Some("farm"));
    let machines = Arc::new(tuning);
    let mut under_way: Vec<_> = (0..MOST_AT_A_TIME)
        .map(|_| machines.one_more().unwrap())
        .collect();
    assert_eq!(machines.one_more().unwrap_err(), Refusal::Busy);
    under_way.pop();
    machines.one_more().unwrap();
}
