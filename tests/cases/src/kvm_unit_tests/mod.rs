//! The x86 programs of kvm-unit-tests under berth-vmm, beside QEMU on the same KVM.
//!
//! ```text
//!   unittests.cfg ─▶ list ─▶ suite: Test ─┬─▶ run: berth-vmm irqchip=kernel ─┐
//!                                         ├─▶ run: berth-vmm irqchip=split  ─┼─▶ Outcome ─▶ table
//!                                         └─▶ run: QEMU                     ─┘
//! ```
//!
//! The suite is not ours to ship: its built folder is given. What KVM itself does not do right fails in every
//! column; what differs from QEMU's column is ours to mend, or is in [`explained`].

pub mod list;
pub mod run;
pub mod suite;
pub mod table;

use std::path::Path;

use anyhow::{Result, ensure};
use berth_tests_framework::story::{Context, Story, Tier};

use run::{Machine, Outcome, Places, Verdict};

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

/// A failure that is known, and why.
#[derive(Debug)]
struct Known {
    tests: &'static [&'static str],
    machines: &'static [Machine],
    /// Checks that may fail. Where none has, that the program did not come to its end is known.
    checks: &'static [&'static str],
    reason: &'static str,
}

const OURS: &[Machine] = &[Machine::Kernel, Machine::Split];

const KNOWN: [Known; 5] = [
    Known {
        tests: &["realmode"],
        machines: &[Machine::Split],
        checks: &[],
        reason: "waits for an interrupt of a PIC, and the split irqchip has none",
    },
    Known {
        tests: &["eventinj"],
        machines: OURS,
        checks: &[
            "NP exception",
            "NP PF exceptions",
            "int 33 with shadowed stack",
        ],
        reason: "KVM on a processor without NRIPS advances RIP before it injects a software interrupt",
    },
    Known {
        tests: &["msr", "msr64"],
        machines: OURS,
        checks: &["Expected #GP on WRMSR(MSR_FS_BASE, 0xaaaaaaaaaaaaaaaa), got vector 0"],
        reason: "an emulated processor takes any address for FS_BASE and GS_BASE, and the guest dies of the second",
    },
    Known {
        tests: &["x2apic", "xapic"],
        machines: OURS,
        checks: &[],
        reason: "100 000 NMIs between two processors take an emulated one more than the limit",
    },
    // Each reads the timer's count twice and wants half a period of 10 ms at most between the two.
    Known {
        tests: &["x2apic", "xapic"],
        machines: OURS,
        checks: &[
            "TMCCT should not be reset to TMICT value",
            "TMCCT should be reset to the initial-count",
            "TMCCT should not be reset to init",
        ],
        reason: "an emulated or busy processor reads the timer's count more than 5 ms late",
    },
];

/// Why a test may have ended so on a machine.
#[must_use]
pub fn explained(test: &str, machine: Machine, outcome: &Outcome) -> Option<&'static str> {
    if outcome.verdict != Verdict::Fail {
        return None;
    }
    let is_known = |known: &&Known| {
        let mut failed = outcome.failed.iter();
        known.tests.contains(&test)
            && known.machines.contains(&machine)
            && failed.all(|check| known.checks.contains(&check.as_str()))
    };
    KNOWN.iter().find(is_known).map(|known| known.reason)
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
        if outcome.verdict == Verdict::Fail && explained(&test.name, machine, &outcome).is_none() {
            bad.push(format!(
                "{}: {} {:?}",
                test.name, outcome.note, outcome.failed
            ));
        }
    }
    ensure!(bad.is_empty(), "{}", bad.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn failed(checks: &[&str]) -> Outcome {
        Outcome {
            verdict: Verdict::Fail,
            passed: 1,
            failed: checks.iter().map(|check| (*check).to_owned()).collect(),
            skipped: 0,
            note: String::new(),
            took: Duration::ZERO,
        }
    }

    #[test]
    fn only_the_checks_that_are_known_are_excused() {
        let known =
            |test, machine, checks: &[&str]| explained(test, machine, &failed(checks)).is_some();
        assert!(known("eventinj", Machine::Kernel, &["NP exception"]));
        assert!(!known(
            "eventinj",
            Machine::Kernel,
            &["NP exception", "NMI"]
        ));
        assert!(!known("eventinj", Machine::Qemu, &["NP exception"]));
        assert!(known("realmode", Machine::Split, &[]));
        assert!(!known("realmode", Machine::Split, &["sti inhibit"]));
        assert!(!known("realmode", Machine::Kernel, &[]));
        let late = "TMCCT should not be reset to TMICT value";
        assert!(known("xapic", Machine::Split, &[late]));
        let lost = "Want 2 IPI(s) using physical mode, dest = f, got 1 IPI(s)";
        assert!(!known("xapic", Machine::Split, &[late, lost]));
        let passed = Outcome {
            verdict: Verdict::Pass,
            ..failed(&[])
        };
        assert_eq!(explained("realmode", Machine::Split, &passed), None);
    }
}
