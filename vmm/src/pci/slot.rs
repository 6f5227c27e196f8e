//! The slot of a root port: cards come and go while the guest runs (PCI Express 3.0, 6.7 and 7.8.9 to 7.8.11).
//!
//! ```text
//!              insert                        guest: power on
//!   Empty ────────────────▶ Inserted, off ──────────────────▶ Powered ◀─ with which a guest begins
//!     ▲     presence, button     ▲                               │
//!     │                          │  guest: power off             │ request_removal: the button is pressed
//!     │                          └───────────────────────────────┤
//!     │       guest: power off, after the button                 │
//!     └──────────────────────────────────────────────────────────┘
//! ```
//!
//! A card is taken out with the guest's consent alone, which is that it switches the power off after it was
//! asked by the attention button; one that was off already is taken out at once. A card without power
//! answers nowhere. Inserting presses the button too, as the guest may have its presence interrupt off: one
//! that sees both switches the slot on at once.
//!
//! Every write to slot control is a command, and is completed when the write returns. The interrupt is an
//! MSI whenever an enabled event comes and none is there yet.

use super::config_space::ConfigSpace;

/// Offsets from the PCI Express capability.
const LINK_STATUS: usize = 0x12;
const CAPABILITIES: usize = 0x14;
const CONTROL: usize = 0x18;
const STATUS: usize = 0x1a;

/// Slot capabilities: attention button, power controller, power indicator, hot-plug.
const CAPABLE: u32 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 6;
/// Where the physical slot number is.
const NUMBER_SHIFT: u32 = 19;

/// Slot status and, at the same bits, the enables in slot control.
const BUTTON: u16 = 1 << 0;
const PRESENCE: u16 = 1 << 3;
const COMMAND_COMPLETED: u16 = 1 << 4;
/// Slot status alone: a card is in the slot.
const PRESENT: u16 = 1 << 6;
/// Slot status: the link came up or went down; its enable is [`LINK_ENABLE`].
const LINK_CHANGED: u16 = 1 << 8;
/// Slot control: interrupts at all, power indicator, power off, link changes.
const INTERRUPT_ENABLE: u16 = 1 << 5;
const INDICATOR: u16 = 3 << 8;
const INDICATOR_ON: u16 = 1 << 8;
const INDICATOR_BLINK: u16 = 2 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
const POWER_OFF: u16 = 1 << 10;
const LINK_ENABLE: u16 = 1 << 12;
const WRITABLE: u16 =
    BUTTON | PRESENCE | COMMAND_COMPLETED | INTERRUPT_ENABLE | INDICATOR | POWER_OFF | LINK_ENABLE;
const EVENTS: u16 = BUTTON | PRESENCE | COMMAND_COMPLETED | LINK_CHANGED;
/// Link status: active.
const LINK_ACTIVE: u16 = 1 << 13;

/// What a write to the slot's registers means for the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// It has power now.
    PoweredOn,
    /// It has none any more.
    PoweredOff,
    /// It is taken out.
    Ejected,
}

/// Registers of one slot, which lie in the port's PCI Express capability.
pub(super) struct Slot {
    /// Offset of the capability.
    at: usize,
    occupied: bool,
    /// The guest was asked to let the card go.
    removing: bool,
    /// Whether the interrupt's condition holds.
    asserted: bool,
}

impl Slot {
    /// Sets up the registers of slot `number`, with a card that has power or empty.
    pub(super) fn new(config: &mut ConfigSpace, at: usize, number: u8, occupied: bool) -> Self {
        config.set_u32(
            at + CAPABILITIES,
            CAPABLE | u32::from(number) << NUMBER_SHIFT,
        );
        config.allow(at + CONTROL, &WRITABLE.to_le_bytes());
        let slot = Self {
            at,
            occupied,
            removing: false,
            asserted: false,
        };
        let (control, status) = match occupied {
            true => (INDICATOR_ON, PRESENT),
            false => (INDICATOR_OFF | POWER_OFF, 0),
        };
        config.set_u16(at + CONTROL, control);
        config.set_u16(at + STATUS, status);
        slot.set_link(config, occupied);
        slot
    }

    /// Whether a card in the slot has power.
    pub(super) fn powered(&self, config: &ConfigSpace) -> bool {
        config.u16(self.at + CONTROL) & POWER_OFF == 0
    }

    /// A card was put in. Returns whether to interrupt.
    pub(super) fn insert(&mut self, config: &mut ConfigSpace) -> bool {
        self.occupied = true;
        self.removing = false;
        let mut events = PRESENCE | BUTTON;
        // A guest may have left an empty slot on.
        if self.powered(config) {
            self.set_link(config, true);
            events |= LINK_CHANGED;
        }
        self.set_status(config, PRESENT | events)
    }

    /// Asks the guest to let the card go. Returns whether to interrupt, or that the card has no power, is
    /// thus not in use, and was taken out.
    pub(super) fn request_removal(&mut self, config: &mut ConfigSpace) -> (Change, bool) {
        if !self.powered(config) {
            self.empty(config);
            return (Change::Ejected, self.set_status(config, PRESENCE));
        }
        // Pressed a second time while the indicator blinks it would call the first off.
        let blinks = config.u16(self.at + CONTROL) & INDICATOR == INDICATOR_BLINK;
        if self.removing && blinks {
            return (Change::None, false);
        }
        self.removing = true;
        (Change::None, self.set_status(config, BUTTON))
    }

    /// Follows a write of the guest, which the register file has taken already. `control` is what slot
    /// control was before. Returns what it means, and whether to interrupt.
    pub(super) fn written(
        &mut self,
        config: &mut ConfigSpace,
        offset: usize,
        data: &[u8],
        control: u16,
    ) -> (Change, bool) {
        self.clear_events(config, offset, data);
        if !touches(offset, data.len(), self.at + CONTROL) {
            return (Change::None, self.update(config));
        }
        let change = self.power(config, control & POWER_OFF == 0);
        (change, self.set_status(config, COMMAND_COMPLETED))
    }

    /// Slot control now.
    pub(super) fn control(&self, config: &ConfigSpace) -> u16 {
        config.u16(self.at + CONTROL)
    }

    /// Events are cleared by writing ones.
    fn clear_events(&self, config: &mut ConfigSpace, offset: usize, data: &[u8]) {
        let mut status = config.u16(self.at + STATUS).to_le_bytes();
        for (i, &value) in data.iter().enumerate() {
            let byte = (offset + i).checked_sub(self.at + STATUS);
            if let Some(byte @ 0..2) = byte {
                status[byte] &= !(value & EVENTS.to_le_bytes()[byte]);
            }
        }
        config.set_u16(self.at + STATUS, u16::from_le_bytes(status));
    }

    fn power(&mut self, config: &mut ConfigSpace, was_on: bool) -> Change {
        let on = self.powered(config);
        if on == was_on || !self.occupied {
            return Change::None;
        }
        self.set_link(config, on);
        let status = config.u16(self.at + STATUS) | LINK_CHANGED;
        config.set_u16(self.at + STATUS, status);
        match (on, self.removing) {
            (true, _) => Change::PoweredOn,
            (false, false) => Change::PoweredOff,
            (false, true) => {
                self.empty(config);
                config.set_u16(self.at + STATUS, status & !PRESENT | PRESENCE);
                Change::Ejected
            }
        }
    }

    fn empty(&mut self, config: &mut ConfigSpace) {
        self.occupied = false;
        self.removing = false;
        let status = config.u16(self.at + STATUS);
        config.set_u16(self.at + STATUS, status & !PRESENT);
        self.set_link(config, false);
    }

    fn set_link(&self, config: &mut ConfigSpace, active: bool) {
        let status = config.u16(self.at + LINK_STATUS) & !LINK_ACTIVE;
        let active = if active { LINK_ACTIVE } else { 0 };
        config.set_u16(self.at + LINK_STATUS, status | active);
    }

    fn set_status(&mut self, config: &mut ConfigSpace, bits: u16) -> bool {
        let status = config.u16(self.at + STATUS) | bits;
        config.set_u16(self.at + STATUS, status);
        self.update(config)
    }

    /// Works the interrupt's condition out anew; returns whether it has begun to hold.
    fn update(&mut self, config: &ConfigSpace) -> bool {
        let control = config.u16(self.at + CONTROL);
        let status = config.u16(self.at + STATUS);
        let same_bits = control & (BUTTON | PRESENCE | COMMAND_COMPLETED);
        let enabled = match control & LINK_ENABLE {
            0 => same_bits,
            _ => same_bits | LINK_CHANGED,
        };
        let holds = control & INTERRUPT_ENABLE != 0 && status & enabled != 0;
        let held = std::mem::replace(&mut self.asserted, holds);
        holds && !held
    }
}

/// Whether an access meets a two-byte register.
fn touches(offset: usize, len: usize, register: usize) -> bool {
    offset < register + 2 && register < offset + len
}

#[cfg(test)]
mod tests {
    use super::super::config_space::Identity;
    use super::super::express::{self, PortType};
    use super::*;

    struct Port {
        config: ConfigSpace,
        slot: Slot,
        at: usize,
    }

    impl Port {
        fn new(occupied: bool) -> Self {
            let identity = Identity {
                vendor: 0x1b36,
                device: 0xc,
                revision: 0,
                class: 0x06_0400,
                subsystem: (0, 0),
            };
            let mut config = ConfigSpace::new(&identity, 1);
            let at = express::add_express(&mut config, PortType::RootPort);
            let slot = Slot::new(&mut config, at, 5, occupied);
            Self { config, slot, at }
        }

        fn status(&self) -> u16 {
            self.config.u16(self.at + STATUS)
        }

        fn link(&self) -> bool {
            self.config.u16(self.at + LINK_STATUS) & LINK_ACTIVE != 0
        }

        fn write(&mut self, register: usize, value: u16) -> (Change, bool) {
            let control = self.slot.control(&self.config);
            let (offset, data) = (self.at + register, value.to_le_bytes());
            self.config.write(offset, &data);
            self.slot.written(&mut self.config, offset, &data, control)
        }

        /// As a driver does after each interrupt.
        fn acknowledge(&mut self) -> u16 {
            let events = self.status() & EVENTS;
            assert_eq!(self.write(STATUS, events).0, Change::None);
            events
        }

        /// As Linux begins: events cleared, then interrupts on, but not for presence.
        fn listen(&mut self) {
            self.write(STATUS, EVENTS);
            let control = self.slot.control(&self.config);
            let enables = BUTTON | COMMAND_COMPLETED | INTERRUPT_ENABLE | LINK_ENABLE;
            assert_eq!(self.write(CONTROL, control | enables), (Change::None, true));
            assert_eq!(self.acknowledge(), COMMAND_COMPLETED);
        }

        fn set(&mut self, mask: u16, value: u16) -> (Change, bool) {
            let control = self.slot.control(&self.config);
            self.write(CONTROL, control & !mask | value)
        }
    }

    #[test]
    fn what_a_guest_finds_at_boot() {
        for occupied in [true, false] {
            let port = Port::new(occupied);
            let capabilities = port.config.u32(port.at + CAPABILITIES);
            assert_eq!(capabilities, 5 << 19 | 0x53, "{occupied}");
            assert_eq!(port.slot.powered(&port.config), occupied);
            assert_eq!(port.status(), if occupied { PRESENT } else { 0 });
            assert_eq!(port.link(), occupied);
        }
    }

    #[test]
    fn a_card_is_inserted_seen_and_switched_on() {
        let mut port = Port::new(false);
        port.listen();
        assert!(port.slot.insert(&mut port.config), "an interrupt");
        assert_eq!(port.acknowledge(), BUTTON | PRESENCE);
        assert_eq!(port.status(), PRESENT);
        assert!(!port.link(), "it has no power yet");
        let on = port.set(POWER_OFF | INDICATOR, INDICATOR_BLINK);
        assert_eq!(on, (Change::PoweredOn, true));
        assert!(port.link());
        assert_eq!(port.acknowledge(), COMMAND_COMPLETED | LINK_CHANGED);
        assert_eq!(port.set(INDICATOR, INDICATOR_ON), (Change::None, true));
    }

    #[test]
    fn a_card_goes_when_the_guest_switches_it_off_after_the_button() {
        let mut port = Port::new(true);
        port.listen();
        assert_eq!(
            port.slot.request_removal(&mut port.config),
            (Change::None, true)
        );
        assert_eq!(port.acknowledge(), BUTTON);
        assert_eq!(port.status(), PRESENT, "nothing goes without consent");
        port.set(INDICATOR, INDICATOR_BLINK);
        port.acknowledge();
        // Asked once more, the button is left alone: a second press would call it off.
        assert_eq!(
            port.slot.request_removal(&mut port.config),
            (Change::None, false)
        );
        assert_eq!(port.status(), PRESENT);
        assert_eq!(port.set(POWER_OFF, POWER_OFF), (Change::Ejected, true));
        assert_eq!(
            port.acknowledge(),
            PRESENCE | COMMAND_COMPLETED | LINK_CHANGED
        );
        assert_eq!(port.status(), 0);
        assert!(!port.link());
        // The slot takes the next one.
        assert!(port.slot.insert(&mut port.config));
        assert_eq!(port.set(POWER_OFF, 0).0, Change::PoweredOn);
    }

    #[test]
    fn a_guest_that_did_not_listen_can_be_asked_again() {
        let mut port = Port::new(true);
        assert_eq!(
            port.slot.request_removal(&mut port.config),
            (Change::None, false)
        );
        port.listen();
        assert_eq!(
            port.status(),
            PRESENT,
            "its driver forgot the press when it began"
        );
        assert_eq!(
            port.slot.request_removal(&mut port.config),
            (Change::None, true)
        );
    }

    #[test]
    fn a_card_that_is_only_switched_off_stays_and_is_taken_out_without_asking() {
        let mut port = Port::new(true);
        port.listen();
        assert_eq!(port.set(POWER_OFF, POWER_OFF).0, Change::PoweredOff);
        assert_eq!(port.status() & PRESENT, PRESENT);
        assert_eq!(port.set(POWER_OFF, 0).0, Change::PoweredOn);
        assert_eq!(port.set(POWER_OFF, POWER_OFF).0, Change::PoweredOff);
        assert_eq!(
            port.slot.request_removal(&mut port.config).0,
            Change::Ejected
        );
        assert_eq!(port.status() & PRESENT, 0);
    }

    #[test]
    fn an_interrupt_comes_once_for_events_that_overlap_and_not_where_it_is_off() {
        let mut port = Port::new(false);
        assert!(!port.slot.insert(&mut port.config), "nothing is enabled");
        assert_eq!(port.status() & EVENTS, BUTTON | PRESENCE);
        // Enabled late, it comes for what is there.
        let on = port.write(CONTROL, BUTTON | INTERRUPT_ENABLE | POWER_OFF);
        assert_eq!(on, (Change::None, true));
        assert_eq!(
            port.slot.request_removal(&mut port.config).0,
            Change::Ejected
        );
        assert!(
            !port.slot.insert(&mut port.config),
            "the first is not seen to"
        );
        // One event of two cleared: the condition holds on, and no second interrupt comes.
        assert_eq!(port.write(STATUS, PRESENCE), (Change::None, false));
        assert_eq!(port.write(STATUS, BUTTON), (Change::None, false));
        assert_eq!(
            port.slot.request_removal(&mut port.config).0,
            Change::Ejected
        );
        assert!(port.slot.insert(&mut port.config));
    }

    #[test]
    fn writes_of_any_width_do_what_their_bytes_say() {
        let mut port = Port::new(true);
        port.slot.request_removal(&mut port.config);
        let before = port.slot.control(&port.config);
        // A dword at slot control: the power off, and the button's event cleared.
        let data = (u32::from(POWER_OFF) | u32::from(BUTTON) << 16).to_le_bytes();
        let offset = port.at + CONTROL;
        port.config.write(offset, &data);
        let (change, _) = port.slot.written(&mut port.config, offset, &data, before);
        assert_eq!(change, Change::Ejected);
        assert_eq!(port.status() & BUTTON, 0);
        // One byte of slot status.
        let offset = port.at + STATUS;
        port.config.write(offset, &[0xff]);
        let control = port.slot.control(&port.config);
        port.slot
            .written(&mut port.config, offset, &[0xff], control);
        assert_eq!(port.status() & EVENTS, LINK_CHANGED);
    }
}
