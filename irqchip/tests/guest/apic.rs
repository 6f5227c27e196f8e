//! What a guest does to its interrupt controllers, in terms of [`Cpu`]'s commands.
//!
//! Intel SDM 3A, chapter 11 (local APIC, by its x2APIC MSRs); 82093AA datasheet (IOAPIC).

use std::time::Instant;

use super::{Cpu, DEADLINE};

const APIC_BASE: u32 = 0x1b;
const APIC_BASE_X2APIC: u64 = 0xfee0_0000 | 1 << 11 | 1 << 10;
const APIC_BASE_BSP: u64 = 1 << 8;
const APIC_BASE_OFF: u64 = 0xfee0_0000;
const APIC_BASE_XAPIC: u64 = APIC_BASE_OFF | 1 << 11;
/// Registers of the memory-mapped mode.
const XAPIC_ID: u32 = 0xfee0_0020;
const XAPIC_EOI: u32 = 0xfee0_00b0;
const XAPIC_SPURIOUS: u32 = 0xfee0_00f0;
const XAPIC_ICR: u32 = 0xfee0_0300;
const XAPIC_ICR_HIGH: u32 = 0xfee0_0310;
const APIC_ID: u32 = 0x802;
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const SPURIOUS_ENABLE: u64 = 1 << 8 | 0xff;
const ICR: u32 = 0x830;
/// First of eight registers with 32 vectors each.
const IN_SERVICE: u32 = 0x810;
/// The same for vectors that wait.
const REQUEST: u32 = 0x820;
const LVT_LINT0: u32 = 0x835;
const LVT_EXTINT: u64 = 7 << 8;
pub(crate) const LVT_TIMER: u32 = 0x832;
/// Timer mode bits of `LVT_TIMER`.
pub(crate) const TSC_DEADLINE_MODE: u64 = 2 << 17;
const TIMER_INITIAL: u32 = 0x838;
const TIMER_CURRENT: u32 = 0x839;
const TIMER_DIVIDE: u32 = 0x83e;
/// The divider's 1.
const DIVIDE_BY_1: u64 = 0xb;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

const IOAPIC_INDEX: u32 = 0xfec0_0000;
const IOAPIC_DATA: u32 = 0xfec0_0010;
const IOAPIC_EOI: u32 = 0xfec0_0040;
const IOAPIC_MASKED: u32 = 1 << 16;
const IOAPIC_LEVEL: u32 = 1 << 15;
const IOAPIC_REMOTE_IRR: u32 = 1 << 14;

/// What an interrupt command makes the other vCPU do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ipi {
    Fixed(u8),
    Init,
    /// Start in real mode on this page.
    Startup(u8),
}

impl Cpu {
    /// Switches the local APIC on, in x2APIC mode.
    pub(crate) fn enable_apic(&self) {
        let bsp = self.read_msr(APIC_BASE) & APIC_BASE_BSP;
        self.write_msr(APIC_BASE, APIC_BASE_X2APIC | bsp);
        self.write_msr(SPURIOUS, SPURIOUS_ENABLE);
    }

    /// Goes back to the memory-mapped mode, with an id that it chooses.
    pub(crate) fn enable_xapic(&self, id: u8) {
        let bsp = self.read_msr(APIC_BASE) & APIC_BASE_BSP;
        self.write_msr(APIC_BASE, APIC_BASE_OFF | bsp);
        self.write_msr(APIC_BASE, APIC_BASE_XAPIC | bsp);
        self.write32(XAPIC_SPURIOUS, SPURIOUS_ENABLE as u32);
        self.write32(XAPIC_ID, u32::from(id) << 24);
    }

    /// Sends `vector` in that mode.
    pub(crate) fn send_ipi_by_memory(&self, id: u8, vector: u8) {
        const ASSERT: u32 = 1 << 14;
        self.write32(XAPIC_ICR_HIGH, u32::from(id) << 24);
        self.write32(XAPIC_ICR, ASSERT | u32::from(vector));
    }

    pub(crate) fn eoi_by_memory(&self) {
        self.write32(XAPIC_EOI, 0);
    }

    pub(crate) fn apic_id(&self) -> u32 {
        self.read_msr(APIC_ID) as u32
    }

    /// Ends the interrupt that was taken last.
    pub(crate) fn eoi(&self) {
        self.write_msr(EOI, 0);
    }

    /// Has the timer count down once, and interrupt with `vector` then. KVM's counts are nanoseconds.
    pub(crate) fn start_timer_once(&self, vector: u8, count: u32) {
        self.write_msr(TIMER_DIVIDE, DIVIDE_BY_1);
        self.write_msr(LVT_TIMER, vector.into());
        self.write_msr(TIMER_INITIAL, count.into());
    }

    /// What the timer has left.
    pub(crate) fn timer_count(&self) -> u32 {
        self.read_msr(TIMER_CURRENT) as u32
    }

    /// Whether `vector` was taken and not yet ended.
    pub(crate) fn in_service(&self, vector: u8) -> bool {
        let bits = self.read_msr(IN_SERVICE + u32::from(vector / 32));
        bits >> (vector % 32) & 1 != 0
    }

    /// Whether `vector` waits in the local APIC.
    fn is_requested(&self, vector: u8) -> bool {
        let bits = self.read_msr(REQUEST + u32::from(vector / 32));
        bits >> (vector % 32) & 1 != 0
    }

    /// Waits until `vector` waits in the local APIC: an irqfd may deliver a moment later.
    pub(crate) fn wait_requested(&self, vector: u8) {
        let deadline = Instant::now() + DEADLINE;
        while !self.is_requested(vector) {
            assert!(Instant::now() < deadline, "no {vector:#x} in the IRR");
        }
    }

    /// Takes an interrupt with this vector if one waits.
    pub(crate) fn take_any(&self, vector: u8) {
        if self.is_requested(vector) {
            assert_eq!(self.interrupt(), vector);
            self.eoi();
        }
    }

    /// Sends an interrupt to the vCPU with this APIC id.
    pub(crate) fn send_ipi(&self, apic_id: u32, ipi: Ipi) {
        self.send_ipi_at(apic_id, ipi);
    }

    /// The same; returns the TSC just before.
    pub(crate) fn send_ipi_at(&self, apic_id: u32, ipi: Ipi) -> u64 {
        const ASSERT: u64 = 1 << 14;
        let command = match ipi {
            Ipi::Fixed(vector) => u64::from(vector),
            Ipi::Init => 5 << 8,
            Ipi::Startup(page) => 6 << 8 | u64::from(page),
        };
        self.write_msr_at(ICR, u64::from(apic_id) << 32 | ASSERT | command)
    }

    /// Masks both PICs, which KVM's reset state lets through to vCPU 0.
    pub(super) fn mask_pic(&self) {
        for data_port in [0x21, 0xa1] {
            self.out8(data_port, 0xff);
        }
    }

    /// Lets the PICs interrupt this vCPU through its LINT0 pin.
    pub(crate) fn accept_pic(&self) {
        self.write_msr(LVT_LINT0, LVT_EXTINT);
    }

    /// Routes an IOAPIC pin to `vector` on vCPU 0, active high.
    pub(crate) fn set_ioapic_edge(&self, pin: u32, vector: u8) {
        self.write_ioapic(pin, vector.into(), 0);
    }

    pub(crate) fn set_ioapic_level(&self, pin: u32, vector: u8) {
        self.set_ioapic_level_to(pin, vector, 0);
    }

    /// Routes a pin to the vCPU with this APIC id, which may have more than eight bits.
    pub(crate) fn set_ioapic_level_to(&self, pin: u32, vector: u8, apic_id: u16) {
        let id = u32::from(apic_id);
        let destination = (id & 0xff) << 24 | (id >> 8) << 17;
        self.write_ioapic(pin, IOAPIC_LEVEL | u32::from(vector), destination);
    }

    pub(crate) fn mask_ioapic(&self, pin: u32) {
        self.write32(IOAPIC_INDEX, 0x10 + 2 * pin);
        let entry = self.read32(IOAPIC_DATA);
        self.write32(IOAPIC_DATA, entry | IOAPIC_MASKED);
    }

    /// Ends level interrupts with this vector at the IOAPIC alone.
    pub(crate) fn end_ioapic_interrupt(&self, vector: u8) {
        self.write32(IOAPIC_EOI, vector.into());
    }

    /// Whether the IOAPIC waits for the end of a level-triggered interrupt of this pin.
    pub(crate) fn ioapic_remote_irr(&self, pin: u32) -> bool {
        self.write32(IOAPIC_INDEX, 0x10 + 2 * pin);
        self.read32(IOAPIC_DATA) & IOAPIC_REMOTE_IRR != 0
    }

    fn write_ioapic(&self, pin: u32, low: u32, high: u32) {
        self.write32(IOAPIC_INDEX, 0x11 + 2 * pin);
        self.write32(IOAPIC_DATA, high);
        self.write32(IOAPIC_INDEX, 0x10 + 2 * pin);
        self.write32(IOAPIC_DATA, low);
    }
}
