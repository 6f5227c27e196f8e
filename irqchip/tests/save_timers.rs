//! Timers in the middle of a count, and PICs in the middle of an interrupt, go on in another VM.

use berth_irqchip::{Chip, Line, Mode, Trigger};
use std::sync::Arc;

use crate::guest::{Cpu, Machine, note};
use crate::pit::{
    PIC_COMMAND, PIC_END_OF_INTERRUPT, PIT_CHANNEL0, PIT_CONTROL, PIT_ONCE, PIT_PERIODIC, count,
    load, start_pics,
};
use crate::save_restore::{Devices, moved};

const PIT_CHANNEL2: u16 = 0x42;
/// Channel 2, low byte then high byte, mode 0.
const PIT2_ONCE: u8 = 0xb0;
/// Read-back command: the next read of channel 0 is its status.
const PIT0_STATUS: u8 = 0xe2;
const STATUS_OUT: u8 = 1 << 7;
const SPEAKER: u16 = 0x61;
/// The output of channel 2.
const SPEAKER_OUT: u8 = 1 << 5;
/// The longest a channel counts: 55 ms.
const LONGEST: u16 = 0xffff;
const SLAVE_COMMAND: u16 = PIC_COMMAND + 0x80;
/// The next read of the command port is of the in-service register, or of the request register.
const READ_IN_SERVICE: u8 = 0x0b;
const READ_REQUEST: u8 = 0x0a;

#[test]
fn a_pit_that_counts_down_once_interrupts_once_there() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_edge(0, 0x48);
    load(machine.cpu(0), PIT_ONCE, PIT_CHANNEL0, LONGEST);

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    assert_eq!(cpu.interrupt(), 0x48);
    cpu.eoi();
    cpu.out8(PIT_CONTROL, PIT0_STATUS);
    if cpu.in8(PIT_CHANNEL0) & STATUS_OUT == 0 {
        // It had run out before it was saved, on a busy machine. KVM, which does not say so, has it count again.
        assert_eq!(cpu.interrupt(), 0x48);
        cpu.eoi();
    }
    cpu.mask_ioapic(0);
    cpu.take_any(0x48);
    machine.assert_no_interrupt();
}

#[test]
fn a_periodic_pit_keeps_its_period_there() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_edge(0, 0x48);
    load(machine.cpu(0), PIT_PERIODIC, PIT_CHANNEL0, 0x4000);

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    for _ in 0..5 {
        assert_eq!(cpu.interrupt(), 0x48);
        cpu.eoi();
        assert!(
            count(cpu, PIT_CHANNEL0) <= 0x4000,
            "its count is the period"
        );
    }
}

/// What a guest measures its TSC against.
#[test]
fn channel_2_goes_on_where_it_was() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    let cpu = machine.cpu(0);
    load(cpu, PIT2_ONCE, PIT_CHANNEL2, LONGEST);
    let mut before = LONGEST;
    while before > LONGEST / 2 && !out_is_high(cpu) {
        before = count(cpu, PIT_CHANNEL2);
    }

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    let after = count(cpu, PIT_CHANNEL2);
    // High, it had run out, as may be on a busy machine; it counts on below zero then.
    assert!(
        after < before || out_is_high(cpu),
        "{before} became {after}"
    );
    while !out_is_high(cpu) {}
}

#[test]
fn channel_2_that_has_run_out_stays_high() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    load(machine.cpu(0), PIT2_ONCE, PIT_CHANNEL2, LONGEST);
    while !out_is_high(machine.cpu(0)) {}

    let (machine, _devices) = moved(machine, devices);
    assert!(out_is_high(machine.cpu(0)), "it counts anew");
}

fn out_is_high(cpu: &Cpu) -> bool {
    cpu.in8(SPEAKER) & SPEAKER_OUT != 0
}

/// Interrupts 4, 10 and 11, of which the latter two are the slave's.
fn isa_lines(chip: &Arc<Chip>) -> [Line; 3] {
    [4, 10, 11].map(|pin| chip.line(pin, Trigger::Edge).unwrap())
}

/// One is in service at the slave, one waits behind it there, and one at the master.
#[test]
fn pics_with_an_interrupt_in_service_and_two_in_request_go_on_there() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let lines = isa_lines(&machine.chip);
    let cpu = machine.cpu(0);
    start_pics(cpu, 1 << 2 | 1 << 4 | 1 << 10 | 1 << 11);
    lines[1].raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x3a);
    lines[2].raise().unwrap();
    lines[0].raise().unwrap();

    let saved = machine.save(&[]);
    drop(lines);
    let (machine, lines) = Machine::restored(&saved, isa_lines, |_| Vec::new());
    let cpu = machine.cpu(0);
    let read = |port, which| {
        cpu.out8(port, which);
        cpu.in8(port)
    };
    assert_eq!(read(SLAVE_COMMAND, READ_IN_SERVICE), 1 << 2);
    assert_eq!(read(SLAVE_COMMAND, READ_REQUEST), 1 << 3);
    assert_eq!(read(PIC_COMMAND, READ_IN_SERVICE), 1 << 2, "the cascade");
    assert_ne!(read(PIC_COMMAND, READ_REQUEST) & 1 << 4, 0);
    machine.assert_no_interrupt();
    let end = |slave| {
        if slave {
            cpu.out8(SLAVE_COMMAND, PIC_END_OF_INTERRUPT);
        }
        cpu.out8(PIC_COMMAND, PIC_END_OF_INTERRUPT);
    };
    end(true);
    assert_eq!(cpu.interrupt(), 0x3b);
    end(true);
    assert_eq!(cpu.interrupt(), 0x34);
    end(false);
    machine.assert_no_interrupt();
    lines[1].raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x3a);
    end(true);
    machine.assert_no_interrupt();
}

fn a_local_timer_that_counts_down_once_goes_on_where_it_was(mode: Mode) {
    /// Two seconds of KVM's nanoseconds.
    const COUNT: u32 = 2_000_000_000;
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    let cpu = machine.cpu(0);
    cpu.start_timer_once(0x71, COUNT);
    let mut before = COUNT;
    while before > COUNT - COUNT / 8 {
        before = cpu.timer_count();
    }
    if before < COUNT / 8 {
        return note("skipped: this machine is too busy to save a timer of two seconds");
    }

    let (machine, _devices) = moved(machine, devices);
    let after = machine.cpu(0).timer_count();
    assert!(after <= before, "{before} became {after}");
    assert_eq!(machine.cpu(0).interrupt(), 0x71);
    machine.cpu(0).eoi();
    assert_eq!(machine.cpu(0).timer_count(), 0);
    machine.assert_no_interrupt();
}

/// KVM has the interrupt nowhere that it shows: it is on its way to the local APIC when the vCPU runs again.
fn a_local_timer_that_ran_out_while_the_vcpu_was_out_is_not_lost(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).start_timer_once(0x71, 1);

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    assert_eq!(cpu.interrupt(), 0x71);
    cpu.eoi();
    machine.assert_no_interrupt();
}

both_modes! {
    a_local_timer_that_counts_down_once_goes_on_where_it_was,
    a_local_timer_that_ran_out_while_the_vcpu_was_out_is_not_lost,
}
