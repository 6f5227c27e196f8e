//! MSI vectors: a write of an eventfd is an interrupt on the vCPU that the message names.

use berth_irqchip::{Error, Mode, Msi, MsiMessage};

use crate::guest::{Machine, to_cpu0};

fn each_write_of_the_eventfd_is_an_interrupt(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    for _ in 0..100 {
        msi.event().write(1).unwrap();
        assert_eq!(machine.cpu(0).interrupt(), 0x41);
        machine.cpu(0).eoi();
    }
    machine.assert_no_interrupt();
}

fn a_halted_vcpu_wakes_up(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    machine.cpu(0).halt();
    msi.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).woken_by(), 0x41);
}

fn a_copy_of_the_eventfd_raises_it_too(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x42);
    let backends = msi.event().try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| backends.write(1).unwrap());
    });
    assert_eq!(machine.cpu(0).interrupt(), 0x42);
}

fn a_new_message_takes_the_place_of_the_old_one(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    msi.set_message(to_cpu0(0x51)).unwrap();
    msi.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x51);
    machine.cpu(0).eoi();
    machine.assert_no_interrupt();
}

fn the_same_message_again_costs_no_update(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    let before = machine.chip.counters();
    msi.set_message(to_cpu0(0x41)).unwrap();
    assert_eq!(machine.chip.counters(), before);
}

fn a_device_with_64_vectors_costs_one_update(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let vectors: Vec<Msi> = (0..64).map(|_| machine.chip.msi().unwrap()).collect();
    let before = machine.chip.counters();
    assert_eq!((before.msis, before.msis_attached), (64, 0));
    machine
        .chip
        .batch(|batch| {
            for (msi, vector) in vectors.iter().zip(0x40..) {
                batch.set_message(msi, to_cpu0(vector));
                batch.unmask(msi);
            }
        })
        .unwrap();
    let after = machine.chip.counters();
    assert_eq!(after.routing_updates, before.routing_updates + 1);
    assert_eq!(after.msis_attached, 64);
    for (msi, vector) in vectors.iter().zip(0x40..) {
        msi.event().write(1).unwrap();
        assert_eq!(machine.cpu(0).interrupt(), vector);
        machine.cpu(0).eoi();
    }
    machine.assert_no_interrupt();
}

fn a_message_that_kvm_refuses_changes_nothing(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    machine.use_x2apic_ids();
    let [good, bad] = [machine.msi(0x41), machine.msi(0x42)];
    let reserved_bits = MsiMessage {
        address: 0x99_fee0_0000,
        data: 0x43,
    };

    let error = bad.set_message(reserved_bits).unwrap_err();
    assert!(matches!(&error, Error::SetRoutes { changed, .. } if *changed == [bad.gsi()]));

    for (msi, vector) in [(&good, 0x41), (&bad, 0x42)] {
        msi.event().write(1).unwrap();
        assert_eq!(machine.cpu(0).interrupt(), vector);
        machine.cpu(0).eoi();
    }
    good.set_message(to_cpu0(0x44))
        .expect("the refused message is gone from the table");
}

fn a_bad_message_of_a_masked_vector_disturbs_no_other(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    machine.use_x2apic_ids();
    let [good, bad] = [machine.msi(0x41), machine.msi(0x42)];
    bad.mask().unwrap();
    bad.set_message(MsiMessage {
        address: 0x99_fee0_0000,
        data: 0x43,
    })
    .unwrap();
    good.set_message(to_cpu0(0x51)).unwrap();
    bad.unmask().unwrap_err();
    good.set_message(to_cpu0(0x52)).unwrap();
    good.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x52);
    machine.cpu(0).eoi();

    bad.event().write(1).unwrap();
    assert!(bad.is_pending(), "still masked");
    bad.set_message(to_cpu0(0x44)).unwrap();
    bad.unmask().unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x44);
}

fn messages_set_while_masked_cost_one_update_when_unmasked(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    msi.mask().unwrap();
    let before = machine.chip.counters().routing_updates;
    for vector in 0x50..0x60 {
        msi.set_message(to_cpu0(vector)).unwrap();
    }
    assert_eq!(machine.chip.counters().routing_updates, before);
    msi.unmask().unwrap();
    assert_eq!(machine.chip.counters().routing_updates, before + 1);
    msi.mask().unwrap();
    msi.unmask().unwrap();
    assert_eq!(machine.chip.counters().routing_updates, before + 1);
    msi.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x5f);
}

fn a_dropped_vector_is_silent_and_its_gsi_goes_to_the_next(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let old = machine.msi(0x41);
    let gsi = old.gsi();
    let backends = old.event().try_clone().unwrap();
    drop(old);
    let new = machine.chip.msi().unwrap();
    assert_eq!(new.gsi(), gsi);

    backends.write(1).unwrap();
    new.event().write(1).unwrap();
    machine.assert_no_interrupt();

    new.set_message(to_cpu0(0x45)).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x45);
    machine.cpu(0).eoi();
    machine.assert_no_interrupt();
}

fn vectors_come_and_go_on_many_threads(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let stays = machine.msi(0x41);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..50 {
                    let msi = machine.chip.msi().unwrap();
                    msi.set_message(to_cpu0(0x80)).unwrap();
                    msi.mask().unwrap();
                    msi.set_message(to_cpu0(0x80 + round)).unwrap();
                    msi.unmask().unwrap();
                }
            });
        }
    });
    let counters = machine.chip.counters();
    assert_eq!((counters.msis, counters.msis_attached), (1, 1));
    assert!(
        machine.chip.msi().unwrap().gsi() <= stays.gsi() + 4,
        "numbers are used again"
    );
    stays.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x41);
    machine.cpu(0).eoi();
    machine.assert_no_interrupt();
}

both_modes! {
    each_write_of_the_eventfd_is_an_interrupt,
    a_halted_vcpu_wakes_up,
    a_copy_of_the_eventfd_raises_it_too,
    a_new_message_takes_the_place_of_the_old_one,
    the_same_message_again_costs_no_update,
    a_device_with_64_vectors_costs_one_update,
    a_message_that_kvm_refuses_changes_nothing,
    a_bad_message_of_a_masked_vector_disturbs_no_other,
    messages_set_while_masked_cost_one_update_when_unmasked,
    a_dropped_vector_is_silent_and_its_gsi_goes_to_the_next,
    vectors_come_and_go_on_many_threads,
}
