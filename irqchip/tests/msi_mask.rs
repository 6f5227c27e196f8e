//! Masking: a masked vector remembers one event and delivers it when it is unmasked.

use berth_irqchip::Mode;

use std::sync::mpsc::channel;

use crate::guest::{Machine, to_cpu0};

fn what_is_written_while_masked_comes_with_the_unmask_and_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let msi = machine.msi(0x41);
    msi.mask().unwrap();
    assert!(!msi.is_pending());
    msi.event().write(1).unwrap();
    msi.event().write(1).unwrap();
    assert!(msi.is_pending());
    assert!(msi.is_pending(), "looking does not take it");
    machine.assert_no_interrupt();

    msi.unmask().unwrap();
    assert!(!msi.is_pending());
    assert_eq!(cpu.interrupt(), 0x41);
    cpu.eoi();
    machine.assert_no_interrupt();

    msi.mask().unwrap();
    assert!(!msi.is_pending(), "it was delivered");
    msi.unmask().unwrap();
    msi.mask().unwrap();
    machine.assert_no_interrupt();
}

fn unmasked_without_anything_pending_nothing_comes(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.msi(0x41);
    msi.mask().unwrap();
    msi.mask().unwrap();
    msi.unmask().unwrap();
    msi.unmask().unwrap();
    machine.assert_no_interrupt();
    msi.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x41);
}

fn an_event_before_the_first_message_is_pending_until_there_is_one(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.chip.msi().unwrap();
    msi.event().write(1).unwrap();
    assert!(msi.is_pending());
    msi.unmask().unwrap();
    assert!(msi.is_pending(), "there is nowhere to send it");
    msi.set_message(to_cpu0(0x43)).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x43);
}

fn a_message_set_while_masked_does_not_unmask(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let msi = machine.chip.msi().unwrap();
    msi.mask().unwrap();
    msi.set_message(to_cpu0(0x41)).unwrap();
    msi.event().write(1).unwrap();
    machine.assert_no_interrupt();
    msi.set_message(to_cpu0(0x42)).unwrap();
    msi.unmask().unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x42);
}

fn the_order_within_a_batch_is_kept(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let [stays, goes] = [machine.msi(0x41), machine.msi(0x42)];
    machine
        .chip
        .batch(|batch| {
            batch.mask(&stays);
            batch.set_message(&stays, to_cpu0(0x51));
            batch.unmask(&stays);
            batch.unmask(&goes);
            batch.mask(&goes);
        })
        .unwrap();
    assert_eq!(machine.chip.counters().msis_attached, 1);
    goes.event().write(1).unwrap();
    stays.event().write(1).unwrap();
    assert_eq!(machine.cpu(0).interrupt(), 0x51);
    machine.cpu(0).eoi();
    machine.assert_no_interrupt();
    assert!(goes.is_pending());
}

fn no_event_is_lost_between_mask_and_unmask(mode: Mode) {
    const ROUNDS: usize = 500;
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let msi = machine.msi(0x41);
    std::thread::scope(|scope| {
        // Ends the writer when this closure ends, also by a failed assertion.
        let (start, starts) = channel();
        let (done, dones) = channel();
        let event = msi.event();
        scope.spawn(move || {
            while starts.recv().is_ok() {
                event.write(1).unwrap();
                done.send(()).unwrap();
            }
        });
        for _ in 0..ROUNDS {
            start.send(()).unwrap();
            msi.mask().unwrap();
            msi.unmask().unwrap();
            dones.recv().unwrap();
            assert_eq!(cpu.interrupt(), 0x41);
            cpu.eoi();
        }
    });
}

both_modes! {
    what_is_written_while_masked_comes_with_the_unmask_and_once,
    unmasked_without_anything_pending_nothing_comes,
    an_event_before_the_first_message_is_pending_until_there_is_one,
    a_message_set_while_masked_does_not_unmask,
    the_order_within_a_batch_is_kept,
    no_event_is_lost_between_mask_and_unmask,
}
