#![allow(unsafe_code, reason = "entries of the routing table are unions")]

use super::*;

/// `KVM_CAP_IRQ_ROUTING` of every x86 kernel since 2018.
const KVM_MAX: u32 = 4096;

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0x1_fee0_1000,
        data,
    }
}

fn set(table: &mut Table, gsi: u32, data: u32) {
    table.vector_mut(gsi).unwrap().message = Some(message(data));
}

#[test]
fn vectors_are_numbered_from_the_last_pin_up() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    let gsis: Vec<_> = (0..3).map(|_| table.allocate().unwrap()).collect();
    assert_eq!(gsis, [24, 25, 26]);
}

#[test]
fn a_freed_number_is_used_again_lowest_first() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    for _ in 0..5 {
        table.allocate().unwrap();
    }
    table.release(27);
    table.release(25);
    assert_eq!(table.allocate(), Some(25));
    assert_eq!(table.allocate(), Some(27));
    assert_eq!(table.allocate(), Some(29));
}

#[test]
fn a_number_freed_twice_is_given_once() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    table.allocate().unwrap();
    table.release(24);
    table.release(24);
    table.release(4000);
    assert_eq!(table.allocate(), Some(24));
    assert_eq!(table.allocate(), Some(25));
}

#[test]
fn a_full_table_is_exactly_what_kvm_takes() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    while let Some(gsi) = table.allocate() {
        set(&mut table, gsi, gsi);
    }
    assert_eq!(table.entries().len(), KVM_MAX as usize);
    assert!(table.entries().iter().all(|entry| entry.gsi < KVM_MAX));
    table.release(1000);
    assert_eq!(table.allocate(), Some(1000));
    assert_eq!(table.allocate(), None);
}

#[test]
fn a_kvm_that_cannot_route_has_no_vectors() {
    for max_routes in [0, 1, 40] {
        assert_eq!(
            Table::new(max_routes, Mode::Kernel).allocate(),
            None,
            "{max_routes} routes"
        );
    }
    assert_eq!(Table::new(41, Mode::Kernel).allocate(), Some(24));
}

#[test]
fn a_reused_number_does_not_keep_its_message() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    let gsi = table.allocate().unwrap();
    set(&mut table, gsi, 0x41);
    table.release(gsi);
    assert_eq!(table.allocate(), Some(gsi));
    assert_eq!(table.vector(gsi), Some(&Vector::default()));
}

#[test]
fn pins_lead_to_both_controllers_unchanged() {
    let entries = Table::new(KVM_MAX, Mode::Kernel).entries();
    let mut routes: Vec<_> = entries
        .iter()
        .map(|entry| {
            assert_eq!(entry.type_, KVM_IRQ_ROUTING_IRQCHIP);
            // SAFETY: the type says which member is in use; all bits are initialised.
            let to = unsafe { entry.u.irqchip };
            (to.irqchip, to.pin, entry.gsi)
        })
        .collect();
    routes.sort_unstable();
    let master = (0..8).map(|pin| (KVM_IRQCHIP_PIC_MASTER, pin, pin));
    let slave = (0..8).map(|pin| (KVM_IRQCHIP_PIC_SLAVE, pin, pin + 8));
    let ioapic = (0..24).map(|pin| (KVM_IRQCHIP_IOAPIC, pin, pin));
    assert!(routes.iter().copied().eq(master.chain(slave).chain(ioapic)));
}

#[test]
fn only_vectors_with_a_message_have_a_route() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    let [_, with, _] = [(); 3].map(|()| table.allocate().unwrap());
    set(&mut table, with, 0x4051);
    let entries = table.entries();
    let [msi] = entries
        .iter()
        .filter(|e| e.gsi >= IOAPIC_PINS)
        .collect::<Vec<_>>()[..]
    else {
        panic!("one MSI route expected, got {entries:?}");
    };
    assert_eq!((msi.gsi, msi.type_), (with, KVM_IRQ_ROUTING_MSI));
    // SAFETY: the type says which member is in use; all bits are initialised.
    let to = unsafe { msi.u.msi };
    assert_eq!(
        (to.address_lo, to.address_hi, to.data),
        (0xfee0_1000, 1, 0x4051)
    );
}

#[test]
fn a_vector_wants_its_irqfd_with_a_message_and_unmasked() {
    let case = |message, masked| {
        Vector {
            message,
            masked,
            ..Vector::default()
        }
        .wants_irqfd()
    };
    assert!(case(Some(message(1)), false));
    assert!(!case(Some(message(1)), true));
    assert!(!case(None, false));
    assert!(!case(None, true));
}

#[test]
fn a_masked_vectors_new_message_waits() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    let [shown, hidden] = [(); 2].map(|()| table.allocate().unwrap());
    table.vector_mut(hidden).unwrap().masked = true;
    for gsi in [shown, hidden] {
        set(&mut table, gsi, 0x41);
    }
    assert_eq!(table.stale(), [shown]);
    table.set_routed();
    assert_eq!(table.stale(), []);

    table.vector_mut(hidden).unwrap().masked = false;
    assert_eq!(table.stale(), [hidden]);
    table.set_routed();
    assert_eq!(table.entries().len(), 42);
}

#[test]
fn a_vector_that_is_masked_again_keeps_its_route() {
    let mut table = Table::new(KVM_MAX, Mode::Kernel);
    let gsi = table.allocate().unwrap();
    set(&mut table, gsi, 0x41);
    table.set_routed();
    table.vector_mut(gsi).unwrap().masked = true;
    set(&mut table, gsi, 0x42);
    assert_eq!(table.stale(), []);
    assert_eq!(table.vector(gsi).unwrap().route(), Some(message(0x41)));
    set(&mut table, gsi, 0x41);
    table.vector_mut(gsi).unwrap().masked = false;
    assert_eq!(table.stale(), [], "the message it had: no update");
}

/// Address and data of each MSI route, by GSI.
fn messages(table: &Table) -> Vec<(u32, u64, u32)> {
    let entries = table.entries().into_iter();
    entries
        .map(|entry| {
            assert_eq!(entry.type_, KVM_IRQ_ROUTING_MSI);
            // SAFETY: the type says which member is in use; all bits are initialised.
            let to = unsafe { entry.u.msi };
            let address = u64::from(to.address_hi) << 32 | u64::from(to.address_lo);
            (entry.gsi, address, to.data)
        })
        .collect()
}

#[test]
fn split_pins_lead_where_the_ioapic_says_and_nowhere_before() {
    let mut table = Table::new(KVM_MAX, Mode::Split);
    assert_eq!(messages(&table), []);
    assert_eq!(table.allocate(), Some(24), "numbered as in kernel mode");
    let old = table.set_pin(4, Some(message(0x34)));
    assert_eq!(old, None);
    assert_eq!(messages(&table), [(4, 0x1_fee0_1000, 0x34)]);
    assert_eq!(table.set_pin(4, None), Some(message(0x34)));
    assert_eq!(messages(&table), []);
}

#[test]
fn an_extended_destination_is_told_to_kvm_in_the_upper_half() {
    let to = |address| MsiMessage { address, data: 1 };
    let mut table = Table::new(KVM_MAX, Mode::Split);
    let gsi = table.allocate().unwrap();
    let routed = |table: &mut Table, address| {
        table.vector_mut(gsi).unwrap().message = Some(to(address));
        messages(table)[0].1
    };
    // APIC 300 is 0x12c: 0x2c in bits 19 to 12, 1 in bits 11 to 5.
    assert_eq!(
        routed(&mut table, 0xfee2_c020),
        0xfee2_c020,
        "not agreed on"
    );
    table.extend_destinations();
    assert_eq!(routed(&mut table, 0xfee2_c020), 0x100_fee2_c000);
    assert_eq!(routed(&mut table, 0xfeef_ffe0), 0x7f00_feef_f000, "0x7fff");
    assert_eq!(routed(&mut table, 0xfee2_c030), 0xfee2_c030, "remappable");
    assert_eq!(
        routed(&mut table, 0x2_fee2_c020),
        0x2_fee2_c020,
        "KVM's form"
    );
}
