//! Guest memory: as much as asked, on both sides of the PCI hole, and usable to the last page.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::process::Process;
use berth_tests_framework::wait::seconds;

const FOUR_GIB: u64 = 4 << 30;

/// Ranges of System RAM that the guest was told of, first and last byte.
pub(crate) fn ranges(vm: &mut Console) -> Result<Vec<(u64, u64)>> {
    let iomem = vm.sh("grep '^[0-9a-f].*: System RAM' /proc/iomem")?;
    iomem
        .lines()
        .map(|line| {
            let range = line.split_whitespace().next().unwrap_or_default();
            let (first, last) = range.split_once('-').context("a range")?;
            Ok((
                u64::from_str_radix(first, 16)?,
                u64::from_str_radix(last, 16)?,
            ))
        })
        .collect()
}

/// The guest has `size_bytes`, less than 1 MiB of it kept back for legacy holes.
pub(crate) fn is_there(vm: &mut Console, size_bytes: u64) -> Result<()> {
    let ranges = ranges(vm)?;
    let sum: u64 = ranges.iter().map(|(first, last)| last - first + 1).sum();
    ensure!(
        sum <= size_bytes && sum + (1 << 20) > size_bytes,
        "System RAM of {sum} bytes instead of {size_bytes}: {ranges:x?}"
    );
    Ok(())
}

/// Memory ends below 4 GiB, goes on there, and all of it holds what is written.
pub(crate) fn on_both_sides_of_the_hole(vm: &mut Console) -> Result<()> {
    let ranges = ranges(vm)?;
    ensure!(
        ranges.iter().any(|(_, last)| *last < FOUR_GIB)
            && ranges.iter().any(|(first, _)| *first >= FOUR_GIB),
        "{ranges:x?}"
    );
    // More than is above 4 GiB, which Linux takes first: files of one random chunk, compared with it.
    let script = "set -e; mkdir /tmp/all; mount -t tmpfs -o size=95% all /tmp/all
        dd if=/dev/urandom of=/tmp/all/chunk bs=1M count=64 2>/dev/null
        for i in $(seq 40); do cp /tmp/all/chunk /tmp/all/$i; done
        for i in 1 20 39 40; do cmp /tmp/all/chunk /tmp/all/$i; done
        umount /tmp/all";
    vm.sh_within(script, seconds(180)).map(drop)
}

/// One mapping of a process, as smaps has it.
pub(crate) struct Mapping {
    kib: BTreeMap<String, u64>,
    flags: String,
}

impl Mapping {
    /// A size of smaps in bytes: `Rss`, `AnonHugePages` …
    pub(crate) fn bytes(&self, name: &str) -> Result<u64> {
        let kib = self.kib.get(name).with_context(|| format!("no {name}"))?;
        Ok(kib * 1024)
    }

    /// Whether VmFlags has it: `sh` shared, `mg` mergeable, `hg` huge pages advised, `nh` refused.
    pub(crate) fn has(&self, flag: &str) -> bool {
        self.flags.split_whitespace().any(|has| has == flag)
    }

    /// VmFlags.
    pub(crate) fn flags(&self) -> &str {
        &self.flags
    }
}

/// The mapping of a process that has this size and is kept out of core dumps, as guest memory is.
pub(crate) fn mapping(process: &Process, size_bytes: u64) -> Result<Mapping> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", process.pid()))?;
    let mut kib = BTreeMap::new();
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let mapping = Mapping {
                kib: std::mem::take(&mut kib),
                flags: flags.trim().to_owned(),
            };
            if mapping.bytes("Size")? == size_bytes && mapping.has("dd") {
                return Ok(mapping);
            }
        }
        let mut words = line.split_whitespace();
        if let (Some(name), Some(Ok(value))) = (
            words.next().and_then(|name| name.strip_suffix(':')),
            words.next().map(str::parse),
        ) {
            kib.insert(name.to_owned(), value);
        }
    }
    anyhow::bail!("{} has no mapping of {size_bytes} bytes", process.name())
}
