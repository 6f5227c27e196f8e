//! What is peculiar to the split irqchip: our own IOAPIC, no PIC, no PIT, APIC ids past 255.

use berth_irqchip::{Mode, MsiMessage, Trigger};

use crate::guest::{Exit, Ipi, Machine, START_PAGE, is_signalled, note, wait_for};

const PIN: u32 = 10;

#[test]
fn ports_of_pit_and_pic_are_nobodys() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let ports = [0x20, 0x21, 0x40, 0x43, 0x61, 0xa0, 0xa1];
    for port in ports {
        cpu.out8(port, 0xff);
    }
    let data = vec![0xff];
    let nobodys = ports.map(|port| Exit::Pio {
        port,
        data: data.clone(),
    });
    assert_eq!(machine.take_exits(), nobodys);
}

#[test]
fn a_masked_pin_ignores_edges_and_keeps_a_level() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let edge = machine.chip.line(4, Trigger::Edge).unwrap();
    let level = machine.chip.line(PIN, Trigger::Level).unwrap();
    edge.raise().unwrap();
    edge.event().write(1).unwrap();
    level.raise().unwrap();
    cpu.set_ioapic_edge(4, 0x54);
    machine.assert_no_interrupt();

    cpu.set_ioapic_level(PIN, 0x50);
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(level.resample().unwrap());
    edge.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x54);
    cpu.eoi();
    machine.assert_no_interrupt();
}

#[test]
fn a_line_that_is_raised_again_before_the_end_is_one_interrupt_and_asked_again() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    cpu.set_ioapic_level(PIN, 0x50);
    line.raise().unwrap();
    line.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(line.resample().unwrap());
    machine.assert_no_interrupt();
    assert_eq!(machine.chip.counters().ends_of_interrupt, 1);
}

#[test]
fn whoever_writes_the_eventfd_of_a_level_line_is_asked_again_too() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    let devices = line.event().try_clone().unwrap();
    cpu.set_ioapic_level(PIN, 0x50);
    for _ in 0..3 {
        devices.write(1).unwrap();
        assert_eq!(cpu.interrupt(), 0x50);
        cpu.eoi();
        wait_for(line.resample().unwrap());
    }
    machine.assert_no_interrupt();
}

/// The one thing in which `raise` is better: documented at `Line::event`.
#[test]
fn an_eventfd_written_directly_does_not_show_in_remote_irr_and_is_ended_all_the_same() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    cpu.set_ioapic_level(PIN, 0x50);
    line.event().write(1).unwrap();
    cpu.wait_requested(0x50);
    assert!(!cpu.ioapic_remote_irr(PIN));
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(line.resample().unwrap());

    line.raise().unwrap();
    cpu.wait_requested(0x50);
    assert!(cpu.ioapic_remote_irr(PIN), "raised by us it shows");
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.eoi();
    wait_for(line.resample().unwrap());
    machine.assert_no_interrupt();
}

#[test]
fn an_end_of_interrupt_after_the_pin_was_masked_still_asks() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    cpu.set_ioapic_level(PIN, 0x50);
    line.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    if !cpu.in_service(0x50) {
        return note("skipped: this KVM ends an interrupt as it delivers it");
    }
    cpu.mask_ioapic(PIN);
    assert!(!is_signalled(line.resample().unwrap()));
    cpu.eoi();
    wait_for(line.resample().unwrap());
    line.raise().unwrap();
    machine.assert_no_interrupt();
    cpu.set_ioapic_level(PIN, 0x51);
    assert_eq!(cpu.interrupt(), 0x51);
}

#[test]
fn the_eoi_register_ends_an_interrupt() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    cpu.set_ioapic_level(PIN, 0x50);
    line.raise().unwrap();
    assert_eq!(cpu.interrupt(), 0x50);
    cpu.end_ioapic_interrupt(0x50);
    assert!(!cpu.ioapic_remote_irr(PIN));
    assert!(is_signalled(line.resample().unwrap()));
}

#[test]
fn a_route_that_did_not_change_is_not_written_again() {
    let Some(machine) = Machine::new(Mode::Split, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.set_ioapic_edge(4, 0x54);
    let before = machine.chip.counters().routing_updates;
    cpu.mask_ioapic(4);
    cpu.set_ioapic_edge(4, 0x54);
    assert_eq!(machine.chip.counters().routing_updates, before);
}

/// APIC 300 is started, interrupted by an MSI, by an IOAPIC pin and by an IPI, all of which name it in
/// more than eight bits.
#[test]
fn an_apic_id_past_255_is_reached_by_everything() {
    const ID: u16 = 300;
    let Some(machine) = Machine::with_ids(Mode::Split, &[0, ID]) else {
        return;
    };
    if !machine.chip.has_extended_destinations() {
        return note("skipped: no KVM_CAP_X2APIC_API");
    }
    let (boot, far) = (machine.cpu(0), machine.cpu(1));
    boot.send_ipi(ID.into(), Ipi::Init);
    boot.send_ipi(ID.into(), Ipi::Startup(START_PAGE));
    far.enable_apic();
    assert_eq!(far.apic_id(), u32::from(ID));

    let msi = machine.chip.msi().unwrap();
    let address = 0xfee0_0000 | u64::from(ID & 0xff) << 12 | u64::from(ID >> 8) << 5;
    msi.set_message(MsiMessage {
        address,
        data: 0x62,
    })
    .unwrap();
    msi.event().write(1).unwrap();
    assert_eq!(far.interrupt(), 0x62);
    far.eoi();

    let line = machine.chip.line(PIN, Trigger::Level).unwrap();
    boot.set_ioapic_level_to(PIN, 0x63, ID);
    line.raise().unwrap();
    assert_eq!(far.interrupt(), 0x63);
    far.eoi();
    wait_for(line.resample().unwrap());

    boot.send_ipi(ID.into(), Ipi::Fixed(0x64));
    assert_eq!(far.interrupt(), 0x64);
    far.eoi();
    machine.assert_no_interrupt();
}
