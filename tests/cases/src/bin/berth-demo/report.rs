//! The demonstration's outcome as a table and as JSON.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result};
use berth_tests_framework::process::Process;
use serde_json::{Value, json};

use berth_tests_cases::counters::DataPath;

use crate::measure::Notifications;

/// Memory of one process in KiB.
#[derive(Debug)]
pub(crate) struct ProcessMemory {
    name: String,
    pid: u32,
    /// Private to it, guest RAM left out.
    private_kib: u64,
    /// Guest RAM that it has mapped and touched.
    guest_kib: u64,
}

impl ProcessMemory {
    /// Reads /proc/PID/smaps of a running process.
    pub(crate) fn of(process: &Process) -> Result<Self> {
        let path = format!("/proc/{}/smaps", process.pid());
        let smaps = fs::read_to_string(&path).with_context(|| path.clone())?;
        let (private_kib, guest_kib) = private_and_guest(&smaps);
        let (name, pid) = (process.name().to_owned(), process.pid());
        Ok(Self {
            name,
            pid,
            private_kib,
            guest_kib,
        })
    }
}

/// Sums a smaps file: `Private_*` of all mappings but the guest's memfd, and that one's `Rss`.
fn private_and_guest(smaps: &str) -> (u64, u64) {
    let (mut private, mut guest, mut in_guest) = (0, 0, false);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            // A mapping's first line: range, flags, offset, device, inode, name.
            in_guest = line.contains("/memfd:");
            continue;
        }
        let kib = line
            .split_whitespace()
            .nth(1)
            .and_then(|text| text.parse::<u64>().ok());
        match (in_guest, first) {
            (false, _) if first.starts_with("Private_") => private += kib.unwrap_or(0),
            (true, "Rss:") => guest += kib.unwrap_or(0),
            _ => {}
        }
    }
    (private, guest)
}

/// All that the demonstration found.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) host: String,
    /// Kernel release, distribution, CPUs.
    pub(crate) guest: Vec<String>,
    pub(crate) boot_seconds: f64,
    pub(crate) total_seconds: f64,
    pub(crate) memory: Vec<ProcessMemory>,
    pub(crate) notifications: Vec<Notifications>,
    pub(crate) data_path: DataPath,
    /// MD5 of the file that the guest wrote and the image holds.
    pub(crate) proof: String,
    /// vm.counters at the end.
    pub(crate) counters: Value,
}

impl Outcome {
    /// For a machine.
    pub(crate) fn json(&self) -> Value {
        let processes: Vec<_> = self
            .memory
            .iter()
            .map(|process| {
                json!({ "name": process.name, "pid": process.pid,
                        "private_kib": process.private_kib, "guest_ram_kib": process.guest_kib })
            })
            .collect();
        let notifications: Vec<_> = self
            .notifications
            .iter()
            .map(|from| {
                json!({ "daemon": from.daemon, "requests": from.requests,
                        "doorbells_ioeventfd": from.doorbells, "interrupts_irqfd": from.interrupts })
            })
            .collect();
        let path = &self.data_path;
        json!({
            "host": self.host,
            "guest": { "kernel": self.guest.first(), "system": self.guest.get(1),
                       "vcpus": self.guest.get(2) },
            "boot_seconds": self.boot_seconds,
            "total_seconds": self.total_seconds,
            "processes": processes,
            "notifications": notifications,
            "data_path": { "requests": path.requests, "doorbells_ioeventfd": path.doorbells,
                           "interrupts_irqfd": path.interrupts, "port_exits": path.port_exits,
                           "mmio_exits": path.mmio_exits },
            "file_system_clean": true,
            "file_md5": self.proof,
            "vm_counters": self.counters,
        })
    }

    /// For a person.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail.
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<44} {value}");
        };
        let guest = |at: usize| self.guest.get(at).map_or("?", String::as_str);
        row("host", self.host.clone());
        row(
            "guest",
            format!("{}, Linux {}, {} vCPUs", guest(1), guest(0), guest(2)),
        );
        row(
            "boot, from start to command agent",
            format!("{:.1} s", self.boot_seconds),
        );
        for process in &self.memory {
            let label = format!("{} (pid {}), private memory", process.name, process.pid);
            let guest = format!("guest RAM mapped: {} KiB", process.guest_kib);
            row(&label, format!("{} KiB ({guest})", process.private_kib));
        }
        for from in &self.notifications {
            let label = format!("{}, requests or packets", from.daemon);
            row(&label, from.requests.to_string());
            row("  doorbells through ioeventfd", from.doorbells.to_string());
            row("  interrupts through irqfd", from.interrupts.to_string());
        }
        let path = &self.data_path;
        row(
            "data path watched for",
            format!("{} reads of 4 KiB", path.requests),
        );
        row("  doorbells through ioeventfd", path.doorbells.to_string());
        row("  interrupts through irqfd", path.interrupts.to_string());
        row(
            "  I/O exits to user space (ports, MMIO)",
            format!("{}, {}", path.port_exits, path.mmio_exits),
        );
        row(
            "page host to guest, guest to host",
            "fetched through the tap".to_owned(),
        );
        row(
            "file system of disk.img",
            format!("clean; holds the file, MD5 {}", self.proof),
        );
        row(
            "whole demonstration",
            format!("{:.1} s", self.total_seconds),
        );
        format!("\n{text}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_kept_apart() {
        let smaps = "5500-5600 rw-p 0 00:00 0 \nRss: 8 kB\nPrivate_Dirty: 8 kB\nVmFlags: rd\n\
                     7f00-7f80 rw-s 0 00:01 9 /memfd:guest (deleted)\nRss: 64 kB\nPrivate_Dirty: 60 kB\n\
                     7f80-7f90 rw-p 0 00:00 0 [stack]\nRss: 9 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 3 kB\n";
        assert_eq!(private_and_guest(smaps), (12, 64));
    }
}
