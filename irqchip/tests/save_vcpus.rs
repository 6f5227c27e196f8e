//! Machines of several vCPUs, saved with each of them in another state, and with events that a vCPU was about to
//! take.

use berth_irqchip::{Mode, MsiMessage};

use crate::guest::{Ipi, Machine, START_PAGE, to_cpu0};
use crate::save_restore::{Devices, moved};

const NMI: u8 = 2;
const INVALID_OPCODE: u8 = 6;

/// The message that raises `vector` on a vCPU.
fn to_cpu(id: u8, vector: u8) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000 | u64::from(id) << 12,
        data: vector.into(),
    }
}

fn start(machine: &Machine, id: usize) {
    let boot = machine.cpu(0);
    boot.send_ipi(id as u32, Ipi::Init);
    boot.send_ipi(id as u32, Ipi::Startup(START_PAGE));
    machine.cpu(id).enable_apic();
}

fn one_halted_one_running_and_one_that_waits_to_be_started(mode: Mode) {
    let Some(machine) = Machine::new(mode, 4) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    start(&machine, 1);
    start(&machine, 2);
    machine.cpu(0).send_ipi(3, Ipi::Init);
    for (msi, id) in devices.msis.iter().zip([1, 2]) {
        msi.set_message(to_cpu(id, 0x60 + id)).unwrap();
    }
    machine.cpu(1).halt();
    machine.cpu(2).spin();

    let (machine, devices) = moved(machine, devices);
    for id in [2, 1] {
        devices.msis[id - 1].event().write(1).unwrap();
        let cpu = machine.cpu(id);
        assert_eq!(usize::from(cpu.woken_by()), 0x60 + id);
        cpu.eoi();
        assert_eq!(cpu.apic_id(), id as u32);
        // Once: an IPI with the lowest vector is the next it takes.
        machine.cpu(0).send_ipi(id as u32, Ipi::Fixed(0x20));
        assert_eq!(cpu.interrupt(), 0x20);
        cpu.eoi();
    }
    machine.cpu(0).send_ipi(3, Ipi::Startup(START_PAGE));
    machine.cpu(3).enable_apic();
    machine.cpu(0).send_ipi(3, Ipi::Fixed(0x63));
    assert_eq!(machine.cpu(3).interrupt(), 0x63);
    machine.assert_no_interrupt();
}

/// Each vCPU has an interrupt in request from another: what is saved of one does not depend on which is first.
fn ipis_that_wait_on_every_vcpu_arrive_there(mode: Mode) {
    let Some(machine) = Machine::new(mode, 3) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    start(&machine, 1);
    start(&machine, 2);
    for id in 0..3_u8 {
        let next = (id + 1) % 3;
        machine
            .cpu(id.into())
            .send_ipi(next.into(), Ipi::Fixed(0x60 + next));
    }

    let (machine, _devices) = moved(machine, devices);
    for id in 0..3 {
        let cpu = machine.cpu(id);
        assert_eq!(usize::from(cpu.interrupt()), 0x60 + id);
        cpu.eoi();
        cpu.send_ipi(id as u32, Ipi::Fixed(0x20));
        assert_eq!(cpu.interrupt(), 0x20, "its own, and no other before");
        cpu.eoi();
    }
}

fn a_pending_nmi_is_taken_there_and_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    let mut nmi = to_cpu0(0);
    nmi.data = 4 << 8;
    devices.msis[0].set_message(nmi).unwrap();
    devices.msis[0].event().write(1).unwrap();
    assert_eq!(machine.cpu(0).events().nmi.pending, 1);

    let (machine, _devices) = moved(machine, devices);
    assert_eq!(machine.cpu(0).taken_on_arrival(), Some(NMI));
    let nmi = machine.cpu(0).events().nmi;
    assert_eq!((nmi.pending, nmi.injected), (0, 0));
    machine.assert_no_interrupt();
}

/// An exception that KVM had begun to deliver when the vCPU left.
fn an_injected_exception_is_taken_there_and_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).change_events(|events| {
        events.exception.injected = 1;
        events.exception.nr = INVALID_OPCODE;
    });

    let (machine, _devices) = moved(machine, devices);
    assert_eq!(machine.cpu(0).taken_on_arrival(), Some(INVALID_OPCODE));
    assert_eq!(machine.cpu(0).events().exception.injected, 0);
    machine.assert_no_interrupt();
}

/// An interrupt that has left the local APIC's request register and not reached its handler.
fn an_injected_interrupt_is_taken_there_and_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let devices = Devices::new(&machine.chip);
    machine.cpu(0).spin();
    machine.cpu(0).park();
    machine.cpu(0).change_events(|events| {
        events.interrupt.injected = 1;
        events.interrupt.nr = 0x6e;
    });

    let (machine, _devices) = moved(machine, devices);
    assert_eq!(machine.cpu(0).woken_by(), 0x6e);
    assert_eq!(machine.cpu(0).events().interrupt.injected, 0);
    machine.assert_no_interrupt();
}

both_modes! {
    one_halted_one_running_and_one_that_waits_to_be_started,
    ipis_that_wait_on_every_vcpu_arrive_there,
    a_pending_nmi_is_taken_there_and_once,
    an_injected_exception_is_taken_there_and_once,
    an_injected_interrupt_is_taken_there_and_once,
}
