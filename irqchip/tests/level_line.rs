//! Lines: IOAPIC pins raised by an eventfd, edge-triggered and level-triggered with resampling.

use berth_irqchip::{Error, Mode, Trigger};

use crate::guest::{Machine, is_signalled, note, wait_for};

const PIN: u32 = 10;

fn a_level_line_interrupts_until_the_condition_is_gone(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    let resample = line.resample().unwrap();
    cpu.set_ioapic_level(PIN, 0x50);

    let mut work_left = 3;
    line.raise().unwrap();
    while work_left > 0 {
        assert_eq!(cpu.interrupt(), 0x50);
        work_left -= 1;
        cpu.eoi();
        wait_for(resample);
        if work_left > 0 {
            line.raise().unwrap();
        }
    }

    assert!(!cpu.ioapic_remote_irr(PIN));
    machine.assert_no_interrupt();
    assert!(!is_signalled(resample));
    assert_eq!(machine.chip.counters().line_raises, 3);
}

fn the_device_is_asked_again_only_when_the_guest_has_ended_the_interrupt(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    let resample = line.resample().unwrap();
    cpu.set_ioapic_level(PIN, 0x50);

    line.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    if !cpu.in_service(0x50) {
        // Not ours to test: software implementations of KVM's hardware half exist that do so.
        return note("skipped: this KVM ends an interrupt as it delivers it");
    }
    assert!(cpu.ioapic_remote_irr(PIN));
    assert!(!is_signalled(resample));
    cpu.eoi();
    wait_for(resample);
    assert!(!cpu.ioapic_remote_irr(PIN));
    machine.assert_no_interrupt();
}

fn two_level_lines_share_a_pin(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let [one, other] = [(); 2].map(|()| machine.chip.line(PIN, Trigger::Level).unwrap());
    cpu.set_ioapic_level(PIN, 0x50);

    one.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(one.resample().unwrap());
    wait_for(other.resample().unwrap());

    other.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(one.resample().unwrap());
    wait_for(other.resample().unwrap());
    machine.assert_no_interrupt();
}

fn an_edge_line_interrupts_once_for_each_write(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(4, Trigger::Edge).unwrap();
    assert!(line.resample().is_none());
    cpu.set_ioapic_edge(4, 0x54);
    for _ in 0..3 {
        line.raise().unwrap();
        assert_eq!(cpu.interrupt(), 0x54);
        cpu.eoi();
    }
    machine.assert_no_interrupt();
}

fn each_pin_is_its_own_number(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    for pin in 0..24 {
        cpu.set_ioapic_edge(pin, 0x80 + pin as u8);
    }
    for pin in 0..24 {
        machine
            .chip
            .line(pin, Trigger::Edge)
            .unwrap()
            .raise()
            .unwrap();
        assert_eq!(u32::from(cpu.interrupt()), 0x80 + pin);
        cpu.eoi();
    }
    machine.assert_no_interrupt();
}

fn a_dropped_line_is_silent(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    machine.cpu(0).set_ioapic_level(PIN, 0x50);
    let devices = line.event().try_clone().unwrap();
    assert_eq!(machine.chip.counters().lines, 1);
    drop(line);
    assert_eq!(machine.chip.counters().lines, 0);
    devices.write(1).unwrap();
    machine.assert_no_interrupt();
}

fn a_pin_that_does_not_exist_is_refused(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let error = machine.chip.line(24, Trigger::Edge).unwrap_err();
    assert!(matches!(error, Error::NoPin { pin: 24 }));
    assert_eq!(
        error.to_string(),
        "there is no IOAPIC pin 24, the last one is 23"
    );
}

fn a_driven_level_comes_again_until_it_is_low(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    machine.chip.drive(PIN, true).unwrap();
    machine.assert_no_interrupt();
    cpu.set_ioapic_level(PIN, 0x50);
    for _ in 0..3 {
        assert_eq!(cpu.interrupt(), 0x50);
        cpu.eoi();
    }
    assert_eq!(cpu.interrupt(), 0x50);
    machine.chip.drive(PIN, false).unwrap();
    cpu.eoi();
    // A KVM that ends an interrupt as it delivers it has sent it once more.
    cpu.mask_ioapic(PIN);
    cpu.take_any(0x50);
    machine.assert_no_interrupt();
}

fn a_driven_edge_counts_when_it_rises(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.set_ioapic_edge(4, 0x54);
    for _ in 0..3 {
        machine.chip.drive(4, true).unwrap();
        assert_eq!(cpu.interrupt(), 0x54);
        cpu.eoi();
        machine.assert_no_interrupt();
        machine.chip.drive(4, false).unwrap();
        machine.assert_no_interrupt();
    }
    let error = machine.chip.drive(24, true).unwrap_err();
    assert!(matches!(error, Error::NoPin { pin: 24 }));
}

both_modes! {
    a_driven_level_comes_again_until_it_is_low,
    a_driven_edge_counts_when_it_rises,
    a_level_line_interrupts_until_the_condition_is_gone,
    the_device_is_asked_again_only_when_the_guest_has_ended_the_interrupt,
    two_level_lines_share_a_pin,
    an_edge_line_interrupts_once_for_each_write,
    each_pin_is_its_own_number,
    a_dropped_line_is_silent,
    a_pin_that_does_not_exist_is_refused,
}
