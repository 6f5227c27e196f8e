use super::*;

fn select(ioapic: &mut Ioapic, register: u8) {
    ioapic.write(REGISTER_SELECT, &u32::from(register).to_le_bytes());
}

fn write(ioapic: &mut Ioapic, register: u8, value: u32) -> Effect {
    select(ioapic, register);
    ioapic.write(WINDOW, &value.to_le_bytes())
}

fn read(ioapic: &mut Ioapic, register: u8) -> u32 {
    select(ioapic, register);
    let mut word = [0; 4];
    ioapic.read(WINDOW, &mut word);
    u32::from_le_bytes(word)
}

/// A level-triggered, unmasked entry with this vector.
fn level(vector: u8) -> u32 {
    1 << 15 | u32::from(vector)
}

#[test]
fn after_a_reset_every_pin_is_masked_and_nothing_else_set() {
    let mut ioapic = Ioapic::new();
    assert_eq!(read(&mut ioapic, 0), 0);
    for pin in 0..24 {
        assert_eq!(read(&mut ioapic, 0x10 + 2 * pin), 0x0001_0000, "pin {pin}");
        assert_eq!(read(&mut ioapic, 0x11 + 2 * pin), 0, "pin {pin}");
    }
}

#[test]
fn the_version_register_says_24_pins_and_an_eoi_register() {
    let mut ioapic = Ioapic::new();
    assert_eq!(read(&mut ioapic, 1), 0x0017_0020);
    write(&mut ioapic, 1, 0);
    assert_eq!(read(&mut ioapic, 1), 0x0017_0020, "read-only");
}

#[test]
fn the_id_has_four_bits_and_the_arbitration_id_follows() {
    let mut ioapic = Ioapic::new();
    write(&mut ioapic, 0, 0xffff_ffff);
    assert_eq!(read(&mut ioapic, 0), 0x0f00_0000);
    assert_eq!(read(&mut ioapic, 2), 0x0f00_0000);
    write(&mut ioapic, 2, 0);
    assert_eq!(read(&mut ioapic, 2), 0x0f00_0000, "read-only");
}

#[test]
fn an_entry_keeps_what_software_may_write() {
    let mut ioapic = Ioapic::new();
    write(&mut ioapic, 0x10, 0xffff_ffff);
    write(&mut ioapic, 0x11, 0xffff_ffff);
    // Not delivery status (12), remote IRR (14) and what is reserved from 17 on.
    assert_eq!(read(&mut ioapic, 0x10), 0x0001_afff);
    assert_eq!(read(&mut ioapic, 0x11), 0xfffe_0000);
}

#[test]
fn a_register_that_does_not_exist_reads_zero_and_takes_nothing() {
    let mut ioapic = Ioapic::new();
    for register in [3, 0xf, 0x40, 0xff] {
        assert_eq!(write(&mut ioapic, register, !0), Effect::None);
        assert_eq!(read(&mut ioapic, register), 0, "{register:#x}");
    }
}

#[test]
fn only_a_changed_entry_is_reported() {
    let mut ioapic = Ioapic::new();
    let before = ioapic.entry(3);
    let changed = Effect::Entry { pin: 3, before };
    assert_eq!(write(&mut ioapic, 0x16, 0x41), changed);
    assert_eq!(write(&mut ioapic, 0x16, 0x41), Effect::None);
    assert_eq!(write(&mut ioapic, 0x16, 0x41 | 1 << 14), Effect::None);
}

#[test]
fn remote_irr_is_cleared_by_the_end_of_its_vector_only() {
    let mut ioapic = Ioapic::new();
    write(&mut ioapic, 0x10, level(0x50));
    write(&mut ioapic, 0x12, level(0x51));
    ioapic.set_remote_irr(0);
    ioapic.set_remote_irr(1);
    assert_eq!(ioapic.end_of_interrupt(0x52), []);
    assert_eq!(ioapic.end_of_interrupt(0x50), [0]);
    assert!(!ioapic.entry(0).remote_irr());
    assert!(ioapic.entry(1).remote_irr());
    assert_eq!(read(&mut ioapic, 0x12), level(0x51) | 1 << 14);
}

#[test]
fn two_pins_with_one_vector_end_together() {
    let mut ioapic = Ioapic::new();
    write(&mut ioapic, 0x10, level(0x50));
    write(&mut ioapic, 0x1e, level(0x50));
    write(&mut ioapic, 0x20, 0x50);
    assert_eq!(ioapic.end_of_interrupt(0x50), [0, 7], "not the edge one");
}

#[test]
fn remote_irr_outlives_a_mask_and_not_a_change_to_edge() {
    let mut ioapic = Ioapic::new();
    write(&mut ioapic, 0x10, level(0x50));
    ioapic.set_remote_irr(0);
    write(&mut ioapic, 0x10, level(0x50) | 1 << 16);
    assert!(ioapic.entry(0).remote_irr());
    // How Linux clears it where there is no EOI register: edge and back.
    write(&mut ioapic, 0x10, 0x50 | 1 << 16);
    write(&mut ioapic, 0x10, level(0x50));
    assert!(!ioapic.entry(0).remote_irr());
}

#[test]
fn the_eoi_register_names_a_vector() {
    let mut ioapic = Ioapic::new();
    for width in [1, 4] {
        let effect = ioapic.write(0x40, &0x50_u32.to_le_bytes()[..width]);
        assert_eq!(effect, Effect::EndOfInterrupt(0x50));
    }
    let mut word = [0xff; 4];
    ioapic.read(0x40, &mut word);
    assert_eq!(word, [0; 4], "write-only");
}

#[test]
fn every_offset_and_width_is_answered() {
    let mut ioapic = Ioapic::new();
    for offset in (0..0x48).chain([0xfff, u64::MAX - 1]) {
        for len in [0, 1, 2, 4, 8] {
            let mut data = vec![0xaa; len];
            ioapic.read(offset, &mut data);
            ioapic.write(offset, &data);
        }
    }
    select(&mut ioapic, 1);
    let mut half = [0; 2];
    ioapic.read(WINDOW + 2, &mut half);
    assert_eq!(half, [0x17, 0], "the upper half of the version register");
}

#[test]
fn a_narrow_write_of_the_window_changes_nothing() {
    let mut ioapic = Ioapic::new();
    select(&mut ioapic, 0x10);
    assert_eq!(ioapic.write(WINDOW, &[0x41]), Effect::None);
    assert_eq!(ioapic.write(WINDOW + 2, &[0, 0]), Effect::None);
    assert!(ioapic.entry(0).is_masked());
}

/// Table of: entry, address, data.
#[test]
fn an_entry_becomes_a_message() {
    let cases = [
        ("fixed, physical, APIC 3", 3 << 56 | 0x41, 0xfee0_3000, 0x41),
        (
            "lowest priority, logical",
            0xff << 56 | 1 << 11 | 1 << 8 | 0x42,
            0xfeef_f00c,
            0x142,
        ),
        ("level", 1 << 15 | 0x43, 0xfee0_0000, 0xc043),
        (
            "NMI, level bit ignored",
            1 << 15 | 4 << 8,
            0xfee0_0000,
            0x400,
        ),
        ("APIC 300", 0x2c << 56 | 1 << 49 | 0x44, 0xfee2_c020, 0x44),
        (
            "masked and polarity say nothing",
            1 << 16 | 1 << 13 | 0x45,
            0xfee0_0000,
            0x45,
        ),
    ];
    for (what, bits, address, data) in cases {
        let entry = Entry::from_bits(bits).unwrap();
        assert_eq!(entry.message(), MsiMessage { address, data }, "{what}");
    }
}

#[test]
fn bits_that_no_entry_can_have_are_refused() {
    assert_eq!(Entry::from_bits(1 << 17), None);
    assert_eq!(Entry::from_bits(1 << 48), None);
    assert_eq!(Entry::from_bits(1 << 12), None);
    assert!(Entry::from_bits(1 << 14 | 1 << 15).is_some());
}
