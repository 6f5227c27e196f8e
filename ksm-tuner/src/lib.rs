//! `berth-tuner`: one daemon a host that finds and frees the memory that guests have in common.
//!
//! ```text
//!   /sys/kernel/mm/ksm ─┐                                       ┌─▶ act: /sys/kernel/mm/ksm, memory.reclaim
//!   /proc, PSI, cgroup ─┼─▶ sample ──▶ policy ──▶ actions ──────┤
//!   API of each VM ─────┘   (numbers)  (pure)    (and why each) └─▶ vms: advice, balloon, samples of pages
//!                               ▲                                        │
//!                               └──────────── run: once a second, and when PSI says so
//! ```
//!
//! The policy is a function of configuration, history and one sample; it has no clock and does no I/O, so that recorded
//! hosts can be replayed through it. Every action carries the reason with the numbers behind it.
//!
//! Threads: `main` samples, decides and acts; `signals`, `psi` and `control` (answers `status`, `explain` and metrics from
//! the last published report) only send it events or read what it published.
//!
//! Invariants: what the tuner changes it first notes in a file under `/run`, and puts back when it ends, or when it
//! starts again after it was killed. It never unmerges the whole host (`run=2`).
#![forbid(unsafe_code)]

pub mod act;
pub mod args;
pub mod config;
pub mod policy;
pub mod report;
pub mod run;
pub mod sample;
#[cfg(test)]
mod testing;
pub mod vms;

/// An error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
