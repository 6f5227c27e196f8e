//! The PIT ticks, through the IOAPIC and through the PIC.
//!
//! Intel 8254 and 8259A datasheets: control words, initialisation words.

use berth_irqchip::Mode;

use crate::guest::{Cpu, Machine};

pub(crate) const PIT_CHANNEL0: u16 = 0x40;
pub(crate) const PIT_CONTROL: u16 = 0x43;
/// Channel 0, low byte then high byte, mode 2 (rate generator).
pub(crate) const PIT_PERIODIC: u8 = 0x34;
/// The same, mode 0 (interrupt on terminal count).
pub(crate) const PIT_ONCE: u8 = 0x30;
pub(crate) const PIC_COMMAND: u16 = 0x20;
pub(crate) const PIC_DATA: u16 = 0x21;
pub(crate) const PIC_END_OF_INTERRUPT: u8 = 0x20;

/// 1193 counts of 1.193182 MHz: a millisecond.
fn start_pit(cpu: &Cpu, mode: u8) {
    load(cpu, mode, PIT_CHANNEL0, 1193);
}

/// Writes a control word and its channel's count, low byte first.
pub(crate) fn load(cpu: &Cpu, control: u8, channel: u16, count: u16) {
    cpu.out8(PIT_CONTROL, control);
    for byte in count.to_le_bytes() {
        cpu.out8(channel, byte);
    }
}

/// What a channel has left, which its control word 0 latches.
pub(crate) fn count(cpu: &Cpu, channel: u16) -> u16 {
    cpu.out8(PIT_CONTROL, ((channel - PIT_CHANNEL0) as u8) << 6);
    u16::from_le_bytes([cpu.in8(channel), cpu.in8(channel)])
}

/// Initialises both PICs, vectors from 0x30 and 0x38, lets this vCPU take their interrupts, and unmasks these.
pub(crate) fn start_pics(cpu: &Cpu, unmasked: u16) {
    cpu.accept_pic();
    let masks = (!unmasked).to_le_bytes();
    // ICW1 to 4: edge, cascaded, vectors, slave at pin 2, 8086 mode; then the mask.
    for (offset, words) in [
        (0, [0x30, 1 << 2, 0x01, masks[0]]),
        (0x80, [0x38, 2, 0x01, masks[1]]),
    ] {
        cpu.out8(PIC_COMMAND + offset, 0x11);
        for word in words {
            cpu.out8(PIC_DATA + offset, word);
        }
    }
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
    start_pics(cpu, 1);
    start_pit(cpu, PIT_PERIODIC);
    for _ in 0..5 {
        assert_eq!(cpu.interrupt(), 0x30);
        cpu.out8(PIC_COMMAND, PIC_END_OF_INTERRUPT);
    }
    assert_eq!(machine.take_exits(), [], "the PIC is KVM's own");
}
