//! The ACPI PM timer: a free-running counter at the port that the FADT names.
//!
//! 3.579545 MHz, 32 bits of which the FADT promises 24, counted from the machine's start by the host's
//! monotonic clock; it goes on while the guest is paused, as TSC and KVM clock do. No carry interrupt: TMR_STS is never
//! set, which a guest that reads often enough need not care about. Reference: ACPI 6.5, 4.8.3.3.
//!
//! Read by vCPU threads, without a lock.

#![forbid(unsafe_code)]

use std::time::Instant;

use crate::bus::BusDevice;

/// Length of its port range.
pub const PM_TIMER_LEN: u64 = 4;
const HZ: u128 = 3_579_545;

/// The counter.
pub struct PmTimer {
    started: Instant,
}

impl PmTimer {
    /// A counter that is 0 now.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
        }
    }
}

impl Default for PmTimer {
    fn default() -> Self {
        Self::new()
    }
}

/// Ticks after so many nanoseconds.
fn ticks(nanoseconds: u128) -> u32 {
    (nanoseconds * HZ / 1_000_000_000) as u32
}

/// The counter's bytes from `offset` on, then zeros.
fn answer(count: u32, offset: u64, data: &mut [u8]) {
    let bytes = count.to_le_bytes();
    for (at, byte) in (offset..).zip(data) {
        let found = usize::try_from(at).ok().and_then(|at| bytes.get(at));
        *byte = found.copied().unwrap_or(0);
    }
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        answer(ticks(self.started.elapsed().as_nanos()), offset, data);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_at_its_rate_and_wraps_at_32_bits() {
        assert_eq!(ticks(1_000_000_000), 3_579_545);
        assert_eq!(ticks(279), 0);
        assert_eq!(ticks(280), 1);
        // 1200 seconds are more than 32 bits of ticks.
        assert_eq!(
            ticks(1_200_000_000_000),
            (4_295_454_000_u64 - (1 << 32)) as u32
        );
    }

    #[test]
    fn it_runs_and_a_write_does_not_stop_it() {
        let timer = PmTimer::new();
        let read = || {
            let mut word = [0; 4];
            timer.read(0, &mut word);
            u32::from_le_bytes(word)
        };
        timer.write(0, &[0xff; 4]);
        let first = read();
        while read() == first {}
        assert!(read() > first);
    }

    #[test]
    fn every_width_at_every_offset_is_answered() {
        for offset in 0..PM_TIMER_LEN {
            for len in [1, 2, 4, 8] {
                PmTimer::new().read(offset, &mut vec![0xaa; len]);
                PmTimer::new().write(offset, &vec![0xaa; len]);
            }
        }
        let mut half = [0xaa; 2];
        answer(0x8003_b698, 2, &mut half);
        assert_eq!(half, [0x03, 0x80]);
        let mut eight = [0xaa; 8];
        answer(0x8003_b698, 0, &mut eight);
        assert_eq!(eight, [0x98, 0xb6, 0x03, 0x80, 0, 0, 0, 0]);
    }
}
