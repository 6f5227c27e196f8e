//! What the tuner knows of the host at one moment, and the readers that find it out.
//!
//! ```text
//!   Roots { proc, sys } ─▶ read: ksm (/sys/kernel/mm/ksm) ─┐
//!                          host (meminfo, vmstat, PSI)     ├─▶ Sample ─▶ policy
//!                          process (ksm_stat, schedstat)   │
//!                          cgroup (memory of one VM)      ─┘
//! ```
//!
//! Files that a kernel does not have are `None`, found by looking and not by version: 6.1 has neither
//! `pages_scanned` nor `/proc/PID/ksm_stat`. The roots are parameters, so tests read recorded trees.
//!
//! Linux: admin-guide/mm/ksm.rst, accounting/psi.rst, filesystems/proc.rst, admin-guide/cgroup-v2.rst.

mod cgroup;
mod files;
mod host;
mod ksm;
mod process;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use cgroup::Cgroup;
pub use files::Error;
pub use host::Host;
pub use ksm::{Ksm, Settings};
pub use process::ProcessKsm;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Everything that a decision rests on. Counters count up from the start of the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// Milliseconds since some fixed moment; never goes back.
    pub at_ms: u64,
    /// Memory and pressure of the host.
    pub host: Host,
    /// The kernel's merging.
    pub ksm: Ksm,
    /// CPU that the kernel's scanner has used, in microseconds.
    pub scanner_cpu_us: u64,
    /// VMs by name.
    pub vms: BTreeMap<String, Vm>,
}

/// One VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    /// Process id of its VMM.
    pub pid: u32,
    /// Whether its vCPUs run.
    pub running: bool,
    /// Its trust domain.
    pub domain: Option<String>,
    /// Guest RAM in bytes.
    pub size_bytes: u64,
    /// The part of it that may be merged.
    pub mergeable_bytes: u64,
    /// The part of that which the kernel was told to merge.
    pub advised_bytes: u64,
    /// What the kernel says of its merging.
    pub ksm: Option<ProcessKsm>,
    /// Its balloon, if it has one.
    pub balloon: Option<Balloon>,
    /// Its cgroup, if it has one of its own.
    pub cgroup: Option<Cgroup>,
    /// What was found by comparing pages, where that was asked for: runs of mergeable memory.
    pub compared: Option<Vec<Run>>,
}

/// A run of guest memory of which some pages were compared with those of the domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Guest physical start.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Pages that were hashed.
    pub sampled: u32,
    /// Those of which the domain has another copy.
    pub equal: u32,
}

/// A balloon, and what the guest's driver tells of its memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Balloon {
    /// What it was told to take from the guest, in bytes.
    pub target_bytes: u64,
    /// What it holds.
    pub actual_bytes: u64,
    /// The guest's own figures; none without a driver.
    pub guest: Option<GuestMemory>,
}

/// Memory as the guest sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMemory {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that it could give to programs.
    pub available_bytes: u64,
    /// Times that it ended a process for want of memory.
    pub oom_kills: Option<u64>,
    /// Times that an allocation had to wait.
    pub alloc_stalls: Option<u64>,
    /// Pages that programs had to look through themselves.
    pub direct_scans: Option<u64>,
    /// Bytes it has brought in from its swap.
    pub swap_in: Option<u64>,
}

/// Where to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
    /// Where the unified cgroup hierarchy is, if anywhere.
    pub cgroup: Option<PathBuf>,
}

impl Roots {
    /// This host's.
    pub fn host() -> Self {
        let unified = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
            cgroup: unified
                .into_iter()
                .find(|path| path.join("cgroup.controllers").exists()),
        }
    }

    /// The folder of the kernel's merging.
    pub fn ksm(&self) -> PathBuf {
        self.sys.join("kernel/mm/ksm")
    }
}

/// Reads what concerns the whole host; the VMs are the caller's.
pub fn read(roots: &Roots, scanner_pid: Option<u32>, at_ms: u64) -> Result<Sample, Error> {
    Ok(Sample {
        at_ms,
        host: host::read(&roots.proc)?,
        ksm: ksm::read(&roots.ksm())?,
        scanner_cpu_us: match scanner_pid {
            Some(pid) => process::cpu_us(&roots.proc, pid)?,
            None => 0,
        },
        vms: BTreeMap::new(),
    })
}

/// The kernel's scanner, `ksmd`: its process id.
pub fn scanner_pid(roots: &Roots) -> Option<u32> {
    process::find_thread(&roots.proc, "ksmd")
}

/// CPU that the calling process has used, in microseconds.
pub fn cpu_of_self(roots: &Roots) -> Result<u64, Error> {
    process::cpu_us_of_threads(&roots.proc, std::process::id())
}

/// What the kernel says of a process: its merging, and its cgroup. A process that has gone says nothing.
pub fn of_process(roots: &Roots, pid: u32) -> (Option<ProcessKsm>, Option<Cgroup>) {
    let cgroup = roots
        .cgroup
        .as_ref()
        .and_then(|root| cgroup::of_process(&roots.proc, root, pid));
    (process::ksm(&roots.proc, pid), cgroup)
}

#[cfg(test)]
mod tests;
