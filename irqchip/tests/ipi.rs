//! Interrupts between vCPUs, and the start of the second one (Intel SDM 3A, 9.4 and 11.6).

use berth_irqchip::{Chip, Mode};

use crate::guest::{Cpu, Ipi, Machine, START_PAGE, note};

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

/// What a Linux guest with many vCPUs does instead of an IPI each (`KVM_HC_SEND_IPI`).
fn a_hypercall_sends_an_ipi_to_several_vcpus(mode: Mode) {
    let Some(machine) = Machine::new(mode, 2) else {
        return;
    };
    let second = start_cpu1(&machine);
    match machine.cpu(0).send_ipi_by_hypercall(0b11, 0x65) {
        Ok(reached) => assert_eq!(reached, 2),
        Err(at) => {
            assert!(machine.is_vmcall(at), "it hangs at {at:#x}");
            return note("skipped: this KVM stays at VMCALL for good");
        }
    }
    for cpu in [machine.cpu(0), second] {
        assert_eq!(cpu.interrupt(), 0x65);
        cpu.eoi();
    }
    machine.assert_no_interrupt();
}

/// A guest without x2APIC may write its APIC ids: what shares one is interrupted together.
fn two_vcpus_with_one_short_id_are_interrupted_both(mode: Mode) {
    let make = |vm| Chip::with_short_ids(vm, mode).unwrap();
    let Some(machine) = Machine::with_chip(&[0, 1], make) else {
        return;
    };
    assert!(!machine.chip.has_extended_destinations());
    let cpus = [machine.cpu(0), start_cpu1(&machine)];
    for shared in [0, 7, 254] {
        cpus.iter().for_each(|cpu| cpu.enable_xapic(shared));
        cpus[0].send_ipi_by_memory(shared, 0x61);
        for cpu in cpus {
            assert_eq!(cpu.interrupt(), 0x61);
            cpu.eoi_by_memory();
        }
    }
}

both_modes! {
    the_second_vcpu_starts_by_init_and_startup,
    an_ipi_wakes_the_other_vcpu_and_its_answer_comes_back,
    an_msi_finds_the_vcpu_that_its_message_names,
    a_hypercall_sends_an_ipi_to_several_vcpus,
    two_vcpus_with_one_short_id_are_interrupted_both,
}
