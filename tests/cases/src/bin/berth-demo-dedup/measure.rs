//! What a guest takes of the host: its VMM and the daemon of its disk together, each page counted by its share.
//!
//! `Pss` divides a page by the number of places in which it is mapped: shared memory that VMM and daemon map counts once, and a merged
//! page counts for each guest by its part. Pages of zeros that merging took away count nothing. What the kernel
//! keeps to merge (64 bytes for each page it looks at) is added to the guest whose pages they are.

use std::fs;

use anyhow::{Context as _, Result};
use berth_tests_framework::process::Process;
use serde_json::{Value, json};

/// Of the kernel, for each page that is open to merging (`struct ksm_rmap_item`).
const BOOK_BYTES: u64 = 64;

/// Memory of one guest in KiB.
#[derive(Debug, Clone)]
pub(crate) struct Taken {
    pub(crate) name: String,
    vmm_kib: u64,
    disk_kib: u64,
    book_kib: u64,
    merged_pages: u64,
    zero_pages: u64,
}

impl Taken {
    pub(crate) fn of(name: &str, vmm: &Process, disk: &Process) -> Result<Self> {
        let ksm = fs::read_to_string(format!("/proc/{}/ksm_stat", vmm.pid()))?;
        let pages = |field| field_of(&ksm, field).with_context(|| format!("no {field} in {ksm:?}"));
        Ok(Self {
            name: name.to_owned(),
            vmm_kib: pss_kib(vmm.pid())?,
            disk_kib: pss_kib(disk.pid())?,
            book_kib: pages("ksm_rmap_items")? * BOOK_BYTES / 1024,
            merged_pages: pages("ksm_merging_pages")?,
            zero_pages: pages("ksm_zero_pages")?,
        })
    }

    /// All together.
    pub(crate) fn total_kib(&self) -> u64 {
        self.vmm_kib + self.disk_kib + self.book_kib
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "name": self.name,
            "vmm_kib": self.vmm_kib,
            "disk_daemon_kib": self.disk_kib,
            "bookkeeping_kib": self.book_kib,
            "total_kib": self.total_kib(),
            "merged_pages": self.merged_pages,
            "zero_pages": self.zero_pages,
        })
    }
}

fn pss_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    field_of(&text, "Pss:").with_context(|| format!("no Pss in {path}"))
}

/// The number behind a name at the start of a line.
fn field_of(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next()? == name).then(|| words.next()?.parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let rollup = "55-7f ---p 0 00:00 0 [rollup]\nRss:  900 kB\nPss_Dirty: 7 kB\nPss:  450 kB\n";
        assert_eq!(field_of(rollup, "Pss:"), Some(450));
        let stat = "ksm_rmap_items 12\nksm_zero_pages 3\nksm_merging_pages 4\n";
        assert_eq!(field_of(stat, "ksm_zero_pages"), Some(3));
        assert_eq!(field_of(stat, "ksm"), None);
    }
}
