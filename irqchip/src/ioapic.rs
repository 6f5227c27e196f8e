//! The registers of an I/O APIC, for the split irqchip: as data, no ioctl is made here.
//!
//! Intel 82093AA datasheet (order number 290566), section 3, with the EOI register of its successors
//! (82801 ICH, "IOxAPIC"): KVM's local APICs say in split mode that a guest may suppress the
//! broadcast of an end of interrupt, and one that does has no other way to end a level interrupt
//! here. So the version register reads 0x20, not 0x11.
//!
//! ```text
//!  page + 0x00 IOREGSEL  index ──┐                3.1.1
//!  page + 0x10 IOWIN  ◀──────────┴─▶ 0x00 IOAPICID   bits 27:24          3.2.1
//!                                    0x01 IOAPICVER  24 pins, version     3.2.2
//!                                    0x02 IOAPICARB  as IOAPICID          3.2.3
//!                                    0x10 + 2n, 0x11 + 2n  IOREDTBL[n]    3.2.4
//!  page + 0x40 EOI    write-only: ends this vector's level interrupts
//! ```
//!
//! A redirection entry, 64 bits: vector 7:0, delivery mode 10:8, logical destination 11, delivery
//! status 12 (always idle: a message leaves at once), polarity 13 (kept, of no effect: a line is
//! raised, not driven high), remote IRR 14 (read-only), level 15, masked 16, destination 63:56 and,
//! above 8 bits, 55:49 (`KVM_FEATURE_MSI_EXT_DEST_ID`; Linux, kvm/x86/cpuid.rst).
//!
//! Remote IRR is set when a level interrupt leaves and cleared by the end of an interrupt with its
//! vector, or when the entry is made edge-triggered, which is how drivers clear one that hangs.

use crate::{IOAPIC_PINS, MsiMessage};

/// Length of the registers' page as the guest sees it.
pub const IOAPIC_LEN: u64 = 0x1000;

const REGISTER_SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION_TABLE: u8 = 0x10;

const ID_BITS: u32 = 0xf << 24;
/// Highest redirection entry, and the version with an EOI register.
const VERSION_VALUE: u32 = (IOAPIC_PINS - 1) << 16 | 0x20;

const PINS: usize = IOAPIC_PINS as usize;

/// One entry of the redirection table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    const DELIVERY_MODE: u64 = 7 << 8;
    const LOWEST_PRIORITY: u64 = 1 << 8;
    const LOGICAL: u64 = 1 << 11;
    const DELIVERY_STATUS: u64 = 1 << 12;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    /// What software can write: vector to polarity, trigger mode, mask, destination.
    const WRITABLE: u64 = 0xfffe_0000_0001_bfff & !Self::DELIVERY_STATUS;
    const RESET: Self = Self(Self::MASKED);

    fn with_low(self, value: u32) -> Self {
        self.written((self.0 & !0xffff_ffff) | u64::from(value))
    }

    fn with_high(self, value: u32) -> Self {
        self.written((self.0 & 0xffff_ffff) | u64::from(value) << 32)
    }

    fn written(self, value: u64) -> Self {
        let new = Self((value & Self::WRITABLE) | (self.0 & Self::REMOTE_IRR));
        if new.is_level() {
            new
        } else {
            Self(new.0 & !Self::REMOTE_IRR)
        }
    }

    /// From saved bits; `None` if an entry cannot have them.
    pub(crate) fn from_bits(bits: u64) -> Option<Self> {
        let known = Self::WRITABLE | Self::REMOTE_IRR;
        (bits & !known == 0).then_some(Self(bits))
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn vector(self) -> u8 {
        self.0 as u8
    }

    pub(crate) fn is_masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    /// Level-triggered; of other delivery modes than fixed and lowest priority the bit means nothing.
    pub(crate) fn is_level(self) -> bool {
        self.0 & Self::LEVEL != 0 && self.0 & Self::DELIVERY_MODE <= Self::LOWEST_PRIORITY
    }

    pub(crate) fn remote_irr(self) -> bool {
        self.0 & Self::REMOTE_IRR != 0
    }

    /// What the pin sends to the local APICs (Intel SDM 3A, 11.11).
    pub(crate) fn message(self) -> MsiMessage {
        const MSI_BASE: u64 = 0xfee0_0000;
        const MSI_LOGICAL: u64 = 1 << 2;
        const MSI_REDIRECTION_HINT: u64 = 1 << 3;
        // Destination 63:56 to address 19:12, 55:49 to 11:5.
        let mut address = MSI_BASE | (self.0 >> 48 & 0xfffe) << 4;
        if self.0 & Self::LOGICAL != 0 {
            address |= MSI_LOGICAL;
        }
        if self.0 & Self::DELIVERY_MODE == Self::LOWEST_PRIORITY {
            address |= MSI_REDIRECTION_HINT;
        }
        // Vector and delivery mode have the same places; a level message says "assert" as well.
        let mut data = (self.0 & (Self::DELIVERY_MODE | 0xff)) as u32;
        if self.is_level() {
            data |= 1 << 15 | 1 << 14;
        }
        MsiMessage { address, data }
    }
}

/// What the guest's write did beyond the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The entry of this pin is another one now.
    Entry {
        pin: u32,
        before: Entry,
    },
    /// All level interrupts with this vector have ended.
    EndOfInterrupt(u8),
}

/// All registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ioapic {
    select: u8,
    id: u32,
    entries: [Entry; PINS],
}

impl Ioapic {
    /// As after a reset: every pin masked.
    pub(crate) fn new() -> Self {
        Self {
            select: 0,
            id: 0,
            entries: [Entry::RESET; PINS],
        }
    }

    /// From saved registers; `None` if the id has bits that it cannot have.
    pub(crate) fn from_parts(select: u8, id: u32, entries: [Entry; PINS]) -> Option<Self> {
        (id & !ID_BITS == 0).then_some(Self {
            select,
            id,
            entries,
        })
    }

    pub(crate) fn select(&self) -> u8 {
        self.select
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn entries(&self) -> &[Entry; PINS] {
        &self.entries
    }

    /// The entry of a pin that exists.
    pub(crate) fn entry(&self, pin: u32) -> Entry {
        self.entries[pin as usize]
    }

    /// Undoes a write.
    pub(crate) fn set_entry(&mut self, pin: u32, entry: Entry) {
        self.entries[pin as usize] = entry;
    }

    /// A level interrupt has left through this pin.
    pub(crate) fn set_remote_irr(&mut self, pin: u32) {
        self.entries[pin as usize].0 |= Entry::REMOTE_IRR;
    }

    /// Clears remote IRR of the level-triggered entries with this vector; returns their pins.
    pub(crate) fn end_of_interrupt(&mut self, vector: u8) -> Vec<u32> {
        let mut pins = Vec::new();
        for (pin, entry) in (0..).zip(&mut self.entries) {
            if entry.is_level() && entry.vector() == vector {
                entry.0 &= !Entry::REMOTE_IRR;
                pins.push(pin);
            }
        }
        pins
    }

    /// Clears remote IRR of one entry; whether it is a level-triggered one.
    pub(crate) fn end_of_pin(&mut self, pin: u32) -> bool {
        let entry = &mut self.entries[pin as usize];
        entry.0 &= !Entry::REMOTE_IRR;
        entry.is_level()
    }

    /// Answers a read at `offset` of the page; any width, as the buses of a VMM ask for them.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            REGISTER_SELECT => self.select.into(),
            WINDOW => self.register(),
            _ => 0,
        };
        let bytes = u64::from(value) >> (8 * (offset & 3));
        for (byte, value) in data.iter_mut().zip(bytes.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Takes a write at `offset` of the page. Registers are written whole, from their first byte
    /// (3.1: accesses of 32 bits); narrower writes reach IOREGSEL and EOI, whose value is one byte.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Some(&low) = data.first() else {
            return Effect::None;
        };
        match (offset, data) {
            (REGISTER_SELECT, _) => self.select = low,
            (END_OF_INTERRUPT, _) => return Effect::EndOfInterrupt(low),
            (WINDOW, [a, b, c, d, ..]) => {
                return self.write_register(u32::from_le_bytes([*a, *b, *c, *d]));
            }
            _ => {}
        }
        Effect::None
    }

    fn register(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            _ => self.selected_entry().map_or(0, |(pin, high)| {
                (self.entries[pin].0 >> if high { 32 } else { 0 }) as u32
            }),
        }
    }

    fn write_register(&mut self, value: u32) -> Effect {
        if self.select == ID {
            self.id = value & ID_BITS;
        }
        let Some((pin, high)) = self.selected_entry() else {
            return Effect::None;
        };
        let before = self.entries[pin];
        let after = if high {
            before.with_high(value)
        } else {
            before.with_low(value)
        };
        self.entries[pin] = after;
        if after == before {
            return Effect::None;
        }
        Effect::Entry {
            pin: pin as u32,
            before,
        }
    }

    /// The redirection entry that IOREGSEL names, and which half of it.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let at = usize::from(self.select.checked_sub(REDIRECTION_TABLE)?);
        (at / 2 < PINS).then_some((at / 2, at % 2 == 1))
    }
}

#[cfg(test)]
#[path = "ioapic_tests.rs"]
mod tests;
