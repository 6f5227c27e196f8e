//! `berth-perf` measures Berth and its peers on one host, side by side in one run, and shows it.
//!
//! ```text
//!  args ─▶ choose ─▶ run ─▶ for each scenario (a thread of its own)
//!                     │        host::Noise, prepare, then engine: cells × rounds × subjects, interleaved
//!                     │           └ scenario/NAME: measure one subject once            ─▶ Sample
//!                     │        engine, stats, verdict: medians, ratios, goals           ─▶ CellResult
//!                     ▼
//!                  results (JSON in Cloud Hypervisor's shape, and ours) ─▶ report (tables, page) · compare
//!
//!  janitor: a process that removes what must not outlive us       interrupt: Ctrl-C, and keeping what there is
//! ```
//!
//! To add a scenario: scenario/mod.rs. What scenarios share: [`context`] (what was asked for, our programs, peers,
//! places), [`daemon`], [`client`], [`counts`], [`histogram`], [`awake`], [`proc`], [`sys`]. One thing runs at a
//! time. README.md says how to read what comes out.

pub mod args;
pub mod awake;
pub mod choose;
pub mod client;
pub mod clock;
pub mod compare;
pub mod context;
pub mod counts;
pub mod daemon;
pub mod engine;
pub mod histogram;
pub mod host;
pub mod interrupt;
pub mod janitor;
pub mod lab;
pub mod list;
pub mod peers;
pub mod proc;
pub mod progress;
pub mod report;
pub mod results;
pub mod run;
pub mod scenario;
pub mod stats;
pub mod sys;
pub mod verdict;
