//! `berth-kvm-unit-tests`: runs a built kvm-unit-tests under berth-vmm and QEMU and prints the table.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use berth_tests_cases::kvm_unit_tests::run::{self, Machine, Places};
use berth_tests_cases::kvm_unit_tests::suite::{self, Test};
use berth_tests_cases::kvm_unit_tests::table::{self, Row};
use berth_tests_framework::{story, wait};
use clap::{Parser, ValueEnum};

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MachineName {
    /// berth-vmm with irqchip=kernel
    Kernel,
    /// berth-vmm with irqchip=split
    Split,
    /// QEMU
    Qemu,
}

/// Runs the x86 programs of a built kvm-unit-tests under berth-vmm, beside QEMU on the same KVM
#[derive(Debug, Parser)]
#[command(
    name = "berth-kvm-unit-tests",
    version,
    after_help = "\
Examples:
  berth-kvm-unit-tests --suite ~/kvm-unit-tests --vmm target/release/berth-vmm
  berth-kvm-unit-tests --suite ~/kvm-unit-tests --all --list
  berth-kvm-unit-tests --suite ~/kvm-unit-tests --tests x2apic,ioapic --machines kernel,qemu --json
Exit code: 0 nothing of ours fails that QEMU does not, 1 something does, 2 it could not be run.
The suite is built with: ./configure && make (its folder holds x86/unittests.cfg and x86/*.flat)."
)]
struct Args {
    /// Folder of the built suite
    #[arg(long, value_name = "DIR")]
    suite: PathBuf,
    /// berth-vmm
    #[arg(long, value_name = "PATH", default_value = "target/release/berth-vmm")]
    vmm: PathBuf,
    /// QEMU
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: String,
    /// Logs, one a run
    #[arg(long, value_name = "DIR", default_value = "target/kvm-unit-tests")]
    out: PathBuf,
    /// The table's columns
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "kernel,split,qemu"
    )]
    machines: Vec<MachineName>,
    /// Only these tests, by the names of unittests.cfg
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    tests: Vec<String>,
    /// Every test of the suite, not only those about interrupts, timers and vCPUs
    #[arg(long)]
    all: bool,
    /// Factor on every time limit
    #[arg(long, value_name = "FACTOR", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    patience: u32,
    /// Runs nothing: prints the tests that would run, a line each, and why one would not
    #[arg(long)]
    list: bool,
    /// JSON in place of the table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("berth-kvm-unit-tests: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    if !args.suite.join("x86/unittests.cfg").exists() {
        println!(
            "skipped kvm-unit-tests: no suite in {}",
            args.suite.display()
        );
        return Ok(true);
    }
    let tests = chosen(args)?;
    if args.list {
        for test in &tests {
            let reason = test.skip.as_ref().map(|reason| format!(": skip, {reason}"));
            println!("{}{}", test.name, reason.unwrap_or_default());
        }
        return Ok(true);
    }
    let rows = run_all(args, &tests)?;
    if args.json {
        println!("{:#}", table::to_json(&rows));
    } else {
        print!("{}", table::text(&rows));
    }
    Ok(rows.iter().all(|row| row.regressions().is_empty()))
}

/// The tests that the arguments name, in the suite's order.
fn chosen(args: &Args) -> Result<Vec<Test>> {
    let mut tests = suite::read(&args.suite, args.all || !args.tests.is_empty())?;
    for name in &args.tests {
        let known = tests.iter().any(|test| test.name == *name);
        ensure!(
            known,
            "the suite has no test '{name}' (--all --list prints them)"
        );
    }
    tests.retain(|test| args.tests.is_empty() || args.tests.contains(&test.name));
    Ok(tests)
}

fn run_all(args: &Args, tests: &[Test]) -> Result<Vec<Row>> {
    wait::set_patience(args.patience);
    story::clean_up_on_signals()?;
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let absolute = |path: &PathBuf| {
        path.canonicalize()
            .with_context(|| format!("no such file: {}", path.display()))
    };
    let places = Places {
        suite: absolute(&args.suite)?,
        vmm: absolute(&args.vmm)?,
        qemu: args.qemu.clone(),
        out: absolute(&args.out)?,
    };
    let mut rows = Vec::new();
    for test in tests {
        let mut outcomes = Vec::new();
        for machine in args.machines.iter().map(machine) {
            let outcome = run::run(&places, test, machine)?;
            let (name, seconds) = (machine.name(), outcome.took.as_secs_f64());
            eprintln!(
                "{} on {name}: {} in {seconds:.1} s",
                test.name, outcome.verdict
            );
            outcomes.push((machine, outcome));
        }
        rows.push(Row {
            test: test.name.clone(),
            outcomes,
        });
    }
    Ok(rows)
}

fn machine(name: &MachineName) -> Machine {
    match name {
        MachineName::Kernel => Machine::Kernel,
        MachineName::Split => Machine::Split,
        MachineName::Qemu => Machine::Qemu,
    }
}
