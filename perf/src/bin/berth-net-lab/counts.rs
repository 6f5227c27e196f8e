//! KVM's own counters of a guest (debugfs, `kvm/PID-FD/`): why a share is what it is. Counts are exact in the
//! lab, where time is not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

const KVM: &str = "/sys/kernel/debug/kvm";

/// The counters of one guest.
#[derive(Debug)]
pub(crate) struct Counters(PathBuf);

/// What they stood at.
pub(crate) type Counts = BTreeMap<String, i64>;

impl Counters {
    /// Of the guest that a thread of process `pid` has made.
    ///
    /// # Errors
    /// debugfs is not mounted, or there is no such guest.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        for entry in fs::read_dir(KVM).context(KVM)? {
            let entry = entry?;
            let name = entry.file_name();
            let thread = name.to_str().and_then(|name| name.split_once('-'));
            if let Some((thread, _)) = thread
                && Path::new(&format!("/proc/{pid}/task/{thread}")).exists()
            {
                return Ok(Self(entry.path()));
            }
        }
        anyhow::bail!("no guest of process {pid} in {KVM}")
    }

    /// All of them; files that hold no number are passed over.
    pub(crate) fn read(&self) -> Result<Counts> {
        let mut counts = Counts::new();
        for entry in fs::read_dir(&self.0).with_context(|| self.0.display().to_string())? {
            let entry = entry?;
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            if let Ok(count) = text.trim().parse() {
                counts.insert(entry.file_name().to_string_lossy().into_owned(), count);
            }
        }
        Ok(counts)
    }
}

/// `name +N` for every counter that has grown.
pub(crate) fn grown(before: &Counts, after: &Counts) -> String {
    let words: Vec<_> = after
        .iter()
        .map(|(name, count)| (name, count - before.get(name).unwrap_or(&0)))
        .filter(|(_, more)| *more > 0)
        .map(|(name, more)| format!("{name} +{more}"))
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_grown_is_named() {
        let counts = |values: [(&str, i64); 3]| {
            let named = values.map(|(name, count)| (name.to_owned(), count));
            Counts::from(named)
        };
        let before = counts([("exits", 10), ("halt_exits", 3), ("pages_4k", 9)]);
        let after = counts([("exits", 25), ("halt_exits", 3), ("pages_4k", 2)]);
        assert_eq!(grown(&before, &after), "exits +15");
    }
}
