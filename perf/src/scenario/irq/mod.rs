//! What doorbells, interrupts, IPIs and timers cost on this host: a micro-guest on any `/dev/kvm`, under both of
//! KVM's interrupt controllers (all in the kernel; split, only the local APICs there).
//!
//! ```text
//!   guest ── write ──▶ ioeventfd │ exit to user space      doorbell: a loop of writes less one on memory
//!   host ── irqfd │ ioctl ──▶ sleeping vCPU ──▶ handler ──▶ exit    interrupt: by the host's clock
//!   vCPU 0 ── ICR ──▶ sleeping vCPU 1 ──▶ handler           IPI, and a deadline to its handler: by the guest's TSC
//! ```
//!
//! A subject is a way of doing it: `no-eventfd` is the exit to user space or the ioctl (KVM_SIGNAL_MSI,
//! KVM_IRQ_LINE) that an eventfd saves. Those marked as ours are the ways that `irqchip/` takes, which adds nothing to
//! them: after set-up an eventfd is all that its users hold. Programs of ours take no part. A repetition has a
//! machine of its own (two vCPUs, 1 MiB). Threads run where the kernel puts them, and nothing keeps cores awake:
//! waking a vCPU that sleeps is part of an interrupt.

mod cpu;
mod machine;
mod measure;
mod monitor;

use std::time::Duration;

use anyhow::{Context as _, Result};

use self::machine::Mode;
use self::measure::{Counts, What};
use super::{Better, Bound, Cell, Entry, Metric, Need, Of, Sample, Scenario, Subject};
use crate::context::Context;
use crate::histogram::Histogram;
use crate::interrupt;
use crate::stats::Spread;

/// This scenario.
pub const ENTRY: Entry = Entry {
    name: "irq",
    about: "doorbells, interrupts, IPIs and timers: a micro-guest on any /dev/kvm, both irqchip modes",
    needs: &[Need::Kvm],
    metrics: &[
        Metric {
            name: "us",
            unit: "µs",
            better: Better::Less,
            about: "one doorbell beyond a write of memory, or one interrupt: median",
        },
        Metric {
            name: "p99_us",
            unit: "µs",
            better: Better::Less,
            about: "the same, of 99 in 100 interrupts",
        },
    ],
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 15 } else { 60 }),
};

/// A doorbell that stays in the kernel costs at most so much of one that does not.
const DOORBELL: f64 = 0.2;
/// An eventfd costs at most so much of the ioctl that it saves.
const IRQFD: f64 = 1.15;

/// Who does what in which cell: cell, subject, mode, what.
const WAYS: &[(&str, &str, Mode, What)] = &[
    (
        "doorbell-memory-kernel",
        "no-eventfd",
        Mode::Kernel,
        What::ExitMemory,
    ),
    (
        "doorbell-memory-kernel",
        "eventfd",
        Mode::Kernel,
        What::DoorbellAny,
    ),
    (
        "doorbell-memory-kernel",
        "datamatch",
        Mode::Kernel,
        What::DoorbellMatch,
    ),
    (
        "doorbell-memory-split",
        "no-eventfd",
        Mode::Split,
        What::ExitMemory,
    ),
    (
        "doorbell-memory-split",
        "eventfd",
        Mode::Split,
        What::DoorbellAny,
    ),
    (
        "doorbell-memory-split",
        "datamatch",
        Mode::Split,
        What::DoorbellMatch,
    ),
    (
        "doorbell-port-kernel",
        "no-eventfd",
        Mode::Kernel,
        What::ExitPort,
    ),
    (
        "doorbell-port-kernel",
        "eventfd",
        Mode::Kernel,
        What::DoorbellPort,
    ),
    ("msi-kernel", "no-eventfd", Mode::Kernel, What::MsiIoctl),
    ("msi-kernel", "eventfd", Mode::Kernel, What::MsiIrqfd),
    ("msi-split", "no-eventfd", Mode::Split, What::MsiIoctl),
    ("msi-split", "eventfd", Mode::Split, What::MsiIrqfd),
    ("edge-kernel", "no-eventfd", Mode::Kernel, What::EdgeIoctl),
    ("edge-kernel", "eventfd", Mode::Kernel, What::EdgeIrqfd),
    ("level-kernel", "eventfd", Mode::Kernel, What::LevelIrqfd),
    ("ipi", "kernel", Mode::Kernel, What::Ipi),
    ("ipi", "split", Mode::Split, What::Ipi),
    ("timer", "kernel", Mode::Kernel, What::Timer),
    ("timer", "split", Mode::Split, What::Timer),
];

fn cells() -> Vec<Cell> {
    let cell = |name, title| Cell::new(name, title).quick().rounds(15, 5).warm_up(1);
    let doorbell = |name, title| cell(name, title).goal("us", Of::Limit, Bound::AtMost(DOORBELL));
    let message = |name, title| cell(name, title).goal("us", Of::Limit, Bound::AtMost(IRQFD));
    vec![
        doorbell(
            "doorbell-memory-kernel",
            "a doorbell in memory, irqchip in the kernel",
        ),
        doorbell(
            "doorbell-memory-split",
            "a doorbell in memory, split irqchip",
        ),
        doorbell("doorbell-port-kernel", "a doorbell on a port"),
        message(
            "msi-kernel",
            "a message to a sleeping vCPU, irqchip in the kernel",
        ),
        message("msi-split", "a message to a sleeping vCPU, split irqchip"),
        cell("edge-kernel", "an edge on a pin, to a sleeping vCPU"),
        cell("level-kernel", "a level on a pin, to a sleeping vCPU"),
        cell("ipi", "an IPI to a halted vCPU"),
        cell("timer", "lateness of a TSC deadline in 1 ms"),
    ]
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let counts = if context.quick {
        Counts {
            writes: 1000,
            interrupts: 50,
        }
    } else {
        Counts {
            writes: 2000,
            interrupts: 200,
        }
    };
    Ok(Box::new(Irq { counts }))
}

struct Irq {
    counts: Counts,
}

fn subjects() -> Vec<Subject> {
    vec![
        Subject::limit("no-eventfd"),
        Subject::ours("eventfd"),
        Subject::variant("datamatch"),
        Subject::ours("kernel"),
        Subject::variant("split"),
    ]
}

fn way(cell: &str, subject: &str) -> Option<(Mode, What)> {
    WAYS.iter()
        .find(|(its_cell, its_subject, ..)| *its_cell == cell && *its_subject == subject)
        .map(|(_, _, mode, what)| (*mode, *what))
}

impl Scenario for Irq {
    fn subjects(&self) -> Vec<Subject> {
        subjects()
    }

    fn fits(&self, cell: &Cell, subject: usize) -> bool {
        way(&cell.name, &subjects()[subject].name).is_some()
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        interrupt::check()?;
        let subject = &subjects()[subject].name;
        let (mode, what) = way(&cell.name, subject).context("nobody does this so")?;
        sample(&measure::measure(what, mode, self.counts)?)
    }
}

/// Of one repetition's figures.
fn sample(all: &[f64]) -> Result<Sample> {
    let spread = Spread::of(all.iter().copied()).context("nothing was measured")?;
    let sample = Sample::new().figure("us", spread.median);
    if all.len() == 1 {
        return Ok(sample);
    }
    let mut histogram = Histogram::default();
    for us in all {
        histogram.record(Duration::from_secs_f64(us / 1e6));
    }
    let p99_us = histogram.quantile_us(0.99);
    Ok(sample.figure("p99_us", p99_us).latencies(histogram))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_its_cell_and_its_subject_and_every_cell_a_way() {
        let (cells, subjects) = (cells(), subjects());
        for (cell, subject, mode, what) in WAYS {
            assert!(cells.iter().any(|known| known.name == *cell), "{cell}");
            assert!(
                subjects.iter().any(|known| known.name == *subject),
                "{subject}"
            );
            let of_pin = [What::EdgeIrqfd, What::EdgeIoctl, What::LevelIrqfd].contains(what);
            assert!(
                !of_pin || *mode == Mode::Kernel,
                "{cell}: the split mode has no pins"
            );
        }
        for cell in cells {
            assert!(
                WAYS.iter().any(|(name, ..)| *name == cell.name),
                "{}",
                cell.name
            );
        }
    }

    #[test]
    fn many_figures_have_a_median_and_a_tail_and_one_has_none() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let both = sample(&hundred).unwrap();
        assert_eq!(both.figures["us"], 50.5);
        assert!((98.0..=101.0).contains(&both.figures["p99_us"]));
        let one = sample(&[0.4]).unwrap();
        assert!(one.figures["us"] == 0.4 && !one.figures.contains_key("p99_us"));
        assert!(sample(&[]).is_err());
    }

    /// Every way is gone: doorbells ring as often as they are written, each interrupt is the one that was raised.
    #[test]
    fn a_micro_guest_does_everything_that_is_asked_of_it() {
        if std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            eprintln!("skipped: no /dev/kvm");
            return;
        }
        let counts = Counts {
            writes: 50,
            interrupts: 3,
        };
        for (cell, subject, mode, what) in WAYS {
            let all = measure::measure(*what, *mode, counts);
            let all = all.unwrap_or_else(|error| panic!("{cell} {subject}: {error:#}"));
            let loops = cell.starts_with("doorbell");
            assert_eq!(all.len(), if loops { 1 } else { 3 }, "{cell} {subject}");
            assert!(all.iter().all(|us| us.is_finite() && *us >= 0.0), "{all:?}");
            assert!(
                loops || all.iter().any(|us| *us > 0.0),
                "{cell} {subject}: {all:?}"
            );
        }
    }
}
