//! What a guest costs beside its own memory, and what its start takes: measured with one vCPU and 128 MiB, and printed.
//! The memory of a release build is held to its limit; times are shown and not judged.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot look at its process has failed"
)]

mod support;

use std::fs;

use support::{Code, Guest, eventually, has_kvm};

/// Private memory of the VMM, guest RAM not counted.
const LIMIT_KIB: u64 = 4 << 10;

#[test]
fn a_small_guest_costs_little() {
    if !has_kvm() {
        return;
    }
    let code = Code::new().print("here\n").halt();
    let memory = ["--startup-trace", "--memory=size=128M"];
    let guest = Guest::start_with(&code, &memory);
    eventually("the guest runs", || {
        (guest.lines() == ["here"]).then_some(())
    });
    assert_eq!(guest.state(), "Running");
    let maps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    let (ram, own) = private_kib(&maps);
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (_, stderr) = guest.wait();
    let build = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    println!("{build} build: {own} KiB private beside {ram} KiB of guest RAM");
    for line in stderr
        .lines()
        .filter(|line| line.starts_with("startup-trace"))
    {
        println!("{line}");
    }
    assert!(own > 0);
    assert!(
        own <= LIMIT_KIB || cfg!(debug_assertions),
        "{own} KiB is over the limit"
    );
}

/// Private memory of guest RAM, and of the rest.
fn private_kib(smaps: &str) -> (u64, u64) {
    let (mut ram, mut own, mut is_ram) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        if !first.ends_with(':') {
            is_ram = line.contains("berth-guest-ram");
        } else if first.starts_with("Private_") {
            let kib: u64 = second.parse().unwrap();
            *if is_ram { &mut ram } else { &mut own } += kib;
        }
    }
    (ram, own)
}
