//! A chip that is held: what was written before has arrived, what is written meanwhile waits.

use berth_irqchip::{Error, Mode, Trigger};

use crate::guest::{Machine, to_cpu0, wait_for};
use crate::save_restore::{Devices, EDGE_PIN, FREE_PIN, LEVEL_PIN, MASKED_PIN, moved};

/// KVM has a worker of its own carry events to its IOAPIC and PICs. It is done when the chip is held: no vCPU has
/// been looked at yet, and nothing between the write and the look would give it time.
#[test]
fn what_was_raised_a_moment_before_has_arrived_when_the_chip_is_held() {
    for _ in 0..20 {
        let Some(machine) = Machine::new(Mode::Kernel, 1) else {
            return;
        };
        for pin in [3, 4, 5, 6, 7] {
            let edge = machine.chip.line(pin, Trigger::Edge).unwrap();
            edge.raise().unwrap();
            let held = machine.chip.hold(&[]).unwrap();
            assert!(machine.is_requested_at_pic(pin), "edge at pin {pin}");
            drop(held);
        }
        for pin in 16..24 {
            let level = machine.chip.line(pin, Trigger::Level).unwrap();
            level.raise().unwrap();
            let held = machine.chip.hold(&[]).unwrap();
            assert!(machine.is_asserted(pin), "level at pin {pin}");
            drop(held);
            assert!(machine.is_asserted(pin), "level at pin {pin}, released");
            drop(level);
            assert!(!machine.is_asserted(pin), "nobody is left at pin {pin}");
        }
    }
}

/// The same for all of a machine, and for what a vector had pending when it was unmasked.
fn what_was_raised_a_moment_before_arrives_there_and_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_edge(EDGE_PIN, 0x54);
    machine.cpu(0).set_ioapic_level(LEVEL_PIN, 0x50);
    devices.msis[0].set_message(to_cpu0(0x41)).unwrap();
    devices.msis[0].mask().unwrap();
    let mut here = (machine, devices);
    for _ in 0..30 {
        let (machine, devices) = here;
        devices.msis[0].event().write(1).unwrap();
        devices.msis[0].unmask().unwrap();
        devices.level.raise().unwrap();
        devices.edge.raise().unwrap();

        let (machine, devices) = moved(machine, devices);
        let cpu = machine.cpu(0);
        for vector in [0x54, 0x50, 0x41] {
            assert_eq!(cpu.interrupt(), vector);
            cpu.eoi();
        }
        wait_for(devices.level.resample().unwrap());
        machine.assert_no_interrupt();
        devices.msis[0].mask().unwrap();
        here = (machine, devices);
    }
}

/// A device in another process does not know that the machine is being saved.
fn what_is_raised_while_the_chip_is_held_is_saved_and_comes_here_too(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_edge(EDGE_PIN, 0x54);
    machine.cpu(0).set_ioapic_level(LEVEL_PIN, 0x50);
    devices.msis[0].set_message(to_cpu0(0x41)).unwrap();
    let take_all = |machine: &Machine, devices: &Devices| {
        let cpu = machine.cpu(0);
        // KVM's worker brings them, in any order.
        for vector in [0x54, 0x50, 0x41] {
            cpu.wait_requested(vector);
        }
        for vector in [0x54, 0x50, 0x41] {
            assert_eq!(cpu.interrupt(), vector);
            cpu.eoi();
        }
        wait_for(devices.level.resample().unwrap());
        machine.assert_no_interrupt();
    };

    let saved = {
        let msis = devices.msis();
        let held = machine.chip.hold(&msis).unwrap();
        devices.msis[0].event().write(1).unwrap();
        devices.level.raise().unwrap();
        devices.edge.raise().unwrap();
        machine.look(&held)
    };
    take_all(&machine, &devices);
    drop((machine, devices));
    let (machine, devices) = Machine::restored(&saved, Devices::new, Devices::msis);
    take_all(&machine, &devices);
}

/// The pin of a level line stays high though KVM has no line there meanwhile.
fn a_chip_that_was_held_goes_on_as_if_it_had_not_been(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    let cpu = machine.cpu(0);
    devices.masked.raise().unwrap();
    devices.msis[0].set_message(to_cpu0(0x41)).unwrap();
    devices.msis[1].set_message(to_cpu0(0x42)).unwrap();
    devices.msis[1].mask().unwrap();
    let before = machine.chip.counters();
    let msis = devices.msis();
    for _ in 0..3 {
        let held = machine.chip.hold(&msis).unwrap();
        assert_eq!(machine.chip.counters().msis_attached, 0);
        let error = machine.chip.hold(&msis).unwrap_err();
        assert!(matches!(error, Error::Held));
        // What a device does meanwhile is done when the chip goes on.
        devices.msis[1].unmask().unwrap();
        devices.msis[0].mask().unwrap();
        devices.msis[0].unmask().unwrap();
        devices.msis[1].mask().unwrap();
        drop(held);
        assert_eq!(machine.chip.counters(), before);
    }
    let line = {
        let _held = machine.chip.hold(&msis).unwrap();
        machine.chip.line(FREE_PIN, Trigger::Edge).unwrap()
    };
    cpu.set_ioapic_edge(FREE_PIN, 0x55);
    line.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x55);
    cpu.eoi();
    machine.wait_asserted(MASKED_PIN);
    cpu.set_ioapic_level(MASKED_PIN, 0x51);
    devices.answer_resample();
    assert_eq!(cpu.interrupt(), 0x51);
    cpu.eoi();
    wait_for(devices.masked.resample().unwrap());
    devices.msis[0].event().write(1).unwrap();
    assert_eq!(cpu.interrupt(), 0x41);
    cpu.eoi();
    machine.assert_no_interrupt();
}

both_modes! {
    what_was_raised_a_moment_before_arrives_there_and_once,
    what_is_raised_while_the_chip_is_held_is_saved_and_comes_here_too,
    a_chip_that_was_held_goes_on_as_if_it_had_not_been,
}
