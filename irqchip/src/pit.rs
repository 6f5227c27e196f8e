//! The PIT's counters in saved state: what KVM begins anew, and what is done about it.
//!
//! `KVM_SET_PIT2` loads every channel with its initial count, from now on, however far it had counted. Of
//! channels 1 and 2 KVM says when they were loaded, so one that counts down once is saved with what it had
//! left: a guest that measures its TSC against channel 2 while it is moved measures right.
//!
//! Of channel 0, the timer interrupt, KVM tells nobody how far it is. So it begins its count again: a periodic
//! one goes on ticking, the first tick up to a period late; one that counts down once comes once, up to a count
//! (55 ms at most) late; and one that had run out comes once more, which is the price of never losing one.
//!
//! Intel 8254 data sheet, "mode definitions"; KVM api.rst, `KVM_GET_PIT2`.

#![forbid(unsafe_code)]

use kvm_bindings::{kvm_pit_channel_state, kvm_pit_state2};

/// Counts a second, as KVM has it.
const FREQUENCY: i128 = 1_193_181;
const NS_PER_S: i128 = 1_000_000_000;
/// Interrupt on terminal count, software-triggered strobe: they count once and wait to be loaded again.
const COUNT_ONCE: [u8; 2] = [0, 4];

/// Gives each channel that counts down once what it has left at `now_ns` of the monotonic clock.
pub(crate) fn keep_counting(pit: &mut kvm_pit_state2, now_ns: i64) {
    for channel in &mut pit.channels[1..] {
        if COUNT_ONCE.contains(&channel.mode) {
            channel.count = left(channel, now_ns);
        }
    }
}

/// At least 1: it has run out as soon as it is loaded. 0 would be the largest count.
fn left(channel: &kvm_pit_channel_state, now_ns: i64) -> u32 {
    let elapsed = i128::from(now_ns) - i128::from(channel.count_load_time);
    if channel.count_load_time <= 0 || elapsed < 0 {
        return channel.count;
    }
    let counted = elapsed * FREQUENCY / NS_PER_S;
    let left = i128::from(channel.count) - counted;
    u32::try_from(left.max(1)).unwrap_or(channel.count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOADED: i64 = 5_000_000_000;

    /// What is left of a channel that was loaded with 11 932, 10 ms.
    fn after(mode: u8, ns: i64) -> u32 {
        let mut pit = kvm_pit_state2::default();
        for channel in &mut pit.channels {
            (channel.mode, channel.count) = (mode, 11_932);
            channel.count_load_time = LOADED;
        }
        keep_counting(&mut pit, LOADED + ns);
        assert_eq!(pit.channels[0].count, 11_932, "KVM does not say");
        assert_eq!(pit.channels[1].count, pit.channels[2].count);
        pit.channels[2].count
    }

    #[test]
    fn a_count_goes_on_where_it_was() {
        assert_eq!(after(0, 0), 11_932);
        assert_eq!(after(0, 2_500_000), 11_932 - 2_982);
        assert_eq!(after(4, 9_000_000), 11_932 - 10_738);
    }

    #[test]
    fn one_that_has_run_out_stays_so() {
        assert_eq!(after(0, 10_000_000), 1);
        assert_eq!(after(4, i64::MAX - LOADED), 1);
    }

    #[test]
    fn a_period_is_not_shortened() {
        for mode in [1, 2, 3, 5] {
            assert_eq!(after(mode, 2_500_000), 11_932);
        }
    }

    #[test]
    fn one_that_was_never_loaded_or_will_be_is_left_alone() {
        assert_eq!(after(0, -1), 11_932);
        let mut pit = kvm_pit_state2::default();
        keep_counting(&mut pit, LOADED);
        assert_eq!(pit.channels[2].count, 0);
    }
}
