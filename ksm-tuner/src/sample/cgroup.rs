//! The cgroup of a VM.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{optional, text};
use super::host::pressure;

/// Memory of a cgroup of the unified hierarchy that holds one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cgroup {
    /// Its folder.
    pub path: PathBuf,
    /// Bytes in use.
    pub current_bytes: u64,
    /// Bytes of swap that it may still take; `None` for no limit.
    pub swap_left_bytes: Option<u64>,
    /// Time that some task of it waited for memory, in microseconds.
    pub memory_some_us: u64,
}

/// The cgroup of a process, if it can be reclaimed from: the memory controller is on and it is not the root.
pub(super) fn of_process(proc: &Path, root: &Path, pid: u32) -> Option<Cgroup> {
    let groups = text(&proc.join(pid.to_string()).join("cgroup")).ok()?;
    let name = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    if name.is_empty() || name.split('/').any(|part| part == "..") {
        return None;
    }
    let path = root.join(name);
    if !path.join("memory.reclaim").exists() {
        return None;
    }
    let swap = optional(&path.join("memory.swap.current")).unwrap_or(0);
    let pressure_text = text(&path.join("memory.pressure")).unwrap_or_default();
    Some(Cgroup {
        current_bytes: optional(&path.join("memory.current"))?,
        swap_left_bytes: optional(&path.join("memory.swap.max"))
            .map(|max| max.saturating_sub(swap)),
        memory_some_us: pressure(&pressure_text, "some", "total").unwrap_or(0.0) as u64,
        path,
    })
}
