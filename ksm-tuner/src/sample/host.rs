//! Memory and pressure of the host.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::{Error, named, text};

/// Memory and pressure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Host {
    /// Memory, in bytes.
    pub total_bytes: u64,
    /// What programs could get without swapping.
    pub available_bytes: u64,
    /// Swap that is free.
    pub swap_free_bytes: u64,
    /// CPUs.
    pub cores: u32,
    /// Time that some task waited for memory, in microseconds.
    pub memory_some_us: u64,
    /// The kernel's average of that over ten seconds, in percent; to be shown.
    pub memory_some_avg10: f64,
    /// The same where all tasks waited.
    pub memory_full_avg10: f64,
    /// Time that some task waited for a CPU, in microseconds.
    pub cpu_some_us: u64,
    /// Merged pages that were written to and copied, where the kernel counts them.
    pub cow_ksm: Option<u64>,
    /// Huge pages that were taken apart.
    pub thp_split: Option<u64>,
}

/// Reads `/proc/meminfo`, `/proc/vmstat`, `/proc/stat` and `/proc/pressure`.
pub(super) fn read(proc: &Path) -> Result<Host, Error> {
    let meminfo = text(&proc.join("meminfo"))?;
    let kib = |name| named(&meminfo, name).unwrap_or(0) << 10;
    let vmstat = text(&proc.join("vmstat")).unwrap_or_default();
    // A kernel without PSI, or with `psi=0`, has no pressure to tell of.
    let memory = text(&proc.join("pressure/memory")).unwrap_or_default();
    let cpu = text(&proc.join("pressure/cpu")).unwrap_or_default();
    let cores = text(&proc.join("stat"))?
        .lines()
        .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
        .count();
    Ok(Host {
        total_bytes: kib("MemTotal"),
        available_bytes: kib("MemAvailable"),
        swap_free_bytes: kib("SwapFree"),
        cores: u32::try_from(cores).unwrap_or(u32::MAX).max(1),
        memory_some_us: pressure(&memory, "some", "total").unwrap_or(0.0) as u64,
        memory_some_avg10: pressure(&memory, "some", "avg10").unwrap_or(0.0),
        memory_full_avg10: pressure(&memory, "full", "avg10").unwrap_or(0.0),
        cpu_some_us: pressure(&cpu, "some", "total").unwrap_or(0.0) as u64,
        cow_ksm: named(&vmstat, "cow_ksm"),
        thp_split: named(&vmstat, "thp_split_page"),
    })
}

/// A field of a line of a pressure file: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
pub(super) fn pressure(text: &str, line: &str, field: &str) -> Option<f64> {
    let line = text.lines().find_map(|found| found.strip_prefix(line))?;
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(field)?.strip_prefix('=')?.parse().ok())
}
