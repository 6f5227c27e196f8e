//! The local APIC's timer in TSC-deadline mode (Intel SDM 3A, 11.5.4.1).

use berth_irqchip::Mode;

use crate::guest::{LVT_TIMER, Machine, TSC_DEADLINE, TSC_DEADLINE_MODE};

/// A few milliseconds on any machine.
const AHEAD: u64 = 10_000_000;

fn it_fires_at_the_deadline_and_not_before(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | 0x70);
    for _ in 0..3 {
        let deadline = cpu.read_tsc() + AHEAD;
        cpu.write_msr(TSC_DEADLINE, deadline);
        assert_eq!(cpu.interrupt(), 0x70);
        assert!(cpu.read_tsc() >= deadline, "early");
        assert_eq!(cpu.read_msr(TSC_DEADLINE), 0, "disarmed once it has fired");
        cpu.eoi();
    }
    machine.assert_no_interrupt();
}

fn a_deadline_that_has_passed_fires_at_once(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | 0x70);
    cpu.write_msr(TSC_DEADLINE, 1);
    assert_eq!(cpu.interrupt(), 0x70);
}

fn a_deadline_of_zero_disarms(mode: Mode) {
    let Some(machine) = Machine::new(mode, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | 0x70);
    let deadline = cpu.read_tsc() + AHEAD;
    cpu.write_msr(TSC_DEADLINE, deadline);
    cpu.write_msr(TSC_DEADLINE, 0);
    if cpu.read_tsc() < deadline {
        while cpu.read_tsc() < deadline {}
        machine.assert_no_interrupt();
    }
}

both_modes! {
    it_fires_at_the_deadline_and_not_before,
    a_deadline_that_has_passed_fires_at_once,
    a_deadline_of_zero_disarms,
}
