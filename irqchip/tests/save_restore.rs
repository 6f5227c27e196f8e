//! A machine is saved with an interrupt in every stage of delivery, goes, and is restored in a new VM: each
//! interrupt arrives there, once.

use std::sync::Arc;

use berth_irqchip::{Chip, ChipState, Error, Line, Mode, Msi, Trigger};

use crate::guest::{
    LVT_TIMER, Machine, TSC_DEADLINE, TSC_DEADLINE_MODE, is_signalled, note, to_cpu0, wait_for,
};

pub(crate) const LEVEL_PIN: u32 = 10;
pub(crate) const MASKED_PIN: u32 = 11;
pub(crate) const EDGE_PIN: u32 = 4;
/// No line leads to it.
pub(crate) const FREE_PIN: u32 = 12;

/// What the VMM would have: lines and vectors, made in this order.
pub(crate) struct Devices {
    pub(crate) level: Line,
    pub(crate) masked: Line,
    pub(crate) edge: Line,
    pub(crate) msis: [Msi; 3],
}

impl Devices {
    pub(crate) fn new(chip: &Arc<Chip>) -> Self {
        let line = |pin, trigger| chip.line(pin, trigger).unwrap();
        Self {
            level: line(LEVEL_PIN, Trigger::Level),
            masked: line(MASKED_PIN, Trigger::Level),
            edge: line(EDGE_PIN, Trigger::Edge),
            msis: [(); 3].map(|()| chip.msi().unwrap()),
        }
    }

    /// KVM since 6.3 does not believe a line that was raised while its pin was masked: it asks the device,
    /// whose condition still holds.
    pub(crate) fn answer_resample(&self) {
        if is_signalled(self.masked.resample().unwrap()) {
            self.masked.raise().unwrap();
        }
    }

    pub(crate) fn msis(&self) -> Vec<&Msi> {
        self.msis.iter().collect()
    }
}

/// Saves the machine, lets it and its devices go, and restores it.
pub(crate) fn moved(machine: Machine, devices: Devices) -> (Machine, Devices) {
    let saved = machine.save(&devices.msis());
    drop(devices);
    Machine::restored(&saved, Devices::new, Devices::msis)
}

fn a_masked_vector_and_one_without_a_message_stay_pending(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    let [masked, without, quiet] = &devices.msis;
    masked.set_message(to_cpu0(0x41)).unwrap();
    masked.mask().unwrap();
    quiet.set_message(to_cpu0(0x43)).unwrap();
    quiet.mask().unwrap();
    for msi in [masked, without] {
        msi.event().write(1).unwrap();
    }

    let (machine, devices) = moved(machine, devices);
    let [masked, without, quiet] = &devices.msis;
    assert!(masked.is_pending() && without.is_pending() && !quiet.is_pending());
    machine.assert_no_interrupt();
    masked.unmask().unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x41);
    machine.cpu(0).eoi();
    without.set_message(to_cpu0(0x42)).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x42);
    machine.cpu(0).eoi();
    quiet.unmask().unwrap();
    machine.assert_no_interrupt();
}

fn a_request_in_the_local_apic_is_taken_there(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    devices.msis[0].set_message(to_cpu0(0x41)).unwrap();
    devices.msis[0].event().write(1).unwrap();
    machine.cpu(0).wait_requested(0x41);

    let (machine, devices) = moved(machine, devices);
    assert_eq!(machine.cpu(0).interrupt(), 0x41);
    machine.cpu(0).eoi();
    machine.assert_no_interrupt();
    devices.msis[0].event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x41, "the route is there too");
}

fn an_interrupt_in_service_is_ended_there(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    devices.msis[0].set_message(to_cpu0(0x41)).unwrap();
    devices.msis[0].event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x41);
    if !machine.cpu(0).in_service(0x41) {
        return note("skipped: this KVM ends an interrupt as it delivers it");
    }
    let (machine, _devices) = moved(machine, devices);
    assert!(machine.cpu(0).in_service(0x41));
    machine.cpu(0).eoi();
    assert!(!machine.cpu(0).in_service(0x41));
    machine.assert_no_interrupt();
}

fn a_level_line_in_service_is_asked_again_there(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_level(LEVEL_PIN, 0x50);
    devices.level.raise().unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x50);
    if !machine.cpu(0).in_service(0x50) {
        return note("skipped: this KVM ends an interrupt as it delivers it");
    }
    assert!(machine.cpu(0).ioapic_remote_irr(LEVEL_PIN));

    let (machine, devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    assert!(cpu.ioapic_remote_irr(LEVEL_PIN));
    cpu.eoi();
    wait_for(devices.level.resample().unwrap());
    assert!(!cpu.ioapic_remote_irr(LEVEL_PIN));
    devices.level.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(devices.level.resample().unwrap());
    machine.assert_no_interrupt();
}

fn a_level_line_that_waits_to_be_unmasked_arrives_there(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_edge(EDGE_PIN, 0x54);
    devices.masked.raise().unwrap();
    machine.wait_asserted(MASKED_PIN);

    let (machine, devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    machine.assert_no_interrupt();
    cpu.set_ioapic_level(MASKED_PIN, 0x51);
    devices.answer_resample();
    assert_eq!(cpu.interrupt(), 0x51);
    cpu.eoi();
    wait_for(devices.masked.resample().unwrap());
    devices.edge.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x54, "the pin is programmed as it was");
    cpu.eoi();
    machine.assert_no_interrupt();
}

fn an_armed_deadline_fires_there_and_not_before(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | 0x70);
    // Long enough to be saved before, on any machine.
    let deadline = cpu.read_tsc() + 500_000_000;
    cpu.write_msr(TSC_DEADLINE, deadline);
    let devices = Devices::new(&machine.chip);

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    assert!(cpu.read_tsc() > 0);
    assert_eq!(cpu.interrupt(), 0x70);
    assert!(
        cpu.read_tsc() >= deadline,
        "early: the clock went on too far"
    );
    cpu.eoi();
    machine.assert_no_interrupt();
}

fn a_driven_level_stays_high_there_until_it_is_low(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_level(LEVEL_PIN, 0x50);
    machine.chip.drive(LEVEL_PIN, true).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x50);

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    for _ in 0..3 {
        cpu.eoi();
        assert_eq!(cpu.interrupt(), 0x50, "it is high still");
    }
    machine.chip.drive(LEVEL_PIN, false).unwrap();
    cpu.eoi();
    cpu.mask_ioapic(LEVEL_PIN);
    cpu.take_any(0x50);
    machine.assert_no_interrupt();
}

fn a_driven_level_that_waits_to_be_unmasked_arrives_there(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.chip.drive(FREE_PIN, true).unwrap();

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    machine.assert_no_interrupt();
    cpu.set_ioapic_level(FREE_PIN, 0x50);
    assert_eq!(cpu.interrupt(), 0x50);
}

/// The line on the same pin lets go of it at the end of the interrupt; who drives it does not.
fn a_driven_level_is_not_let_go_of_with_a_line_on_its_pin(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_level(LEVEL_PIN, 0x50);
    machine.chip.drive(LEVEL_PIN, true).unwrap();
    devices.level.raise().unwrap();
    machine.cpu(0).wait_requested(0x50);

    let (machine, devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(devices.level.resample().unwrap());
    for _ in 0..3 {
        assert_eq!(cpu.interrupt(), 0x50, "it is high still");
        cpu.eoi();
    }
}

/// A device that wrote its eventfd, and whose interrupt has ended without our having been told.
fn an_end_that_was_on_its_way_is_not_lost(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_level(LEVEL_PIN, 0x50);
    devices.level.raise().unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x50);
    let asked = is_signalled(devices.level.resample().unwrap());

    let (machine, devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    if !asked {
        cpu.eoi();
        wait_for(devices.level.resample().unwrap());
    }
    assert!(!cpu.ioapic_remote_irr(LEVEL_PIN));
    devices.level.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
}

/// An edge that was taken is no edge there, though its wire is high.
fn a_driven_edge_that_was_taken_is_not_taken_again(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).set_ioapic_edge(EDGE_PIN, 0x54);
    machine.chip.drive(EDGE_PIN, true).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x54);
    machine.cpu(0).eoi();

    let (machine, _devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    machine.assert_no_interrupt();
    machine.chip.drive(EDGE_PIN, false).unwrap();
    machine.chip.drive(EDGE_PIN, true).unwrap();
    assert_eq!(cpu.interrupt(), 0x54);
}

#[test]
fn the_pit_ticks_on_there() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    machine.cpu(0).set_ioapic_edge(0, 0x48);
    crate::pit::start_periodic(machine.cpu(0));
    assert_eq!(machine.cpu(0).interrupt(), 0x48);
    machine.cpu(0).eoi();
    let devices = Devices::new(&machine.chip);

    let (machine, _devices) = moved(machine, devices);
    for _ in 0..5 {
        assert_eq!(machine.cpu(0).interrupt(), 0x48);
        machine.cpu(0).eoi();
    }
}

fn everything_at_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    let cpu = machine.cpu(0);
    cpu.set_ioapic_level(LEVEL_PIN, 0x50);
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | 0x70);
    cpu.write_msr(TSC_DEADLINE, 1);
    for (msi, vector) in devices.msis.iter().zip([0x41, 0x42, 0x43]) {
        msi.set_message(to_cpu0(vector)).unwrap();
    }
    devices.msis[0].mask().unwrap();
    for msi in &devices.msis[..2] {
        msi.event().write(1).unwrap();
    }
    devices.level.raise().unwrap();
    devices.masked.raise().unwrap();
    for vector in [0x42, 0x50, 0x70] {
        cpu.wait_requested(vector);
    }
    machine.wait_asserted(MASKED_PIN);

    let (machine, devices) = moved(machine, devices);
    let cpu = machine.cpu(0);
    // By priority, which is the vector's number.
    for vector in [0x70, 0x50, 0x42] {
        assert_eq!(cpu.interrupt(), vector);
        cpu.eoi();
    }
    wait_for(devices.level.resample().unwrap());
    devices.msis[0].unmask().unwrap();
    assert_eq!(cpu.interrupt(), 0x41);
    cpu.eoi();
    cpu.set_ioapic_level(MASKED_PIN, 0x51);
    devices.answer_resample();
    assert_eq!(cpu.interrupt(), 0x51);
    cpu.eoi();
    wait_for(devices.masked.resample().unwrap());
    machine.assert_no_interrupt();
}

#[test]
fn another_modes_state_and_a_missing_vector_are_refused() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    let state = machine.chip.hold(&[&msi]).unwrap().save(&[]).unwrap();
    let error = machine.chip.restore(&state, &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "saved interrupt state: vectors.gsi: no vector here has GSI 24"
    );
    let split = Machine::new(Mode::Split, 1).unwrap();
    let error = split.chip.restore(&state, &[&msi]).unwrap_err();
    assert!(matches!(&error, Error::BadState(bad) if bad.field == "mode"));
    let bytes = state.to_bytes();
    assert_eq!(ChipState::from_bytes(&bytes).unwrap(), state);
}

both_modes! {
    a_masked_vector_and_one_without_a_message_stay_pending,
    a_request_in_the_local_apic_is_taken_there,
    an_interrupt_in_service_is_ended_there,
    a_level_line_in_service_is_asked_again_there,
    a_level_line_that_waits_to_be_unmasked_arrives_there,
    an_armed_deadline_fires_there_and_not_before,
    a_driven_level_stays_high_there_until_it_is_low,
    a_driven_level_that_waits_to_be_unmasked_arrives_there,
    a_driven_level_is_not_let_go_of_with_a_line_on_its_pin,
    an_end_that_was_on_its_way_is_not_lost,
    a_driven_edge_that_was_taken_is_not_taken_again,
    everything_at_once,
}
