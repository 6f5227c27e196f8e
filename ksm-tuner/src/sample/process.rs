//! One process: what the kernel's merging has done for it, and the CPU it has used.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::{Error, named, text};

/// `/proc/PID/ksm_stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessKsm {
    /// Pages that the kernel keeps book on.
    pub rmap_items: u64,
    /// Pages that are merged.
    pub merging_pages: u64,
    /// Pages of zeros that are the zero page.
    pub zero_pages: u64,
    /// Bytes saved less what the bookkeeping takes.
    pub profit_bytes: i64,
}

/// Merging of a process; `None` where the kernel does not say or the process has gone.
pub(super) fn ksm(proc: &Path, pid: u32) -> Option<ProcessKsm> {
    let text = text(&proc.join(pid.to_string()).join("ksm_stat")).ok()?;
    let profit = text
        .lines()
        .find_map(|line| line.strip_prefix("ksm_process_profit"))
        .and_then(|rest| rest.trim().parse().ok());
    Some(ProcessKsm {
        rmap_items: named(&text, "ksm_rmap_items")?,
        merging_pages: named(&text, "ksm_merging_pages")?,
        zero_pages: named(&text, "ksm_zero_pages").unwrap_or(0),
        profit_bytes: profit.unwrap_or(0),
    })
}

/// CPU that a process has used, in microseconds: `schedstat`, which is exact, or else the ticks of `stat`.
pub(super) fn cpu_us(proc: &Path, pid: u32) -> Result<u64, Error> {
    let folder = proc.join(pid.to_string());
    if let Some(ns) = text(&folder.join("schedstat"))
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
    {
        return Ok(ns / 1000);
    }
    ticks_us(&folder.join("stat"))
}

fn ticks_us(path: &Path) -> Result<u64, Error> {
    let stat = text(path)?;
    // The name in parentheses may have blanks. After it: state is field 3, utime 14, stime 15, at 100 Hz.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    match (ticks(11), ticks(12)) {
        (Some(user), Some(system)) => Ok((user + system) * 10_000),
        _ => Err(Error::Number {
            path: path.to_owned(),
            text: stat,
        }),
    }
}

/// The same of a process with several threads, whose `schedstat` is the first one's alone.
pub(super) fn cpu_us_of_threads(proc: &Path, pid: u32) -> Result<u64, Error> {
    ticks_us(&proc.join(pid.to_string()).join("stat"))
}

/// The kernel's thread of that name: its parent is kthreadd (2), so that no program can pass for it.
pub(super) fn find_thread(proc: &Path, name: &str) -> Option<u32> {
    std::fs::read_dir(proc).ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = text(&entry.path().join("stat")).ok()?;
        let (head, rest) = stat.rsplit_once(')')?;
        let (_, found) = head.split_once('(')?;
        let parent = rest.split_whitespace().nth(1)?;
        (found == name && parent == "2").then_some(pid)
    })
}
