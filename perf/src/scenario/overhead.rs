//! What a guest costs beside its own memory: private memory of every process of a VM (the VMM, one disk's daemon,
//! one card's daemon, the launcher), measured alike for peers, whose devices are threads of the VMM or the kernel.
//!
//! The guest has booted, its card has carried a frame and its disk has been read. Its memory is left out,
//! mapping by mapping (`guest::memory`). What the kernel holds for a VM (KVM, vhost-net) is in nobody's figure.

use std::time::Duration;

use anyhow::Result;

use super::guest::memory::Memory;
use super::guest::{COMMAND_LIMIT, Stage};
use super::{Better, Bound, Cell, Entry, Metric, Need, Of, Sample, Scenario, Subject};
use crate::context::Context;
use crate::interrupt;

/// This scenario.
pub const ENTRY: Entry = Entry {
    name: "overhead",
    about: "private memory of every process of a VM, its guest's memory left out",
    needs: &[Need::Root, Need::Guest],
    metrics: &[
        mib("private_mib", "all processes"),
        mib("vmm_mib", "the VMM"),
        mib("others_mib", "daemons and helpers of the VM"),
    ],
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 60 } else { 150 }),
};

/// The goal: VMM, one disk and one card together. It aims at 5.
const LIMIT_MIB: f64 = 8.0;

const fn mib(name: &'static str, about: &'static str) -> Metric {
    Metric {
        name,
        unit: "MiB",
        better: Better::Less,
        about,
    }
}

fn cells() -> Vec<Cell> {
    vec![
        Cell::new("vcpu1", "1 vCPU, 256 MiB, one disk, one card")
            .quick()
            .rounds(3, 1)
            .goal("private_mib", Of::Itself, Bound::AtMost(LIMIT_MIB)),
    ]
}

struct Overhead {
    stage: Stage,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let mut stage = Stage::new(context, "overhead")?;
    stage.add_storage_daemon(context);
    Ok(Box::new(Overhead { stage }))
}

impl Scenario for Overhead {
    fn subjects(&self) -> Vec<Subject> {
        self.stage.subjects()
    }

    fn measure(&mut self, _cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        interrupt::check()?;
        let mut machine = self.stage.boot(subject, 1, 256)?;
        machine.network_up()?;
        let read = "dd if=/dev/vda of=/dev/null bs=64k count=128 iflag=direct 2>/dev/null";
        machine.console.sh_within(read, COMMAND_LIMIT)?;
        Ok(sample(&machine.memory()?))
    }
}

/// The VMM is the first.
fn sample(processes: &[(String, Memory)]) -> Sample {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let all: u64 = processes.iter().map(|(_, memory)| memory.private).sum();
    let vmm = processes.first().map_or(0, |(_, memory)| memory.private);
    let parts: Vec<String> = processes
        .iter()
        .map(|(name, memory)| format!("{name} {:.1}", mib(memory.private)))
        .collect();
    Sample::new()
        .figure("private_mib", mib(all))
        .figure("vmm_mib", mib(vmm))
        .figure("others_mib", mib(all - vmm))
        .note(format!("MiB: {}", parts.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_all_processes_and_each_is_named() {
        let of = |private: u64| Memory {
            private: private << 20,
            guest: 1 << 30,
        };
        let processes = [
            ("berth-vmm".to_owned(), of(4)),
            ("berth-blk".to_owned(), of(2)),
            ("berth-net".to_owned(), of(1)),
        ];
        let sample = sample(&processes);
        assert_eq!(sample.figures["private_mib"], 7.0);
        assert_eq!(sample.figures["vmm_mib"], 4.0);
        assert_eq!(sample.figures["others_mib"], 3.0);
        assert_eq!(
            sample.notes,
            ["MiB: berth-vmm 4.0, berth-blk 2.0, berth-net 1.0"]
        );
    }
}
