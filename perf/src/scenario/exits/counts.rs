//! What is counted while a guest reads its disk: by the host's kernel outside, by the guest's inside.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail};
use berth_tests_framework::kernel_counts::{TracepointCount, kvm_stats};

use crate::scenario::guest::{COMMAND_LIMIT, Machine};

/// A signal that ends KVM_RUN shows the reason of the exit before, with an error: no exit of its own.
const TO_USER_SPACE: &str = "errno == 0";

/// Counted in one load, or in the difference of two.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counts {
    pub(super) requests: u64,
    /// Of the disk, as the guest's kernel counts them.
    pub(super) interrupts: u64,
    pub(super) user_exits: u64,
    pub(super) system_calls: u64,
    pub(super) switches: u64,
    /// KVM's own of the VM.
    pub(super) kvm: BTreeMap<String, u64>,
}

impl Counts {
    /// Runs `load` in the guest and counts meanwhile.
    pub(super) fn of(machine: &mut Machine, load: &str) -> Result<Counts> {
        let before = inside(machine)?;
        let threads = machine.threads()?;
        let vcpus = threads_that_run_vcpus(machine)?;
        let mut user_exits =
            TracepointCount::start("kvm", "kvm_userspace_exit", TO_USER_SPACE, &vcpus)?;
        let mut system_calls = TracepointCount::start("raw_syscalls", "sys_enter", "", &threads)?;
        let (switched, kvm) = (switches(&threads), kvm_stats(&machine.vmm)?);
        machine.console.sh_within(load, COMMAND_LIMIT)?;
        let mut counts = Counts {
            user_exits: user_exits.read()?,
            system_calls: system_calls.read()?,
            switches: switches(&threads).saturating_sub(switched),
            kvm: grown(&kvm, &kvm_stats(&machine.vmm)?),
            ..Counts::default()
        };
        let after = inside(machine)?;
        counts.requests = after.requests.saturating_sub(before.requests);
        counts.interrupts = after.interrupts.saturating_sub(before.interrupts);
        Ok(counts)
    }

    /// What is left of a longer load without a shorter one: without what each of them begins and ends with.
    pub(super) fn less(&self, shorter: &Counts) -> Result<Counts> {
        let requests = self.requests.saturating_sub(shorter.requests);
        if requests == 0 {
            bail!(
                "the guest made {} requests, and {} before that: none more",
                self.requests,
                shorter.requests
            );
        }
        Ok(Counts {
            requests,
            interrupts: self.interrupts.saturating_sub(shorter.interrupts),
            user_exits: self.user_exits.saturating_sub(shorter.user_exits),
            system_calls: self.system_calls.saturating_sub(shorter.system_calls),
            switches: self.switches.saturating_sub(shorter.switches),
            kvm: grown(&shorter.kvm, &self.kvm),
        })
    }

    /// A number of KVM's.
    pub(super) fn kvm(&self, name: &str) -> u64 {
        self.kvm.get(name).copied().unwrap_or(0)
    }
}

fn grown(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let more = |(name, count): (&String, &u64)| {
        let more = count.saturating_sub(before.get(name).copied().unwrap_or(0));
        (name.clone(), more)
    };
    after.iter().map(more).collect()
}

/// Threads of the VMM that have a vCPU, as KVM itself says.
fn threads_that_run_vcpus(machine: &Machine) -> Result<Vec<i32>> {
    let stats = kvm_vcpu_pids()?;
    let own: Vec<i32> = machine
        .vmm
        .threads()?
        .into_iter()
        .map(|(tid, _)| tid)
        .collect();
    let vcpus: Vec<i32> = stats.into_iter().filter(|tid| own.contains(tid)).collect();
    if vcpus.is_empty() {
        bail!("no thread of process {} runs a vCPU", machine.vmm.pid());
    }
    Ok(vcpus)
}

/// Of all VMs of the host: the files `kvm/PID-FD/vcpuN/pid` of debugfs.
fn kvm_vcpu_pids() -> Result<Vec<i32>> {
    let root = "/sys/kernel/debug/kvm";
    let mut pids = Vec::new();
    for vm in fs::read_dir(root).context(root)? {
        // A VM may end while we look.
        for file in fs::read_dir(vm?.path()).into_iter().flatten().flatten() {
            let text = fs::read_to_string(file.path().join("pid")).unwrap_or_default();
            pids.extend(text.trim().parse::<i32>().ok());
        }
    }
    Ok(pids)
}

/// Context switches of these threads so far, wanted ones and others; a thread that has ended has none.
fn switches(threads: &[i32]) -> u64 {
    let of = |tid: &i32| {
        let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
        switches_in(&status)
    };
    threads.iter().map(of).sum()
}

fn switches_in(status: &str) -> u64 {
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| name.ends_with("ctxt_switches"))
        .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
        .sum()
}

/// What the guest's kernel has counted of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inside {
    requests: u64,
    interrupts: u64,
}

fn inside(machine: &mut Machine) -> Result<Inside> {
    const LOOK: &str = "cat /sys/block/vda/stat; basename $(readlink -f /sys/block/vda/device); cat /proc/interrupts";
    let text = machine.console.sh_within(LOOK, COMMAND_LIMIT)?;
    inside_in(&text).with_context(|| format!("the guest's counts: {text}"))
}

/// Reads that were completed (first number of `stat`, Documentation/block/stat.rst), the name of the disk's virtio
/// device, and lines such as ` 24:  10  12  PCI-MSIX-0000:01:00.0  1-edge  virtio2-req.0`.
fn inside_in(text: &str) -> Option<Inside> {
    let mut lines = text.lines();
    let requests = lines.next()?.split_whitespace().next()?.parse().ok()?;
    let device = lines.next()?.trim();
    let mut interrupts = None;
    for line in lines {
        let mut words = line.split_whitespace();
        let name = words.clone().next_back()?;
        let is_its = name
            .strip_prefix(device)
            .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()));
        if !is_its || !words.next()?.ends_with(':') {
            continue;
        }
        let counts = words.map_while(|word| word.parse::<u64>().ok());
        interrupts = Some(interrupts.unwrap_or(0) + counts.sum::<u64>());
    }
    Some(Inside {
        requests,
        interrupts: interrupts?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_counts_are_those_of_its_disk() {
        let text = "\
    1234        0     9872      10        0        0        0        0        0       20       10
virtio1
            CPU0       CPU1
  4:          3          0  IO-APIC   4-edge      ttyS0
 24:          0          0  PCI-MSIX-0000:01:00.0   0-edge      virtio1-config
 25:         10         12  PCI-MSIX-0000:01:00.0   1-edge      virtio1-req.0
 26:         99          0  PCI-MSIX-0000:02:00.0   1-edge      virtio12-req.0
LOC:        500        400   Local timer interrupts
";
        assert_eq!(
            inside_in(text),
            Some(Inside {
                requests: 1234,
                interrupts: 22
            })
        );
        assert_eq!(inside_in("1\nvirtio7\n"), None);
        assert_eq!(inside_in(""), None);
    }

    #[test]
    fn a_longer_load_less_a_shorter_one_is_the_steady_part() {
        let of = |requests, user_exits, exits| Counts {
            requests,
            user_exits,
            kvm: BTreeMap::from([("exits".to_owned(), exits)]),
            ..Counts::default()
        };
        let steady = of(2000, 60, 9000).less(&of(1000, 60, 5000)).unwrap();
        assert_eq!((steady.requests, steady.user_exits), (1000, 0));
        assert_eq!(steady.kvm("exits"), 4000);
        assert!(of(1000, 0, 0).less(&of(1000, 0, 0)).is_err());
    }

    #[test]
    fn switches_of_both_kinds_count() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t3\n";
        assert_eq!(switches_in(status), 10);
    }
}
