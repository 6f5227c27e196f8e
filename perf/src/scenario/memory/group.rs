//! A control group with less memory than the guests in it believe to have.
//!
//! The limit is that of the memory controller, in either version of control groups; how long its tasks wait for memory is
//! told by the unified hierarchy, which may be mounted beside the other.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Its folders are removed with this, and by the janitor if we are killed.
#[derive(Debug)]
pub(super) struct Group {
    /// Of the controller.
    limited: PathBuf,
    /// Of the unified hierarchy, where it is another.
    unified: Option<PathBuf>,
    is_unified: bool,
}

const UNIFIED: &str = "/sys/fs/cgroup";
const BESIDE: &str = "/sys/fs/cgroup/unified";
const OLD: &str = "/sys/fs/cgroup/memory";

impl Group {
    /// Where it is to be; nothing is made.
    pub(super) fn find() -> Result<Self> {
        let name = format!("berth-perf-{}", std::process::id());
        let controllers = fs::read_to_string(Path::new(UNIFIED).join("cgroup.controllers"));
        let is_unified = controllers.is_ok_and(|names| names.contains("memory"));
        if is_unified {
            let limited = Path::new(UNIFIED).join(name);
            return Ok(Self {
                limited,
                unified: None,
                is_unified,
            });
        }
        let beside = Path::new(BESIDE);
        let has_unified = beside.join("cgroup.procs").exists();
        Ok(Self {
            limited: Path::new(OLD).join(own_place()?).join(&name),
            unified: has_unified.then(|| beside.join(&name)),
            is_unified,
        })
    }

    /// A group with so many bytes.
    pub(super) fn new(bytes: u64) -> Result<Self> {
        let group = Self::find()?;
        if group.is_unified {
            // It may be on already, or the root may not let us; then the limit says so.
            let _ = fs::write(Path::new(UNIFIED).join("cgroup.subtree_control"), "+memory");
        }
        for folder in group.folders() {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make the control group {}", folder.display()))?;
        }
        let limit = group.limited.join(match group.is_unified {
            true => "memory.max",
            false => "memory.limit_in_bytes",
        });
        fs::write(&limit, bytes.to_string()).with_context(|| limit.display().to_string())?;
        Ok(group)
    }

    /// What a process has to be put into.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        let both = std::iter::once(&self.limited).chain(&self.unified);
        both.cloned().collect()
    }

    /// Percent of the last ten seconds in which a task of it waited for memory.
    pub(super) fn waiting(&self) -> Result<f64> {
        let folder = self.unified.as_ref().unwrap_or(&self.limited);
        let path = folder.join("memory.pressure");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        avg10(&text).with_context(|| format!("{}: {text:?}", path.display()))
    }

    /// Processes that were killed because memory was not enough.
    pub(super) fn killed(&self) -> Result<u64> {
        let path = self.limited.join(match self.is_unified {
            true => "memory.events",
            false => "memory.oom_control",
        });
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count
            .and_then(|count| count.trim().parse().ok())
            .with_context(|| format!("{}: no oom_kill", path.display()))
    }
}

/// Our own group in the old hierarchy, below which others may be made.
fn own_place() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let own = text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        parts.next()?.split(',').find(|name| *name == "memory")?;
        parts.next()
    });
    let own = own.context("no memory controller: control groups are not mounted, or have none")?;
    Ok(PathBuf::from(own.trim_start_matches('/')))
}

/// Of the line `some avg10=0.00 avg60=…`.
fn avg10(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let mut words = some.split_whitespace();
    words.find_map(|word| word.strip_prefix("avg10=")?.parse().ok())
}

impl Drop for Group {
    fn drop(&mut self) {
        for folder in self.folders() {
            // The last process may take a moment to go.
            for _ in 0..100 {
                if fs::remove_dir(&folder).is_ok() || !folder.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read() {
        let text = "some avg10=1.25 avg60=0.10 avg300=0.00 total=5\nfull avg10=0.50 avg60=0 avg300=0 total=1\n";
        assert_eq!(avg10(text), Some(1.25));
        assert_eq!(avg10(""), None);
    }
}
