//! Power: ACPI's PM1a block, the reset register, and the keyboard controller's reset line.
//!
//! ```text
//!  0x600 PM1 status   bit 8 power button; written 1 to clear     status & enable ─▶ SCI, level, pin 9
//!  0x602 PM1 enable
//!  0x604 PM1 control  SLP_EN with SLP_TYP 5 ─▶ power off
//!  0xcf9 reset        bit 2 ─▶ reset        0x64 keyboard controller, command 0xfe ─▶ reset
//! ```
//!
//! The SCI's line drops when the guest ends the interrupt; the event loop then calls
//! [`PowerBlock::resample`], which raises it again if the condition still holds.
//! Reference: ACPI 6.5, 4.8.3 (PM1), 4.8.4.6 (reset register).

#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::bus::BusDevice;
use crate::memory::layout::{PM1A_CNT_PORT, PM1A_EVT_PORT, S5_SLEEP_TYPE};
use crate::vm::{GuestEvent, GuestEvents};

/// Length of the port range from [`PM1A_EVT_PORT`] on.
pub const PM_BLOCK_LEN: u64 = 8;
/// Ports of the keyboard controller: data at the first, command and status four above.
pub const I8042_PORT: u64 = 0x60;
/// Command and status port of the keyboard controller.
pub const I8042_COMMAND_PORT: u64 = 0x64;

const CONTROL: u64 = (PM1A_CNT_PORT - PM1A_EVT_PORT) as u64;
const POWER_BUTTON: u16 = 1 << 8;
/// Fixed events: timer carry, bus master, global, power button, sleep button, RTC, wake.
const STATUS_BITS: u16 = 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 15;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const I8042_RESET: u8 = 0xfe;
const RESET_CPU: u8 = 1 << 2;

#[derive(Default)]
struct Pm1 {
    status: u16,
    enable: u16,
    control: u16,
}

impl Pm1 {
    fn asserted(&self) -> bool {
        self.status & self.enable != 0
    }
}

/// Raises the SCI's line.
pub type RaiseSci = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// PM1a event and control registers.
pub struct PowerBlock {
    /// Protects the registers; held for one access and the eventfd write of the SCI.
    pm1: Mutex<Pm1>,
    sci: RaiseSci,
    events: GuestEvents,
    /// A sleep state that is not there was asked for, and said so once.
    warned: AtomicBool,
}

impl PowerBlock {
    /// A block whose interrupt is `sci` and whose power-off goes to `events`.
    pub fn new(sci: RaiseSci, events: GuestEvents) -> Self {
        Self {
            pm1: Mutex::default(),
            sci,
            events,
            warned: AtomicBool::new(false),
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        let mut pm1 = self.lock();
        pm1.status |= POWER_BUTTON;
        self.update(&pm1);
    }

    /// The guest ended an SCI: raises it again if its condition still holds.
    pub fn resample(&self) {
        let pm1 = self.lock();
        self.update(&pm1);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pm1> {
        self.pm1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, pm1: &Pm1) {
        if pm1.asserted()
            && let Err(error) = (self.sci)()
        {
            tracing::warn!(%error, "cannot raise the ACPI interrupt");
        }
    }

    fn register_byte(&self, pm1: &Pm1, at: u64) -> u8 {
        let control = pm1.control | SCI_ENABLED;
        match at {
            0..2 => pm1.status.to_le_bytes()[at as usize],
            2..4 => pm1.enable.to_le_bytes()[at as usize - 2],
            CONTROL..=5 => control.to_le_bytes()[(at - CONTROL) as usize],
            _ => 0,
        }
    }

    fn write_control(&self, pm1: &mut Pm1, value: u16) {
        pm1.control = value & !SLEEP_ENABLE;
        let sleep_type = (value >> 10 & 7) as u8;
        if value & SLEEP_ENABLE == 0 {
            return;
        }
        if sleep_type == S5_SLEEP_TYPE {
            self.events.send(GuestEvent::PowerOff);
        } else if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                sleep_type,
                "the guest asked for a sleep state that it has not got"
            );
        }
    }
}

impl BusDevice for PowerBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let pm1 = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register_byte(&pm1, at);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut pm1 = self.lock();
        let mut word = [0; 2];
        let len = data.len().min(2);
        word[..len].copy_from_slice(&data[..len]);
        let value = u16::from_le_bytes(word);
        match offset {
            0 => {
                pm1.status &= !(value & STATUS_BITS);
                if let [_, _, low, high] = *data {
                    pm1.enable = u16::from_le_bytes([low, high]);
                }
            }
            1 => pm1.status &= !(value << 8 & STATUS_BITS),
            2 if len == 2 => pm1.enable = value,
            2 => pm1.enable = pm1.enable & 0xff00 | value,
            3 => pm1.enable = pm1.enable & 0x00ff | value << 8,
            CONTROL if len == 2 => self.write_control(&mut pm1, value),
            5 => {
                let value = pm1.control & 0xff | value << 8;
                self.write_control(&mut pm1, value);
            }
            _ => {}
        }
        self.update(&pm1);
    }
}

/// The FADT's reset register, one port.
pub struct ResetRegister {
    events: GuestEvents,
}

impl ResetRegister {
    /// A register whose reset goes to `events`.
    pub fn new(events: GuestEvents) -> Self {
        Self { events }
    }
}

impl BusDevice for ResetRegister {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & RESET_CPU != 0) {
            self.events.send(GuestEvent::Reset);
        }
    }
}

/// What is left of a keyboard controller: nothing typed, never busy, and the reset line.
pub struct KeyboardController {
    events: GuestEvents,
}

impl KeyboardController {
    /// A controller whose reset line goes to `events`.
    pub fn new(events: GuestEvents) -> Self {
        Self { events }
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        // Sits at the command port alone.
        if data == [I8042_RESET] {
            self.events.send(GuestEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    struct Board {
        block: PowerBlock,
        raised: Arc<AtomicUsize>,
        events: Receiver<GuestEvent>,
    }

    fn board() -> Board {
        let (sender, events) = channel();
        let raised = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&raised);
        let sci = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let guest_events = GuestEvents::new(move |event| sender.send(event).unwrap());
        Board {
            block: PowerBlock::new(sci, guest_events),
            raised,
            events,
        }
    }

    fn read16(block: &PowerBlock, offset: u64) -> u16 {
        let mut word = [0; 2];
        block.read(offset, &mut word);
        u16::from_le_bytes(word)
    }

    #[test]
    fn the_button_interrupts_until_the_guest_clears_it() {
        let board = board();
        board.block.press_power_button();
        assert_eq!(board.raised.load(Ordering::Relaxed), 0, "not enabled yet");
        board.block.write(2, &POWER_BUTTON.to_le_bytes());
        assert_eq!(board.raised.load(Ordering::Relaxed), 1);
        board.block.resample();
        assert_eq!(board.raised.load(Ordering::Relaxed), 2, "still pressed");
        assert_eq!(read16(&board.block, 0), POWER_BUTTON);
        board.block.write(0, &POWER_BUTTON.to_le_bytes());
        board.block.resample();
        assert_eq!(read16(&board.block, 0), 0);
        assert_eq!(board.raised.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn soft_off_is_sleep_type_five() {
        let board = board();
        let five = SLEEP_ENABLE | u16::from(S5_SLEEP_TYPE) << 10;
        board.block.write(4, &(five & !SLEEP_ENABLE).to_le_bytes());
        board
            .block
            .write(4, &(SLEEP_ENABLE | 3 << 10).to_le_bytes());
        assert!(board.events.try_recv().is_err());
        board.block.write(4, &five.to_le_bytes());
        assert_eq!(board.events.try_recv(), Ok(GuestEvent::PowerOff));
        assert_eq!(read16(&board.block, 4) & SCI_ENABLED, SCI_ENABLED);
    }

    #[test]
    fn every_width_at_every_offset_is_answered() {
        let board = board();
        for offset in 0..PM_BLOCK_LEN {
            for len in [1, 2, 4, 8] {
                let mut data = vec![0; len];
                board.block.read(offset, &mut data);
                board.block.write(offset, &vec![0; len]);
            }
        }
    }

    #[test]
    fn both_reset_lines_reset() {
        let (sender, events) = channel();
        let guest_events = || {
            let sender = sender.clone();
            GuestEvents::new(move |event| sender.send(event).unwrap())
        };
        let register = ResetRegister::new(guest_events());
        register.write(0, &[2]);
        assert!(events.try_recv().is_err(), "bit 1 only chooses the kind");
        register.write(0, &[crate::memory::layout::RESET_VALUE]);
        assert_eq!(events.try_recv(), Ok(GuestEvent::Reset));
        let keyboard = KeyboardController::new(guest_events());
        keyboard.write(0, &[0xd1]);
        keyboard.write(0, &[I8042_RESET]);
        assert_eq!(events.try_recv(), Ok(GuestEvent::Reset));
        assert!(events.try_recv().is_err());
    }
}
