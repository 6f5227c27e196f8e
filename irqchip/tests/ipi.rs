//! Interrupts between vCPUs, and the start of the second one (Intel SDM 3A, 9.4 and 11.6).

use berth_irqchip::Mode;

use crate::guest::{Cpu, Ipi, Machine, START_PAGE};

fn start_cpu1(machine: &Machine) -> &Cpu {
    let (boot, second) = (machine.cpu(0), machine.cpu(1));
    boot.send_ipi(1, Ipi::Init);
    boot.send_ipi(1, Ipi::Startup(START_PAGE));
    second.enable_apic();
    second
}

fn the_second_vcpu_starts_by_init_and_startup(mode: Mode) {
    let Some(machine) = Machine::new(mode, 2) else {
        return;
    };
    let second = start_cpu1(&machine);
    assert_eq!(second.apic_id(), 1);
    assert_eq!(machine.cpu(0).apic_id(), 0);
}

fn an_ipi_wakes_the_other_vcpu_and_its_answer_comes_back(mode: Mode) {
    let Some(machine) = Machine::new(mode, 2) else {
        return;
    };
    let (first, second) = (machine.cpu(0), start_cpu1(&machine));
    for _ in 0..100 {
        second.halt();
        first.send_ipi(1, Ipi::Fixed(0x60));
        assert_eq!(second.woken_by(), 0x60);
        second.eoi();

        first.halt();
        second.send_ipi(0, Ipi::Fixed(0x61));
        assert_eq!(first.woken_by(), 0x61);
        first.eoi();
    }
    machine.assert_no_interrupt();
    assert_eq!(machine.take_exits(), [], "IPIs are KVM's own");
}

fn an_msi_finds_the_vcpu_that_its_message_names(mode: Mode) {
    let Some(machine) = Machine::new(mode, 2) else {
        return;
    };
    let second = start_cpu1(&machine);
    let msi = machine.chip.msi().unwrap();
    msi.set_message(berth_irqchip::MsiMessage {
        address: 0xfee0_1000,
        data: 0x62,
    })
    .unwrap();
    msi.event().write(1).unwrap();
    assert_eq!(second.interrupt(), 0x62);
    machine.assert_no_interrupt();
}

both_modes! {
    the_second_vcpu_starts_by_init_and_startup,
    an_ipi_wakes_the_other_vcpu_and_its_answer_comes_back,
    an_msi_finds_the_vcpu_that_its_message_names,
}
