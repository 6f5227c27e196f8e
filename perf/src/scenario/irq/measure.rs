//! One thing on a machine of its own.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::cpu::{Cpu, Ipi};
use super::machine::{Machine, Mode, message};
use super::monitor::{EXIT_GPA, EXIT_PORT, SCRATCH};

const NOTIFY: u32 = 0xd000_3000;
const PORT: u16 = 0xc010;
const VECTOR: u8 = 0x41;
const PIN: u32 = 5;
/// Loops of which the fastest counts: what else the machine does only ever makes one slower.
const LOOPS: u32 = 5;
const LVT_TIMER: u32 = 0x832;
const TSC_DEADLINE_MODE: u64 = 2 << 17;
const TSC_DEADLINE: u32 = 0x6e0;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A write that an ioeventfd of length 0 takes.
    DoorbellAny,
    /// One that an ioeventfd with a value to match takes.
    DoorbellMatch,
    /// The same on a port.
    DoorbellPort,
    /// A write of a port that leaves the kernel.
    ExitPort,
    /// A write of memory that leaves the kernel.
    ExitMemory,
    /// A message by irqfd.
    MsiIrqfd,
    /// A message by KVM_SIGNAL_MSI.
    MsiIoctl,
    /// A pin of the IOAPIC by irqfd.
    EdgeIrqfd,
    /// The same by KVM_IRQ_LINE, up and down.
    EdgeIoctl,
    /// A level-triggered pin by irqfd, lowered by its resample eventfd.
    LevelIrqfd,
    /// From one vCPU to another that is halted.
    Ipi,
    /// How late a TSC deadline is.
    Timer,
}

/// How often things are done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) writes: u32,
    pub(super) interrupts: u32,
}

/// Microseconds: of doorbells and exits one figure, beyond the same loop on memory; else one for each interrupt.
pub(super) fn measure(what: What, mode: Mode, counts: Counts) -> Result<Vec<f64>> {
    let machine = Machine::new(mode)?;
    machine.route(mode, VECTOR)?;
    let cpu = machine.cpu(0);
    match what {
        What::DoorbellAny => {
            let at = IoEventAddress::Mmio(NOTIFY.into());
            doorbell(&machine, &at, NoDatamatch, counts.writes)
        }
        What::DoorbellMatch => {
            let at = IoEventAddress::Mmio(NOTIFY.into());
            doorbell(&machine, &at, 1_u32, counts.writes)
        }
        What::DoorbellPort => {
            let at = IoEventAddress::Pio(PORT.into());
            doorbell(&machine, &at, 1_u16, counts.writes)
        }
        What::ExitPort => beyond_memory(cpu, counts.writes, || {
            cpu.out16(EXIT_PORT, 0, counts.writes)
        }),
        What::ExitMemory => beyond_memory(cpu, counts.writes, || {
            cpu.write32(EXIT_GPA, 0, counts.writes)
        }),
        What::MsiIrqfd | What::MsiIoctl => message_times(what, &machine, counts.interrupts),
        What::EdgeIrqfd | What::EdgeIoctl | What::LevelIrqfd => {
            pin_times(what, &machine, counts.interrupts)
        }
        What::Ipi => ipis(&machine, counts.interrupts),
        What::Timer => timers(cpu, counts.interrupts),
    }
}

/// Writes that ring, and a check that each did.
fn doorbell(
    machine: &Machine,
    at: &IoEventAddress,
    datamatch: impl Into<u64> + Copy,
    writes: u32,
) -> Result<Vec<f64>> {
    let (cpu, vm) = (machine.cpu(0), machine.vm());
    let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
    vm.register_ioevent(&event, at, datamatch)
        .context("an ioeventfd")?;
    let took = beyond_memory(cpu, writes, || match at {
        IoEventAddress::Mmio(_) => cpu.write32(NOTIFY, 1, writes),
        IoEventAddress::Pio(_) => cpu.out16(PORT, 1, writes),
    })?;
    vm.unregister_ioevent(&event, at, datamatch)?;
    let rang = event.read().unwrap_or(0);
    let all = u64::from(writes) * u64::from(LOOPS);
    ensure!(rang == all, "{all} writes rang {rang} times");
    Ok(took)
}

/// What `run` takes for each of its writes beyond writes of memory.
fn beyond_memory(cpu: &Cpu, writes: u32, run: impl Fn() -> Result<Duration>) -> Result<Vec<f64>> {
    // Once before, so that what is made on first use is there.
    cpu.write32(SCRATCH, 0, writes)?;
    let (mut floor, mut best) = (Duration::MAX, Duration::MAX);
    for _ in 0..LOOPS {
        floor = floor.min(cpu.write32(SCRATCH, 0, writes)?);
        best = best.min(run()?);
    }
    let beyond = best.saturating_sub(floor);
    Ok(vec![beyond.as_secs_f64() * 1e6 / f64::from(writes)])
}

/// From the call on the host until the handler of a vCPU that sleeps has left the guest again.
fn raise_times(
    cpu: &Cpu,
    vector: u8,
    times: u32,
    raise: impl Fn() -> Result<()>,
) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    for _ in 0..times {
        cpu.halt()?;
        let start = Instant::now();
        raise()?;
        let (taken, _) = cpu.woken_by(vector)?;
        all.push(taken.saturating_duration_since(start).as_secs_f64() * 1e6);
        cpu.eoi()?;
    }
    Ok(all)
}

fn message_times(what: What, machine: &Machine, times: u32) -> Result<Vec<f64>> {
    let (cpu, vm) = (machine.cpu(0), machine.vm());
    if what == What::MsiIrqfd {
        let msi = machine.msi()?;
        return raise_times(cpu, VECTOR, times, || msi.raise());
    }
    raise_times(cpu, VECTOR, times, || {
        let sent = vm.signal_msi(message(VECTOR));
        sent.map(drop).context("KVM_SIGNAL_MSI")
    })
}

fn pin_times(what: What, machine: &Machine, times: u32) -> Result<Vec<f64>> {
    let (cpu, vm) = (machine.cpu(0), machine.vm());
    let level = what == What::LevelIrqfd;
    machine.programme_pin(PIN, VECTOR, level)?;
    if what == What::EdgeIoctl {
        return raise_times(cpu, VECTOR, times, || {
            vm.set_irq_line(PIN, true)?;
            vm.set_irq_line(PIN, false).context("KVM_IRQ_LINE")
        });
    }
    let pin = machine.pin(PIN, level)?;
    raise_times(cpu, VECTOR, times, || pin.raise())
}

/// From the write of ICR to the other vCPU's handler, by the guest's TSC alone.
fn ipis(machine: &Machine, times: u32) -> Result<Vec<f64>> {
    let (first, second) = (machine.cpu(0), machine.cpu(1));
    let mut all = Vec::new();
    for _ in 0..times {
        second.halt()?;
        let sent = first.send_ipi(1, Ipi::Fixed(VECTOR))?;
        let (_, taken) = second.woken_by(VECTOR)?;
        // Clocks of two vCPUs may differ by a few cycles.
        all.push(microseconds(taken.saturating_sub(sent), first));
        second.eoi()?;
    }
    Ok(all)
}

/// From the deadline, a millisecond ahead, to the handler.
fn timers(cpu: &Cpu, times: u32) -> Result<Vec<f64>> {
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | u64::from(VECTOR))?;
    let mut all = Vec::new();
    for _ in 0..times {
        let deadline = cpu.read_tsc()? + u64::from(cpu.tsc_khz());
        cpu.write_msr(TSC_DEADLINE, deadline)?;
        cpu.await_interrupt()?;
        let (_, taken) = cpu.woken_by(VECTOR)?;
        all.push(microseconds(taken.saturating_sub(deadline), cpu));
        cpu.eoi()?;
    }
    Ok(all)
}

fn microseconds(cycles: u64, cpu: &Cpu) -> f64 {
    cycles as f64 * 1000.0 / f64::from(cpu.tsc_khz())
}
