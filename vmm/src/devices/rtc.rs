//! CMOS clock: the MC146818's registers behind ports 0x70 and 0x71.
//!
//! Time is the host's in UTC plus what the guest set it off by; it runs on while the guest is paused.
//! There are no alarms and no periodic interrupts (the guest's kernel has better ones): register C
//! always reads 0. Registers past the clock are plain memory, among them the memory sizes that
//! firmware leaves there. Reference: Motorola MC146818A data sheet, "Address map", "Register A-D".

#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

/// First of the two ports: register index, data.
pub const PORT: u64 = 0x70;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Register B: updates halted while the guest writes the time.
const B_SET: u8 = 1 << 7;
/// Register B: binary instead of BCD.
const B_BINARY: u8 = 1 << 2;
/// Register B: 24-hour mode, the only one.
const B_24H: u8 = 1 << 1;
/// Register A: 32.768 kHz time base, 1024 Hz rate.
const A_DEFAULT: u8 = 0x26;
/// Register A: update in progress; never set, a read is one instant.
const A_UIP: u8 = 1 << 7;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;

struct Registers {
    index: u8,
    memory: [u8; 128],
    /// What the guest's clock is ahead of the host's.
    offset_s: i64,
}

/// The clock.
pub struct Rtc {
    /// Protects the registers; held for one access.
    registers: Mutex<Registers>,
    now: fn() -> i64,
}

impl Rtc {
    /// A clock of a guest with so many bytes of RAM below the PCI hole and from 4 GiB on.
    pub fn new(low: u64, high: u64) -> Self {
        Self::with_clock((low, high), host_seconds)
    }

    fn with_clock(ram: (u64, u64), now: fn() -> i64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(REG_A)] = A_DEFAULT;
        memory[usize::from(REG_B)] = B_24H;
        leave_memory_sizes(&mut memory, ram);
        Self {
            registers: Mutex::new(Registers {
                index: 0,
                memory,
                offset_s: 0,
            }),
            now,
        }
    }

    fn read_register(&self, registers: &Registers) -> u8 {
        let stored = registers.memory[usize::from(registers.index)];
        let b = registers.memory[usize::from(REG_B)];
        match registers.index {
            REG_A => stored & !A_UIP,
            REG_C => 0,
            REG_D => D_VALID,
            index if is_time(index) && b & B_SET == 0 => {
                let date = Date::from_unix((self.now)() + registers.offset_s);
                encode(date.register(index), b)
            }
            _ => stored,
        }
    }

    fn write_register(&self, registers: &mut Registers, value: u8) {
        let index = registers.index;
        let old_b = registers.memory[usize::from(REG_B)];
        match index {
            REG_B => {
                let value = value | B_24H;
                if value & B_SET != 0 && old_b & B_SET == 0 {
                    let date = Date::from_unix((self.now)() + registers.offset_s);
                    for index in (0..128).filter(|index| is_time(*index)) {
                        registers.memory[usize::from(index)] = encode(date.register(index), value);
                    }
                }
                registers.memory[usize::from(REG_B)] = value;
                if value & B_SET == 0 && old_b & B_SET != 0 {
                    let date = Date::from_registers(&registers.memory, value);
                    registers.offset_s = date.to_unix() - (self.now)();
                }
            }
            REG_C | REG_D => {}
            // Without SET the write would be undone by the next update.
            index if is_time(index) && old_b & B_SET == 0 => {}
            _ => registers.memory[usize::from(index)] = value,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        data.fill(0xff);
        if let ([byte], 1) = (data, offset) {
            *byte = self.read_register(&registers);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match (offset, data) {
            // Bit 7 masks NMI on a PC and is not part of the index.
            (0, &[index]) => registers.index = index & 0x7f,
            (1, &[value]) => self.write_register(&mut registers, value),
            _ => {}
        }
    }
}

fn host_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}

fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

fn encode(value: u8, reg_b: u8) -> u8 {
    if reg_b & B_BINARY != 0 {
        value
    } else {
        ((value / 10) << 4) | (value % 10)
    }
}

fn decode(value: u8, reg_b: u8) -> u8 {
    if reg_b & B_BINARY != 0 {
        value
    } else {
        (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
    }
}

/// What a PC's firmware leaves: KiB below 1 MiB, KiB above it, 64 KiB units above 16 MiB and 4 GiB.
fn leave_memory_sizes(memory: &mut [u8; 128], (low, high): (u64, u64)) {
    let mut put = |at: usize, value: u64| {
        let value = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
        memory[at..at + 2].copy_from_slice(&value);
    };
    put(0x15, 640);
    let extended_kib = low.saturating_sub(1 << 20) >> 10;
    put(0x17, extended_kib);
    put(0x30, extended_kib);
    put(0x34, low.saturating_sub(16 << 20) >> 16);
    let high_units = (high >> 16).to_le_bytes();
    memory[0x5b..0x5e].copy_from_slice(&high_units[..3]);
}

/// A civil date and time, UTC, proleptic Gregorian.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 is Sunday.
    weekday: u8,
}

const DAY_S: i64 = 86_400;
/// Days of 400 years.
const ERA_DAYS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;

impl Date {
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY_S);
        let second_of_day = seconds.rem_euclid(DAY_S);
        // Years here begin in March, so that the leap day is the last one.
        let shifted = days + EPOCH_DAYS;
        let era = shifted.div_euclid(ERA_DAYS);
        let day_of_era = shifted.rem_euclid(ERA_DAYS);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
            // The epoch was a Thursday.
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day.max(1)) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * ERA_DAYS + day_of_era - EPOCH_DAYS;
        days * DAY_S
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    fn from_registers(memory: &[u8; 128], reg_b: u8) -> Self {
        let get = |index: u8| decode(memory[usize::from(index)], reg_b);
        Self {
            year: i64::from(get(CENTURY)) * 100 + i64::from(get(YEAR)),
            month: get(MONTH),
            day: get(DAY),
            hour: get(HOURS),
            minute: get(MINUTES),
            second: get(SECONDS),
            weekday: get(WEEKDAY),
        }
    }

    fn register(&self, index: u8) -> u8 {
        match index {
            SECONDS => self.second,
            MINUTES => self.minute,
            HOURS => self.hour,
            WEEKDAY => self.weekday,
            DAY => self.day,
            MONTH => self.month,
            YEAR => self.year.rem_euclid(100) as u8,
            _ => self.year.div_euclid(100) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-24 05:39:38 UTC, a Tuesday.
    const NOW: i64 = 1_795_498_778;

    fn get(rtc: &Rtc, index: u8) -> u8 {
        let mut byte = [0];
        rtc.write(0, &[index]);
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn tells_the_time_in_bcd() {
        let rtc = Rtc::with_clock((512 << 20, 0), || NOW);
        let read = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY]
            .map(|index| get(&rtc, index));
        assert_eq!(read, [0x20, 0x26, 0x11, 0x24, 0x05, 0x39, 0x38, 3]);
        assert_eq!(get(&rtc, REG_D), D_VALID);
        assert_eq!(get(&rtc, REG_A) & A_UIP, 0);
    }

    #[test]
    fn the_guest_may_set_its_clock() {
        let rtc = Rtc::with_clock((512 << 20, 0), || NOW);
        set(&rtc, HOURS, 0x11);
        assert_eq!(get(&rtc, HOURS), 0x05, "no write without SET");
        set(&rtc, REG_B, B_SET | B_24H);
        set(&rtc, HOURS, 0x11);
        assert_eq!(get(&rtc, HOURS), 0x11);
        set(&rtc, REG_B, B_24H | B_BINARY);
        assert_eq!(
            get(&rtc, HOURS),
            17,
            "0x11 is taken as the mode says when SET ends"
        );
    }

    #[test]
    fn dates_survive_the_way_there_and_back() {
        for seconds in (-4_000_000_000i64..8_000_000_000).step_by(86_400 * 13 + 7) {
            assert_eq!(Date::from_unix(seconds).to_unix(), seconds);
        }
        let leap = Date::from_unix(951_782_400);
        assert_eq!((leap.year, leap.month, leap.day), (2000, 2, 29));
    }

    #[test]
    fn nonsense_in_the_registers_is_no_panic() {
        let rtc = Rtc::with_clock((512 << 20, 0), || NOW);
        set(&rtc, REG_B, B_SET);
        for index in 0..128 {
            if index != REG_B {
                set(&rtc, index, 0xff);
            }
        }
        set(&rtc, REG_B, 0);
        get(&rtc, YEAR);
        let mut wide = [0; 4];
        rtc.read(1, &mut wide);
        rtc.write(0, &wide);
    }

    #[test]
    fn memory_sizes_are_left_where_firmware_leaves_them() {
        let rtc = Rtc::with_clock((3 << 30, 2 << 30), || NOW);
        assert_eq!([get(&rtc, 0x34), get(&rtc, 0x35)], 0xbf00u16.to_le_bytes());
        assert_eq!(get(&rtc, 0x5c), 0x80);
    }
}
