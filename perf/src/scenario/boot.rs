//! How long a guest takes to come up, by step, under berth-vmm and its peers: the same kernel, initramfs, disk and
//! card, one guest at a time.
//!
//! ```text
//!   start ──▶ first instruction ──▶ kernel's clock starts ──▶ init ──▶ agent answers ──▶ network answers
//!     │ vmm_ms        │  loader_ms              │ kernel_ms   │  init_ms      │  network_ms     │
//!     │◀─────────────────── boot_ms ─────────────────────────▶│                                 │
//!     │◀──────────────────────────────────────── up_ms ────────────────────────────────────────▶│
//! ```
//!
//! * `vmm_ms` is from the kernel's trace (`kvm_entry`), the same for all; for us it has the start of two daemons in
//!   it, for the peers none.
//! * The kernel's clock (printk) starts some way into the kernel: firmware, decompression and its first steps are
//!   `loader_ms`. The agent writes into the kernel's log when it is ready, which ties that clock to the host's.
//! * `exits` are KVM's own counts up to the agent, the card's set-up not included.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use berth_tests_framework::console::READY;
use berth_tests_framework::kernel_counts::kvm_stat;

use super::guest::first_entry::FirstEntry;
use super::guest::{COMMAND_LIMIT, Machine, Stage};
use super::{Better, Bound, Cell, Entry, Metric, Need, Of, Sample, Scenario, Subject};
use crate::context::Context;
use crate::interrupt;

/// This scenario.
pub const ENTRY: Entry = Entry {
    name: "boot",
    about: "process start to first instruction, kernel, init and network, by step",
    needs: &[Need::Root, Need::Guest],
    metrics: &[
        ms("boot_ms", "process start to init"),
        ms(
            "vmm_ms",
            "our own share: process start to the guest's first instruction",
        ),
        ms(
            "loader_ms",
            "first instruction to the start of the kernel's clock",
        ),
        ms("kernel_ms", "the kernel, up to init"),
        ms("init_ms", "init, up to the agent"),
        ms(
            "network_ms",
            "the agent, up to an answer of the host to a ping",
        ),
        ms("up_ms", "all of it"),
        Metric {
            name: "exits",
            unit: "",
            better: Better::Less,
            about: "exits from the guest up to the agent",
        },
        Metric {
            name: "user_exits",
            unit: "",
            better: Better::Less,
            about: "those for ports and memory that are emulated",
        },
    ],
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 75 } else { 420 }),
};

/// The goal, of the best peer's.
const SHARE: f64 = 0.9;

const fn ms(name: &'static str, about: &'static str) -> Metric {
    Metric {
        name,
        unit: "ms",
        better: Better::Less,
        about,
    }
}

fn cells() -> Vec<Cell> {
    let goal = |cell: Cell| cell.goal("boot_ms", Of::BestPeer, Bound::AtMost(SHARE));
    vec![
        goal(Cell::new("vcpu1", "1 vCPU, 256 MiB"))
            .quick()
            .rounds(7, 2)
            .named("boot_ms", "boot_time_ms"),
        goal(Cell::new("vcpu4", "4 vCPUs, 256 MiB")).rounds(5, 1),
    ]
}

fn vcpus(cell: &str) -> Result<u32> {
    let count = cell
        .strip_prefix("vcpu")
        .and_then(|count| count.parse().ok());
    count.with_context(|| format!("no such guest: {cell}"))
}

struct Boot {
    stage: Stage,
    trace: FirstEntry,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let stage = Stage::new(context, "boot")?;
    let trace = FirstEntry::new(&mut context.janitor)?;
    Ok(Box::new(Boot { stage, trace }))
}

impl Scenario for Boot {
    fn subjects(&self) -> Vec<Subject> {
        self.stage.subjects()
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        interrupt::check()?;
        let trace = &self.trace;
        let started = self
            .stage
            .start(subject, vcpus(&cell.name)?, 256, || trace.begin());
        let (mut machine, began) = started?;
        machine.wait_ready()?;
        let ready = began.elapsed();
        let vmm = self.trace.finish(&machine.threads()?)?;
        let exits = kvm_stat(&machine.vmm, "exits")?;
        let user = kvm_stat(&machine.vmm, "io_exits")? + kvm_stat(&machine.vmm, "mmio_exits")?;
        let asked = Instant::now();
        machine.network_up()?;
        let network = asked.elapsed();
        let clock = kernel_clock(&mut machine)?;
        let steps = Steps::new(vmm, ready, network, clock)?;
        Ok(steps
            .sample()
            .figure("exits", exits as f64)
            .figure("user_exits", user as f64))
    }
}

/// The kernel's clock at two moments.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Clock {
    init: Duration,
    ready: Duration,
}

fn kernel_clock(machine: &mut Machine) -> Result<Clock> {
    let log = machine.console.sh_within(
        "dmesg | grep -e 'Run .* as init' -e 'berth-agent'",
        COMMAND_LIMIT,
    )?;
    clock_in(&log)
}

/// In lines such as `[    1.234567] Run /init as init process`.
fn clock_in(log: &str) -> Result<Clock> {
    let at = |what: &str| {
        let line = log.lines().find(|line| line.contains(what));
        let line = line.with_context(|| {
            format!("the guest's kernel log says nothing of '{what}': make its initramfs anew with tests/lab/assets")
        })?;
        let stamp = line
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        let seconds = stamp.and_then(|(stamp, _)| stamp.trim().parse::<f64>().ok());
        let seconds = seconds.with_context(|| format!("a log line without a time: {line}"))?;
        Duration::try_from_secs_f64(seconds).context("a time before the kernel's start")
    };
    Ok(Clock {
        init: at("as init process")?,
        ready: at(READY)?,
    })
}

/// Of one boot.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Steps {
    vmm: Duration,
    loader: Duration,
    kernel: Duration,
    init: Duration,
    network: Duration,
}

impl Steps {
    /// From host times (first instruction, agent's line, the network's own) and the kernel's.
    fn new(vmm: Duration, ready: Duration, network: Duration, clock: Clock) -> Result<Steps> {
        let init = clock.ready.checked_sub(clock.init);
        let init = init.context("the guest's agent is older than its init")?;
        // Clocks may differ by less than a step of the host's takes to be noticed.
        let start = ready.saturating_sub(clock.ready).max(vmm);
        Ok(Steps {
            vmm,
            loader: start - vmm,
            kernel: clock.init,
            init,
            network,
        })
    }

    fn sample(self) -> Sample {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let boot = self.vmm + self.loader + self.kernel;
        Sample::new()
            .figure("boot_ms", ms(boot))
            .figure("vmm_ms", ms(self.vmm))
            .figure("loader_ms", ms(self.loader))
            .figure("kernel_ms", ms(self.kernel))
            .figure("init_ms", ms(self.init))
            .figure("network_ms", ms(self.network))
            .figure("up_ms", ms(boot + self.init + self.network))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_log_has_both_moments_or_says_what_to_do() {
        let log = "[    0.512000] Run /init as init process\n[    0.800000] berth-agent ready\n";
        let clock = clock_in(log).unwrap();
        assert_eq!(clock.init, Duration::from_millis(512));
        assert_eq!(clock.ready, Duration::from_millis(800));
        let old = log.lines().next().unwrap();
        let error = clock_in(old).unwrap_err().to_string();
        assert!(error.contains("tests/lab/assets"), "{error}");
    }

    #[test]
    fn steps_add_up_to_what_the_host_saw() {
        let ms = Duration::from_millis;
        let clock = Clock {
            init: ms(500),
            ready: ms(800),
        };
        let steps = Steps::new(ms(40), ms(1000), ms(70), clock).unwrap();
        assert_eq!(steps.loader, ms(160));
        let figures = steps.sample().figures;
        assert!((figures["boot_ms"] - 700.0).abs() < 1e-6);
        assert!((figures["up_ms"] - 1070.0).abs() < 1e-6);
        let swapped = Clock {
            init: ms(800),
            ready: ms(500),
        };
        assert!(Steps::new(ms(40), ms(1000), ms(70), swapped).is_err());
    }

    #[test]
    fn every_cell_says_how_many_vcpus() {
        for cell in cells() {
            assert!(vcpus(&cell.name).is_ok());
        }
        assert!(vcpus("vcpus").is_err() && vcpus("4").is_err());
    }
}
