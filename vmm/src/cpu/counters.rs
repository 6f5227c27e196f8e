//! Exits of one vCPU to user space, by reason.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU came out of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// Read of a port.
    IoIn,
    /// Write of a port.
    IoOut,
    /// Read of an address without memory.
    MmioRead,
    /// Write of an address without memory.
    MmioWrite,
    /// A kick of ours.
    Interrupted,
    /// The end of a level interrupt of our own IOAPIC.
    IoapicEoi,
    /// All else.
    Other,
    /// Not an exit of its own: a write of an address that a BAR can have.
    BarWrite,
    /// Not an exit of its own: an access that no device answered.
    Unclaimed,
}

const NAMES: [(Reason, &str); 9] = [
    (Reason::IoIn, "exits_io_in"),
    (Reason::IoOut, "exits_io_out"),
    (Reason::MmioRead, "exits_mmio_read"),
    (Reason::MmioWrite, "exits_mmio_write"),
    (Reason::Interrupted, "exits_interrupted"),
    (Reason::IoapicEoi, "exits_ioapic_eoi"),
    (Reason::Other, "exits_other"),
    (Reason::BarWrite, "exits_mmio_write_bar"),
    (Reason::Unclaimed, "accesses_unclaimed"),
];

/// Counters of one vCPU: its thread counts, anybody reads.
#[derive(Debug, Default)]
pub(super) struct ExitCounters([AtomicU64; NAMES.len()]);

impl ExitCounters {
    /// Counts one.
    pub(super) fn count(&self, reason: Reason) {
        // A count orders nothing: relaxed.
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// One of them.
    pub(super) fn get(&self, reason: Reason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }

    /// Names and values.
    pub(super) fn snapshot(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES
            .iter()
            .map(|(reason, name)| (*name, self.get(*reason)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_name_and_place() {
        let counters = ExitCounters::default();
        for (times, (reason, _)) in (1..).zip(NAMES) {
            for _ in 0..times {
                counters.count(reason);
            }
        }
        for (times, (name, value)) in (1..).zip(counters.snapshot()) {
            assert_eq!(value, times, "{name}");
        }
    }
}
