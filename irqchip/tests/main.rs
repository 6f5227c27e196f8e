//! Micro-guests: a few hundred bytes of guest code on the machine's own `/dev/kvm`, one file a
//! feature. They need neither a kernel image nor root beyond the right to open the device; where it
//! does not open, each says `skipped: no /dev/kvm` and passes. No test waits longer than
//! [`guest::DEADLINE`] for its guest.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

/// Cases that are the same whoever has the IOAPIC: each takes the mode, and runs in both.
macro_rules! both_modes {
    ($($case:ident),* $(,)?) => {
        mod kernel {
            $(#[test] fn $case() { super::$case(berth_irqchip::Mode::Kernel); })*
        }
        mod split {
            $(#[test] fn $case() { super::$case(berth_irqchip::Mode::Split); })*
        }
    };
}

mod doorbell;
mod edge_msi;
mod guest;
mod hold;
mod ipi;
mod level_line;
mod msi_mask;
mod pit;
mod save_restore;
mod save_timers;
mod save_vcpus;
mod split;
mod tsc_deadline;
