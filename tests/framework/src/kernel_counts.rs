//! What the host's kernel counts about a VM: KVM's statistics and tracepoints.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::process::Process;
use crate::sys;

/// One number of KVM's statistics of a VM, all vCPUs together: `mmio_exits`, `io_exits`, `exits`, …
///
/// # Errors
/// debugfs is not mounted, or the process has no VM.
pub fn kvm_stat(process: &Process, name: &str) -> Result<u64> {
    let path = kvm_directory(process)?.join(name);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.trim()
        .parse()
        .with_context(|| format!("{}: {text}", path.display()))
}

/// All of KVM's statistics of a VM that are numbers.
///
/// # Errors
/// As [`kvm_stat`].
pub fn kvm_stats(process: &Process) -> Result<BTreeMap<String, u64>> {
    let directory = kvm_directory(process)?;
    let mut stats = BTreeMap::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if let Ok(count) = text.trim().parse() {
            stats.insert(entry.file_name().to_string_lossy().into_owned(), count);
        }
    }
    Ok(stats)
}

/// debugfs directory of the one VM of a process. Its name has the thread that made the VM, which may be
/// gone; the vCPUs' own say which threads run them.
fn kvm_directory(process: &Process) -> Result<PathBuf> {
    let tids: Vec<_> = process
        .threads()?
        .into_iter()
        .map(|(tid, _)| tid.to_string())
        .collect();
    let root = PathBuf::from("/sys/kernel/debug/kvm");
    for entry in fs::read_dir(&root).with_context(|| root.display().to_string())? {
        let directory = entry?.path();
        let tid = fs::read_to_string(directory.join("vcpu0/pid")).unwrap_or_default();
        if tids.iter().any(|known| known == tid.trim()) {
            return Ok(directory);
        }
    }
    bail!("no VM of process {} in {}", process.pid(), root.display());
}

/// Counts hits of one tracepoint by some threads; exact, as nothing is buffered.
#[derive(Debug)]
pub struct TracepointCount(Vec<File>);

impl TracepointCount {
    /// Counts `group:name` in threads `tids` from now on, those hits that match `filter` if it is not
    /// empty, such as `reason == 6`.
    ///
    /// # Errors
    /// The kernel has no such tracepoint, or we may not.
    pub fn start(group: &str, name: &str, filter: &str, tids: &[i32]) -> Result<Self> {
        let path = format!("/sys/kernel/tracing/events/{group}/{name}/id");
        let id = fs::read_to_string(&path).with_context(|| path.clone())?;
        let id = id.trim().parse().with_context(|| path.clone())?;
        let mut counters = Vec::new();
        for &tid in tids {
            let counter = sys::count_tracepoint(id, tid)
                .with_context(|| format!("count {group}:{name} of thread {tid}"))?;
            if !filter.is_empty() {
                sys::filter_tracepoint(&counter, filter)
                    .with_context(|| format!("filter {group}:{name} by '{filter}'"))?;
            }
            counters.push(File::from(counter));
        }
        Ok(Self(counters))
    }

    /// Hits so far.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn read(&mut self) -> Result<u64> {
        let mut sum = 0;
        for counter in &mut self.0 {
            let mut value = [0u8; 8];
            counter.read_exact(&mut value)?;
            sum += u64::from_le_bytes(value);
        }
        Ok(sum)
    }
}
