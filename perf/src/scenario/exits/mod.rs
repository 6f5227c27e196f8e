//! What a request costs in exits, interrupts, system calls and context switches, in a steady load of a real guest:
//! counted by kernels, the host's (KVM's statistics, tracepoints, /proc) and the guest's (/proc/interrupts), never
//! by a program that is measured.
//!
//! ```text
//!   n requests: start, end, console + n · request         ─┐
//!   2n requests: start, end, console + 2n · request       ─┴─▶ difference: n requests and nothing else
//! ```
//!
//! Counts are exact, in the lab too, where time is not. Each subject's guest stays up for the whole scenario.

mod counts;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use self::counts::Counts;
use super::guest::{Machine, Stage};
use super::{Better, Bound, Cell, Entry, Metric, Need, Of, Sample, Scenario, Subject};
use crate::context::Context;
use crate::interrupt;

/// This scenario.
pub const ENTRY: Entry = Entry {
    name: "exits",
    about: "exits, interrupts, system calls and context switches per request, by the kernel's count",
    needs: &[Need::Root, Need::Guest],
    metrics: &[
        each("user_exits", "exits to user space per request"),
        each(
            "interrupts",
            "interrupts of the disk per request, as the guest counts them",
        ),
        each("exits", "exits from the guest per request, all reasons"),
        each(
            "injections",
            "interrupts that KVM injects per request, timers too",
        ),
        each(
            "system_calls",
            "system calls of all processes of the VM per request",
        ),
        each(
            "switches",
            "context switches of all processes of the VM per request",
        ),
    ],
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 100 } else { 300 }),
};

/// None: what rounding leaves of a few accesses in a thousand requests that have nothing to do with these.
const NONE: f64 = 0.005;
/// The goal at a depth of 32.
const INTERRUPTS: f64 = 0.5;

const fn each(name: &'static str, about: &'static str) -> Metric {
    Metric {
        name,
        unit: "per request",
        better: Better::Less,
        about,
    }
}

fn cells() -> Vec<Cell> {
    let none = |cell: Cell| cell.goal("user_exits", Of::Itself, Bound::AtMost(NONE));
    let qd1 = Cell::new("read-qd1", "reads of 4 KiB, one in flight");
    let qd32 = Cell::new("read-qd32", "reads of 4 KiB, 32 in flight");
    let few = Bound::AtMost(INTERRUPTS);
    vec![
        none(qd1.quick().rounds(5, 1)),
        none(qd32.quick().rounds(5, 1)).goal("interrupts", Of::Itself, few),
    ]
}

/// A command that makes about `count` requests with as many in flight as the cell says.
fn load(cell: &str, count: u32) -> Result<String> {
    let dd = "dd if=/dev/vda of=/dev/null bs=4k iflag=direct";
    match cell {
        "read-qd1" => Ok(format!("{dd} count={count} 2>/dev/null")),
        "read-qd32" => {
            let each = count / 32;
            Ok(format!(
                "for n in $(seq 0 31); do {dd} skip=$((n * 500)) count={each} 2>/dev/null & done; wait"
            ))
        }
        _ => bail!("no such load: {cell}"),
    }
}

struct Exits {
    stage: Stage,
    machines: BTreeMap<usize, Machine>,
    requests: u32,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let mut stage = Stage::new(context, "exits")?;
    stage.add_storage_daemon(context);
    Ok(Box::new(Exits {
        stage,
        machines: BTreeMap::new(),
        requests: if context.quick { 960 } else { 3200 },
    }))
}

impl Scenario for Exits {
    fn subjects(&self) -> Vec<Subject> {
        self.stage.subjects()
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        interrupt::check()?;
        if !self.machines.contains_key(&subject) {
            let machine = self.stage.boot(subject, 1, 256)?;
            self.machines.insert(subject, machine);
        }
        let machine = self.machines.get_mut(&subject).context("just started")?;
        let [short, long] = [1, 2].map(|times| load(&cell.name, times * self.requests));
        let counted = Counts::of(machine, &short?).and_then(|short| {
            interrupt::check()?;
            Counts::of(machine, &long?)?.less(&short)
        });
        if counted.is_err() {
            // Whatever it was, the next round has a guest of its own.
            self.machines.remove(&subject);
        }
        Ok(sample(&counted?))
    }
}

fn sample(counts: &Counts) -> Sample {
    let each = |count: u64| count as f64 / counts.requests as f64;
    let reasons = counts
        .kvm
        .iter()
        .filter(|(name, _)| name.ends_with("_exits") || *name == "insn_emulation")
        .filter(|(_, count)| each(**count) >= NONE)
        .map(|(name, count)| format!("{} {:.2}", name.trim_end_matches("_exits"), each(*count)));
    let reasons: Vec<String> = reasons.collect();
    Sample::new()
        .figure("user_exits", each(counts.user_exits))
        .figure("interrupts", each(counts.interrupts))
        .figure("exits", each(counts.kvm("exits")))
        .figure("injections", each(counts.kvm("irq_injections")))
        .figure("system_calls", each(counts.system_calls))
        .figure("switches", each(counts.switches))
        .note(format!(
            "exits per request by KVM's reasons: {}",
            reasons.join(", ")
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_a_load_within_the_disk() {
        for cell in cells() {
            let load = load(&cell.name, 6400).unwrap();
            assert!(load.contains("iflag=direct"), "{load}");
        }
        assert!(load("write-qd1", 1).is_err());
        // 64 MiB: the last reader of 32 begins at 31 · 500 blocks and reads 6400 / 32.
        let end = 31 * 500 + 6400 / 32;
        assert!(end <= 64 << 8 && 6400 <= 64 << 8);
    }

    #[test]
    fn figures_are_per_request_and_reasons_are_named() {
        let counts = Counts {
            requests: 1000,
            interrupts: 400,
            user_exits: 2,
            system_calls: 3000,
            switches: 1500,
            kvm: BTreeMap::from([
                ("exits".to_owned(), 2500),
                ("halt_exits".to_owned(), 1000),
                ("io_exits".to_owned(), 1),
                ("irq_injections".to_owned(), 450),
            ]),
        };
        let sample = sample(&counts);
        assert_eq!(sample.figures["interrupts"], 0.4);
        assert_eq!(sample.figures["exits"], 2.5);
        assert_eq!(sample.figures["user_exits"], 0.002);
        assert_eq!(
            sample.notes,
            ["exits per request by KVM's reasons: halt 1.00"]
        );
    }
}
