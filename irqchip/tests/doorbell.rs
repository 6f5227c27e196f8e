//! Doorbells: guest writes that signal an eventfd and never leave the kernel.

use berth_irqchip::{DoorbellAddress, Error, Mode};

use crate::guest::{Exit, Machine, is_signalled};

const NOTIFY: u32 = 0xd000_3000;
const ELSEWHERE: u32 = 0xd100_3000;
const PORT: u16 = 0xc010;

fn mmio(gpa: u32) -> DoorbellAddress {
    DoorbellAddress::MmioAny { gpa: gpa.into() }
}

fn a_write_of_any_width_and_value_rings_and_none_leaves_the_kernel(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let doorbell = machine.chip.doorbell().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    cpu.write8(NOTIFY, 0x11);
    cpu.write16(NOTIFY, 0x2222);
    cpu.write32(NOTIFY, 0x3333_3333);
    assert_eq!(doorbell.event().read().unwrap(), 3);
    assert_eq!(machine.take_exits(), []);
}

fn a_thousand_rings_cost_no_exit(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let doorbell = machine.chip.doorbell().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    let before = cpu.runs();
    cpu.write32_times(NOTIFY, 1, 1000);
    assert_eq!(cpu.runs() - before, 1, "only the command itself enters KVM");
    assert_eq!(doorbell.event().read().unwrap(), 1000);
}

fn a_write_next_to_it_does_not_ring(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let doorbell = machine.chip.doorbell().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    machine.cpu(0).write32(NOTIFY + 4, 7);
    let exit = Exit::Mmio {
        gpa: u64::from(NOTIFY) + 4,
        data: vec![7, 0, 0, 0],
    };
    assert_eq!(machine.take_exits(), [exit]);
    assert!(!is_signalled(doorbell.event()));
}

fn a_queue_each_at_neighbouring_addresses(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let doorbells = [(); 4].map(|()| machine.chip.doorbell().unwrap());
    for (doorbell, gpa) in doorbells.iter().zip((NOTIFY..).step_by(4)) {
        doorbell.place(mmio(gpa)).unwrap();
    }
    machine.cpu(0).write16(NOTIFY + 8, 2);
    let rung = doorbells.map(|doorbell| is_signalled(doorbell.event()));
    assert_eq!(rung, [false, false, true, false]);
    assert_eq!(machine.take_exits(), []);
}

fn it_moves_with_its_bar_and_the_eventfd_stays(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let doorbell = machine.chip.doorbell().unwrap();
    let backends = doorbell.event().try_clone().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    doorbell.place(mmio(ELSEWHERE)).unwrap();
    assert_eq!(doorbell.address(), Some(mmio(ELSEWHERE)));

    cpu.write32(NOTIFY, 1);
    assert!(!is_signalled(&backends));
    assert_eq!(machine.take_exits().len(), 1, "the old address is nobody's");
    cpu.write32(ELSEWHERE, 1);
    assert!(is_signalled(&backends));
    assert_eq!(machine.take_exits(), []);
    let counters = machine.chip.counters();
    assert_eq!((counters.doorbells, counters.doorbells_placed), (1, 2));
}

fn placed_where_it_is_nothing_happens(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let doorbell = machine.chip.doorbell().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    machine.cpu(0).write32(NOTIFY, 1);
    assert_eq!(doorbell.event().read().unwrap(), 1);
    assert_eq!(machine.chip.counters().doorbells_placed, 1);
}

fn removed_it_is_silent_and_placed_again_it_rings(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let doorbell = machine.chip.doorbell().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    doorbell.remove().unwrap();
    doorbell.remove().expect("nothing to do the second time");
    cpu.write32(NOTIFY, 1);
    assert!(!is_signalled(doorbell.event()));
    assert_eq!(machine.take_exits().len(), 1);

    doorbell.place(mmio(NOTIFY)).unwrap();
    cpu.write32(NOTIFY, 1);
    assert!(is_signalled(doorbell.event()));
}

fn a_dropped_doorbell_leaves_its_address(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let doorbell = machine.chip.doorbell().unwrap();
    let backends = doorbell.event().try_clone().unwrap();
    doorbell.place(mmio(NOTIFY)).unwrap();
    drop(doorbell);
    machine.cpu(0).write32(NOTIFY, 1);
    assert_eq!(machine.take_exits().len(), 1);
    assert!(!is_signalled(&backends));
    assert_eq!(machine.chip.counters().doorbells, 0);
}

fn a_port_with_a_value_rings_for_that_value_only(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let doorbell = machine.chip.doorbell().unwrap();
    doorbell
        .place(DoorbellAddress::Pio {
            port: PORT,
            len: 2,
            datamatch: Some(3),
        })
        .unwrap();
    let before = cpu.runs();
    cpu.out16_times(PORT, 3, 1000);
    assert_eq!(cpu.runs() - before, 1, "only the command itself enters KVM");
    assert_eq!(doorbell.event().read().unwrap(), 1000);

    cpu.out16(PORT, 4);
    assert!(!is_signalled(doorbell.event()));
    assert_eq!(
        machine.take_exits(),
        [Exit::Pio {
            port: PORT,
            data: vec![4, 0]
        }]
    );
}

fn a_width_without_a_value_rings_for_any_value_of_that_width(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let [port, memory] = [(); 2].map(|()| machine.chip.doorbell().unwrap());
    port.place(DoorbellAddress::Pio {
        port: PORT,
        len: 1,
        datamatch: None,
    })
    .unwrap();
    cpu.out8(PORT, 0);
    cpu.out8(PORT, 0xff);
    cpu.out32(PORT, 0);
    assert_eq!(port.event().read().unwrap(), 2);
    memory
        .place(DoorbellAddress::Mmio {
            gpa: NOTIFY.into(),
            len: 4,
            datamatch: None,
        })
        .unwrap();
    cpu.write32(NOTIFY, 9);
    cpu.write16(NOTIFY, 9);
    assert_eq!(memory.event().read().unwrap(), 1);
    assert_eq!(machine.take_exits().len(), 2);
}

fn a_taken_address_is_refused_and_both_doorbells_stay(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    let [first, second] = [(); 2].map(|()| machine.chip.doorbell().unwrap());
    first.place(mmio(NOTIFY)).unwrap();
    second.place(mmio(ELSEWHERE)).unwrap();
    let error = second.place(mmio(NOTIFY)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot place a doorbell at gpa 0xd0003000 (any width)"
    );
    let Error::PlaceDoorbell { source, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(source.errno(), libc::EEXIST);

    cpu.write32(NOTIFY, 1);
    cpu.write32(ELSEWHERE, 1);
    assert!(is_signalled(first.event()) && is_signalled(second.event()));
    assert_eq!(machine.take_exits(), []);
}

fn a_doorbell_that_no_write_can_ring_is_refused(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let doorbell = machine.chip.doorbell().unwrap();
    for at in [
        DoorbellAddress::Mmio {
            gpa: 0,
            len: 3,
            datamatch: None,
        },
        DoorbellAddress::Mmio {
            gpa: 0,
            len: 200,
            datamatch: Some(1),
        },
        DoorbellAddress::Mmio {
            gpa: 0,
            len: 2,
            datamatch: Some(0x1_0000),
        },
        DoorbellAddress::Pio {
            port: PORT,
            len: 8,
            datamatch: None,
        },
        DoorbellAddress::Pio {
            port: PORT,
            len: 0,
            datamatch: None,
        },
    ] {
        let error = doorbell.place(at).unwrap_err();
        assert!(matches!(error, Error::DoorbellShape { at: named } if named == at));
    }
    assert_eq!(doorbell.address(), None);
}

both_modes! {
    a_write_of_any_width_and_value_rings_and_none_leaves_the_kernel,
    a_thousand_rings_cost_no_exit,
    a_write_next_to_it_does_not_ring,
    a_queue_each_at_neighbouring_addresses,
    it_moves_with_its_bar_and_the_eventfd_stays,
    placed_where_it_is_nothing_happens,
    removed_it_is_silent_and_placed_again_it_rings,
    a_dropped_doorbell_leaves_its_address,
    a_port_with_a_value_rings_for_that_value_only,
    a_width_without_a_value_rings_for_any_value_of_that_width,
    a_taken_address_is_refused_and_both_doorbells_stay,
    a_doorbell_that_no_write_can_ring_is_refused,
}
