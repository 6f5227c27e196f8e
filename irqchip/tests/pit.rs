//! The PIT ticks, through the IOAPIC and through the PIC.
//!
//! Intel 8254 and 8259A datasheets: control words, initialisation words.

use berth_irqchip::Mode;

use crate::guest::{Cpu, Machine};

const PIT_CHANNEL0: u16 = 0x40;
const PIT_CONTROL: u16 = 0x43;
/// Channel 0, low byte then high byte, mode 2 (rate generator).
const PIT_PERIODIC: u8 = 0x34;
/// The same, mode 0 (interrupt on terminal count).
const PIT_ONCE: u8 = 0x30;
const PIC_COMMAND: u16 = 0x20;
const PIC_DATA: u16 = 0x21;
const PIC_END_OF_INTERRUPT: u8 = 0x20;

/// 1193 counts of 1.193182 MHz: a millisecond.
fn start_pit(cpu: &Cpu, mode: u8) {
    const COUNT: [u8; 2] = 1193_u16.to_le_bytes();
    cpu.out8(PIT_CONTROL, mode);
    cpu.out8(PIT_CHANNEL0, COUNT[0]);
    cpu.out8(PIT_CHANNEL0, COUNT[1]);
}

/// Ticks for good, a thousand times a second.
pub(crate) fn start_periodic(cpu: &Cpu) {
    start_pit(cpu, PIT_PERIODIC);
}

#[test]
fn it_ticks_at_ioapic_pin_0() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.set_ioapic_edge(0, 0x48);
    start_pit(cpu, PIT_PERIODIC);
    for _ in 0..5 {
        assert_eq!(cpu.interrupt(), 0x48);
        cpu.eoi();
    }
    start_pit(cpu, PIT_ONCE);
    assert_eq!(machine.take_exits(), [], "the PIT is KVM's own");
}

#[test]
fn it_ticks_at_the_pics_pin_0() {
    let Some(machine) = Machine::new(Mode::Kernel, 1) else {
        return;
    };
    let cpu = machine.cpu(0);
    cpu.accept_pic();
    // ICW1 to 4: edge, cascaded, vectors from 0x30, slave at pin 2, 8086 mode; then all but pin 0
    // masked.
    cpu.out8(PIC_COMMAND, 0x11);
    for word in [0x30, 1 << 2, 0x01, !1] {
        cpu.out8(PIC_DATA, word);
    }
    start_pit(cpu, PIT_PERIODIC);
    for _ in 0..5 {
        assert_eq!(cpu.interrupt(), 0x30);
        cpu.out8(PIC_COMMAND, PIC_END_OF_INTERRUPT);
    }
    assert_eq!(machine.take_exits(), [], "the PIC is KVM's own");
}
