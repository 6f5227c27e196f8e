//! What doorbells, interrupts, IPIs and timers cost on this host, in both modes: a table.
//!
//!     cargo run --release -p berth-irqchip --example costs [ROUNDS]
//!
//! A micro-guest does the work on any `/dev/kvm`. One round measures everything once, in both modes, so that
//! what else the machine does falls on all alike; the table has the median of the rounds and their quartiles.
//!
//! * Doorbells: a loop of writes, less the same loop on memory. The guest does not leave the kernel but for
//!   the rows that say so.
//! * Interrupts: from the call on the host to the handler of a halted vCPU, and from there to the host again
//!   (an exit and a channel between two threads, the same for every row).
//! * IPI, timer: by the guest's TSC alone, from the write of ICR to the other vCPU's handler, and from the
//!   deadline to the handler.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement that cannot go on ends; its result is a table"
)]

#[allow(dead_code, unused_imports, reason = "the tests use all of it")]
#[path = "../tests/guest/mod.rs"]
mod guest;

use std::time::{Duration, Instant};

use berth_irqchip::{DoorbellAddress, Mode, Trigger};
use guest::{Cpu, Ipi, LVT_TIMER, Machine, START_PAGE, TSC_DEADLINE, TSC_DEADLINE_MODE};
use kvm_bindings::kvm_msi;

const WRITES: u32 = 2000;
const INTERRUPTS: u32 = 100;
const NOTIFY: u32 = 0xd000_3000;
const PORT: u16 = 0xc010;
/// Memory that nobody uses.
const SCRATCH: u32 = 0x8_0000;
const VECTOR: u8 = 0x41;
const PIN: u32 = 5;

/// Microseconds of one thing in each round, in kernel mode and in split mode.
#[derive(Default)]
struct Samples([Vec<f64>; 2]);

/// In the order in which things were first measured.
struct Table(Vec<(&'static str, Samples)>);

impl Table {
    fn add(&mut self, mode: Mode, what: &'static str, microseconds: f64) {
        let at = self.0.iter().position(|(name, _)| *name == what);
        let at = at.unwrap_or_else(|| {
            self.0.push((what, Samples::default()));
            self.0.len() - 1
        });
        self.0[at].1.0[usize::from(mode == Mode::Split)].push(microseconds);
    }

    fn print(&mut self) {
        println!("| µs each, median [quartiles] | kernel | split |\n|---|---|---|");
        for (what, samples) in &mut self.0 {
            let [kernel, split] = samples.0.each_mut().map(|samples| {
                samples.sort_by(f64::total_cmp);
                let at = |part: usize| samples[(samples.len() - 1) * part / 4];
                match samples.len() {
                    0 => "–".to_owned(),
                    _ => format!("{:.2} [{:.2}, {:.2}]", at(2), at(1), at(3)),
                }
            });
            println!("| {what} | {kernel} | {split} |");
        }
    }
}

fn main() {
    let rounds = std::env::args().nth(1);
    let Ok(rounds) = rounds.as_deref().unwrap_or("15").parse::<u32>() else {
        eprintln!("costs: the number of rounds is no number");
        std::process::exit(2);
    };
    let mut table = Table(Vec::new());
    for _ in 0..rounds {
        for mode in [Mode::Kernel, Mode::Split] {
            let Some(machine) = Machine::new(mode, 2) else {
                return;
            };
            doorbells(&mut table, mode, &machine);
            interrupts(&mut table, mode, &machine);
            ipis(&mut table, mode, &machine);
            timers(&mut table, mode, machine.cpu(0));
        }
    }
    table.print();
}

fn each(duration: Duration, count: u32) -> f64 {
    duration.as_secs_f64() * 1e6 / f64::from(count)
}

fn timed(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    each(start.elapsed(), WRITES)
}

fn doorbells(table: &mut Table, mode: Mode, machine: &Machine) {
    let cpu = machine.cpu(0);
    let doorbell = machine.chip.doorbell().unwrap();
    // Once before, so that what is made on first use is there.
    cpu.write32_times(SCRATCH, 0, WRITES);
    let memory = timed(|| cpu.write32_times(SCRATCH, 0, WRITES));
    table.add(mode, "loop: a write of memory", memory);
    let gpa = u64::from(NOTIFY);
    let mut ring = |what, at, write: &dyn Fn()| {
        doorbell.place(at).unwrap();
        table.add(mode, what, timed(write) - memory);
        doorbell.remove().unwrap();
        assert_eq!(doorbell.event().read().unwrap(), u64::from(WRITES));
    };
    let write = || cpu.write32_times(NOTIFY, 1, WRITES);
    let at = DoorbellAddress::MmioAny { gpa };
    ring("doorbell: length 0", at, &write);
    let at = DoorbellAddress::Mmio {
        gpa,
        len: 4,
        datamatch: Some(1),
    };
    ring("doorbell: datamatch", at, &write);
    let at = DoorbellAddress::Pio {
        port: PORT,
        len: 2,
        datamatch: None,
    };
    ring("doorbell: port", at, &|| cpu.out16_times(PORT, 1, WRITES));
    let port = timed(|| cpu.exits_by_port(WRITES)) - memory;
    table.add(mode, "exit to user space: port", port);
    let mmio = timed(|| cpu.exits_by_memory(WRITES)) - memory;
    table.add(mode, "exit to user space: memory", mmio);
}

/// From the host's call to the handler and back.
fn round_trips(cpu: &Cpu, vector: u8, raise: impl Fn()) -> f64 {
    let mut total = Duration::ZERO;
    for _ in 0..INTERRUPTS {
        cpu.halt();
        let start = Instant::now();
        raise();
        assert_eq!(cpu.woken_by(), vector);
        total += start.elapsed();
        cpu.eoi();
    }
    each(total, INTERRUPTS)
}

fn interrupts(table: &mut Table, mode: Mode, machine: &Machine) {
    let cpu = machine.cpu(0);
    let start = Instant::now();
    (0..INTERRUPTS).for_each(|_| cpu.eoi());
    let command = each(start.elapsed(), INTERRUPTS);
    table.add(mode, "an empty command and its answer", command);
    let msi = machine.msi(VECTOR);
    let irqfd = round_trips(cpu, VECTOR, || msi.event().write(1).unwrap());
    table.add(mode, "interrupt: MSI by irqfd", irqfd);
    let message = kvm_msi {
        address_lo: 0xfee0_0000,
        data: VECTOR.into(),
        ..Default::default()
    };
    let signal = round_trips(cpu, VECTOR, || {
        machine.vm().signal_msi(message).unwrap();
    });
    table.add(mode, "interrupt: MSI by KVM_SIGNAL_MSI", signal);

    cpu.set_ioapic_edge(PIN, VECTOR + 1);
    let line = machine.chip.line(PIN, Trigger::Edge).unwrap();
    let edge = round_trips(cpu, VECTOR + 1, || line.raise().unwrap());
    table.add(mode, "interrupt: edge line by irqfd", edge);
    drop(line);
    let driven = round_trips(cpu, VECTOR + 1, || {
        machine.chip.drive(PIN, true).unwrap();
        machine.chip.drive(PIN, false).unwrap();
    });
    let what = "interrupt: edge by KVM_IRQ_LINE (split: KVM_SIGNAL_MSI)";
    table.add(mode, what, driven);
    cpu.set_ioapic_level(PIN + 1, VECTOR + 2);
    let line = machine.chip.line(PIN + 1, Trigger::Level).unwrap();
    let level = round_trips(cpu, VECTOR + 2, || line.raise().unwrap());
    table.add(mode, "interrupt: level line by irqfd", level);
}

fn ipis(table: &mut Table, mode: Mode, machine: &Machine) {
    let (first, second) = (machine.cpu(0), machine.cpu(1));
    first.send_ipi(1, Ipi::Init);
    first.send_ipi(1, Ipi::Startup(START_PAGE));
    second.enable_apic();
    let mut cycles = 0;
    for _ in 0..INTERRUPTS {
        second.halt();
        let sent = first.send_ipi_at(1, Ipi::Fixed(VECTOR));
        let (_, taken) = second.woken_at();
        // Clocks of two vCPUs may differ by a few cycles.
        cycles += taken.saturating_sub(sent);
        second.eoi();
    }
    table.add(mode, "IPI to a halted vCPU", microseconds(cycles, first));
}

fn timers(table: &mut Table, mode: Mode, cpu: &Cpu) {
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | u64::from(VECTOR));
    let mut cycles = 0;
    for _ in 0..INTERRUPTS {
        let deadline = cpu.read_tsc() + u64::from(cpu.tsc_khz());
        cpu.write_msr(TSC_DEADLINE, deadline);
        cpu.halt();
        let (_, taken) = cpu.woken_at();
        cycles += taken.saturating_sub(deadline);
        cpu.eoi();
    }
    let late = microseconds(cycles, cpu);
    table.add(mode, "timer: lateness of a deadline in 1 ms", late);
}

/// Of one interrupt.
fn microseconds(cycles: u64, cpu: &Cpu) -> f64 {
    cycles as f64 / f64::from(INTERRUPTS) * 1000.0 / f64::from(cpu.tsc_khz())
}
