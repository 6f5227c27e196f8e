//! Whether the host is short of memory, and the numbers of the last seconds that it is told by.

use std::collections::VecDeque;

use super::{History, State, mib, part};
use crate::config::Config;
use crate::sample::{PAGE, Sample};

/// Pressure is judged over this.
const WINDOW_MS: u64 = 10_000;
/// Room is kept for what so much time may unmerge.
const STORM_MS: u64 = 5_000;

/// Counters of the last seconds, oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct Windows {
    seen: VecDeque<Seen>,
    /// Most pages that were copied in [`STORM_MS`] so far.
    worst_cow: u64,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    at_ms: u64,
    memory_us: u64,
    cpu_us: u64,
    cow: u64,
}

impl Windows {
    pub(super) fn take(&mut self, sample: &Sample) {
        self.seen.push_back(Seen {
            at_ms: sample.at_ms,
            memory_us: sample.host.memory_some_us,
            cpu_us: sample.host.cpu_some_us,
            cow: sample.host.cow_ksm.unwrap_or(0),
        });
        while self.seen.len() > 2 && self.seen[1].at_ms + WINDOW_MS <= sample.at_ms {
            self.seen.pop_front();
        }
        self.worst_cow = self.worst_cow.max(self.cow_pages(STORM_MS).0);
    }

    /// Part of the window in which tasks waited for memory.
    fn memory_waiting(&self) -> f64 {
        self.waiting(|seen| seen.memory_us)
    }

    /// Part of the window in which tasks waited for a CPU.
    pub(super) fn cpu_waiting(&self) -> f64 {
        self.waiting(|seen| seen.cpu_us)
    }

    fn waiting(&self, of: impl Fn(&Seen) -> u64) -> f64 {
        let (Some(first), Some(last)) = (self.seen.front(), self.seen.back()) else {
            return 0.0;
        };
        let us = 1000 * (last.at_ms - first.at_ms);
        if us == 0 {
            return 0.0;
        }
        of(last).saturating_sub(of(first)) as f64 / us as f64
    }

    /// Merged pages that were copied in the last `ms`, and the time that is about.
    pub(super) fn cow_pages(&self, ms: u64) -> (u64, u64) {
        let Some(last) = self.seen.back() else {
            return (0, 0);
        };
        let first = self
            .seen
            .iter()
            .find(|seen| seen.at_ms + ms >= last.at_ms)
            .unwrap_or(last);
        (last.cow.saturating_sub(first.cow), last.at_ms - first.at_ms)
    }

    /// Bytes that must stay available, because merged pages may be taken apart by those who write to them: the
    /// worst seen, and never less than a twentieth of what is saved.
    pub(super) fn room_for_storm(&self, sample: &Sample) -> u64 {
        let saved = sample.ksm.saved_pages() * PAGE;
        (self.worst_cow * PAGE).max(saved / 20)
    }
}

/// What is to be said of the host.
#[derive(Debug)]
pub(super) struct Host {
    /// Why it is short of memory, if it is.
    pub(super) short: Option<String>,
}

/// Short of memory is below `available_low` or above `waiting`; it is over above `available_high` and below half of
/// `waiting`, so that it does not come and go.
pub(super) fn judge(
    config: &Config,
    history: &History,
    windows: &Windows,
    sample: &Sample,
) -> Host {
    let is_in = history.state == State::Pressure;
    let limits = &config.pressure;
    let total = sample.host.total_bytes;
    let available = sample.host.available_bytes;
    let low = part(
        total,
        if is_in {
            limits.available_high
        } else {
            limits.available_low
        },
    );
    let most = limits.waiting / 100.0 * if is_in { 0.5 } else { 1.0 };
    let waiting = windows.memory_waiting();
    let room = windows.room_for_storm(sample);
    let short = if available < low {
        let (available, low) = (mib(available), mib(low));
        Some(format!("{available} MiB available, below {low} MiB"))
    } else if available < room {
        let (available, room) = (mib(available), mib(room));
        Some(format!(
            "{available} MiB available, below {room} MiB that merged pages may need when they are written to"
        ))
    } else if waiting > most {
        Some(format!(
            "tasks waited for memory {:.1} % of the last seconds, above {:.1} %",
            100.0 * waiting,
            100.0 * most
        ))
    } else {
        None
    };
    Host { short }
}
