//! The x86 programs of kvm-unit-tests under berth-vmm, beside QEMU on the same KVM.
//!
//! ```text
//!   unittests.cfg ─▶ list ─▶ suite: Test ─┬─▶ run: berth-vmm irqchip=kernel ─┐
//!                                         ├─▶ run: berth-vmm irqchip=split  ─┼─▶ Outcome ─▶ table
//!                                         └─▶ run: QEMU                     ─┘
//! ```
//!
//! The suite is not ours to ship: its built folder is given. What KVM itself does not do right fails in every
//! column; what differs from QEMU's column is ours to mend, or is in [`EXPLAINED`].

pub mod list;
pub mod run;
pub mod suite;
pub mod table;

use std::path::Path;

use anyhow::{Result, ensure};
use berth_tests_framework::story::{Context, Story, Tier};

use run::{Machine, Places, Verdict};

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "kvm-unit-tests",
    tier: Tier::Guest,
    long: false,
    checks: CHECKS,
    run: with_the_suite,
}];

const CHECKS: &[&str] = &[
    "kvm_unit_tests.irqchip_kernel",
    "kvm_unit_tests.irqchip_split",
];

/// Failures that are known, and why: test, machine, reason.
pub const EXPLAINED: [(&str, Machine, &str); 1] = [(
    "realmode",
    Machine::Split,
    "waits for an interrupt of a PIC, and the split irqchip has none",
)];

/// Why a test may fail on a machine.
#[must_use]
pub fn explained(test: &str, machine: Machine) -> Option<&'static str> {
    let known = |entry: &&(&str, Machine, &str)| entry.0 == test && entry.1 == machine;
    EXPLAINED.iter().find(known).map(|(_, _, reason)| *reason)
}

fn with_the_suite(context: &Context) -> Result<()> {
    let suite = context.asset("kvm-unit-tests");
    if !suite.join("x86/unittests.cfg").exists() {
        CHECKS
            .iter()
            .for_each(|check| context.skip(check, "no suite"));
        return Ok(());
    }
    let machines = [Machine::Kernel, Machine::Split];
    for (check, machine) in CHECKS.iter().zip(machines) {
        context.check(check, || passes(context, &suite, machine))?;
    }
    Ok(())
}

/// All programs pass on a machine, but for what is explained.
fn passes(context: &Context, suite: &Path, machine: Machine) -> Result<()> {
    let places = Places {
        suite: suite.to_owned(),
        vmm: context.bin("berth-vmm"),
        qemu: "qemu-system-x86_64".to_owned(),
        out: context.log("x").with_file_name(""),
    };
    let mut bad = Vec::new();
    for test in suite::read(suite, false)? {
        context.step(format!("{} with irqchip={}", test.name, machine.name()));
        let outcome = run::run(&places, &test, machine)?;
        if outcome.verdict == Verdict::Fail && explained(&test.name, machine).is_none() {
            bad.push(format!(
                "{}: {} {:?}",
                test.name, outcome.note, outcome.failed
            ));
        }
    }
    ensure!(bad.is_empty(), "{}", bad.join("; "));
    Ok(())
}
