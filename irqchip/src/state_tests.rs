use super::*;

fn chip(mode: Mode) -> ChipState {
    let controllers = match mode {
        Mode::Kernel => Controllers::Kernel {
            chips: Box::new([
                [1; CONTROLLER_LEN],
                [2; CONTROLLER_LEN],
                [3; CONTROLLER_LEN],
            ]),
            pit: Box::new([4; PIT_LEN]),
        },
        Mode::Split => {
            let mut ioapic = Ioapic::new();
            ioapic.write(0, &[0x10]);
            ioapic.write(0x10, &0x8041_u32.to_le_bytes());
            ioapic.set_remote_irr(0);
            Controllers::Split {
                ioapic: Box::new(ioapic),
                ended: 1 << 22,
            }
        }
    };
    let vector = |gsi, message| VectorState {
        gsi,
        message,
        masked: gsi == 24,
        pending: gsi == 25,
    };
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };
    ChipState {
        controllers,
        driven: 1 << 10,
        pending: 1 << 23,
        vectors: vec![vector(24, Some(message)), vector(25, None)],
        clock_ns: 123_456_789,
    }
}

fn vcpu() -> VcpuState {
    VcpuState {
        lapic: Box::new([5; LAPIC_LEN]),
        events: Box::new([6; EVENTS_LEN]),
        mp_state: 3,
        msrs: vec![(0x10, 77), (0x6e0, 78)],
    }
}

/// The field that stops the reading of a changed state.
fn refused(bytes: &[u8]) -> &'static str {
    ChipState::from_bytes(bytes).unwrap_err().field
}

#[test]
fn what_was_written_is_read() {
    for mode in [Mode::Kernel, Mode::Split] {
        let state = chip(mode);
        assert_eq!(ChipState::from_bytes(&state.to_bytes()), Ok(state));
    }
    assert_eq!(VcpuState::from_bytes(&vcpu().to_bytes()), Ok(vcpu()));
}

#[test]
fn every_shorter_and_longer_state_is_refused() {
    for mode in [Mode::Kernel, Mode::Split] {
        let bytes = chip(mode).to_bytes();
        for len in 0..bytes.len() {
            assert!(ChipState::from_bytes(&bytes[..len]).is_err(), "{len}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(refused(&longer), "end");
    }
    let bytes = vcpu().to_bytes();
    for len in 0..bytes.len() {
        assert!(VcpuState::from_bytes(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn an_error_names_its_field() {
    let good = chip(Mode::Split).to_bytes();
    // magic 0, version 4, kind 6, mode 8, select 9, id 10, entries 14, ended 206, driven 210, pending 214,
    // clock 218, count 226, then the first vector: gsi 230, flags 234.
    for (at, value, field) in [
        (0, b'X', "magic"),
        (4, 1, "version"),
        (6, 2, "kind"),
        (8, 2, "mode"),
        (10, 1, "ioapic.id"),
        (15, 0x10, "ioapic.entry"),
        (209, 1, "ioapic.ended"),
        (213, 1, "driven"),
        (217, 1, "pending"),
        (228, 1, "vectors"),
        (230, 23, "vectors.gsi"),
        (230, 25, "vectors.gsi"),
        (234, 2, "vectors.has_message"),
        (235, 2, "vectors.masked"),
        (236, 0xff, "vectors.pending"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        assert_eq!(refused(&bytes), field, "byte {at} = {value:#x}");
    }
    let error = ChipState::from_bytes(&vcpu().to_bytes()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "saved interrupt state: kind: 2 is not 1 (1 a chip's, 2 a vCPU's)"
    );
}

#[test]
fn an_interrupt_is_found_in_the_request_and_in_service_registers() {
    let mut state = vcpu();
    *state.lapic = [0; LAPIC_LEN];
    // Vector 0x51: bit 17 of register 2.
    for register in [0x120, 0x220] {
        state.lapic[register + 2] = 2;
        let found: Vec<_> = (0..=255).filter(|&v| state.has_interrupt(v)).collect();
        assert_eq!(found, [0x51]);
        state.lapic[register + 2] = 0;
    }
    assert!(!state.directs_ends());
    state.lapic[0xf1] = 0x10;
    assert!(state.directs_ends());
}

#[test]
fn a_vcpu_takes_no_msr_that_is_not_its_clocks() {
    let mut state = vcpu();
    state.msrs[1].0 = 0xc000_0080;
    let error = VcpuState::from_bytes(&state.to_bytes()).unwrap_err();
    assert_eq!(error.field, "msrs.index");
    state.msrs = vec![(0x10, 0); 65];
    let error = VcpuState::from_bytes(&state.to_bytes()).unwrap_err();
    assert_eq!(error.field, "msrs");
}
