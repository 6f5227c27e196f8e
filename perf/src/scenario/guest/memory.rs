//! Private memory of processes without the guest's own: what would be free if they alone went away.
//!
//! The kernel's sums (smaps_rollup) have the guest's memory in them, which one process maps as its own and
//! another shares: so mappings are added up one by one, and those that are the guest's are left out. These are
//! the large ones: a memfd of 16 MiB or more, or anything of half the guest's size (no program maps as much for
//! itself; a thread's heap reserves 128 MiB at most).
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

const MEMFD_BYTES: u64 = 16 << 20;

/// Bytes of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Of nobody else.
    pub(crate) private: u64,
    /// Of the guest, whoever else maps it.
    pub(crate) guest: u64,
}

/// Of a process that runs a guest of so many bytes, or serves one.
pub(crate) fn of_process(pid: u32, guest_bytes: u64) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    of_smaps(&text, guest_bytes).with_context(|| path)
}

fn of_smaps(smaps: &str, guest_bytes: u64) -> Result<Memory> {
    let mut memory = Memory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            let size = size_of_range(first).with_context(|| format!("not a mapping: {line}"))?;
            let large_file = line.contains("/memfd:") && size >= MEMFD_BYTES;
            is_guest = large_file || size >= guest_bytes / 2;
            continue;
        }
        let sum = match (first, is_guest) {
            ("Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:", false) => {
                &mut memory.private
            }
            ("Rss:", true) => &mut memory.guest,
            _ => continue,
        };
        let kib = words.next().and_then(|word| word.parse::<u64>().ok());
        *sum += kib.with_context(|| format!("no number: {line}"))? << 10;
    }
    Ok(memory)
}

/// Of `START-END`, in hexadecimal.
fn size_of_range(range: &str) -> Option<u64> {
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    address(end)?.checked_sub(address(start)?)
}

/// A process first, and all that it has started, and these, and so on.
pub(crate) fn family(pid: u32) -> Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // One that has ended meanwhile is nobody's child.
        if let Ok(stat) = fs::read_to_string(format!("/proc/{child}/stat"))
            && let Some(parent) = parent_in(&stat)
        {
            parents.push((child, parent));
        }
    }
    Ok(descendants(pid, &parents))
}

/// Second field behind the name in brackets, which may have anything in it.
fn parent_in(stat: &str) -> Option<u32> {
    let rest = stat.rsplit(')').next()?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

fn descendants(pid: u32, parents: &[(u32, u32)]) -> Vec<u32> {
    let mut all = BTreeSet::from([pid]);
    loop {
        let before = all.len();
        let new: Vec<u32> = parents
            .iter()
            .filter(|(_, parent)| all.contains(parent))
            .map(|(child, _)| *child)
            .collect();
        all.extend(new);
        if all.len() == before {
            all.remove(&pid);
            return [pid].into_iter().chain(all).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_guests_memory_is_left_out_however_it_is_mapped() {
        let smaps = "\
55d000000000-55d000100000 r-xp 0000 fe:00 1234 /usr/bin/berth-vmm
Rss:                 900 kB
Private_Clean:         8 kB
Private_Dirty:         4 kB
Shared_Clean:        100 kB
7f0000000000-7f0010000000 rw-s 0000 00:01 77 /memfd:berth-guest-ram (deleted)
Rss:                2048 kB
Private_Dirty:      1024 kB
7f1000000000-7f1010000000 rw-p 0000 00:00 0
Rss:                4096 kB
Private_Dirty:      4096 kB
7f2000000000-7f2000004000 rw-s 0000 00:01 78 /memfd:inflight (deleted)
Private_Dirty:        16 kB
VmFlags: rd wr mr mw me sd
";
        let memory = of_smaps(smaps, 256 * MIB).unwrap();
        assert_eq!(memory.private, 28 << 10);
        assert_eq!(memory.guest, 6 * MIB);
        assert!(of_smaps("not a mapping\n", MIB).is_err());
    }

    #[test]
    fn children_of_children_are_family_and_neighbours_are_not() {
        let parents = [(5, 1), (7, 5), (3, 7), (8, 1), (9, 8)];
        assert_eq!(descendants(5, &parents), [5, 3, 7]);
        assert_eq!(descendants(9, &parents), [9]);
        assert_eq!(parent_in("7 (odd) S 3) S 5 7 7"), Some(5));
        assert!(
            family(std::process::id())
                .unwrap()
                .contains(&std::process::id())
        );
    }

    #[test]
    fn this_process_has_private_memory_and_no_guest() {
        let memory = of_process(std::process::id(), 1 << 46).unwrap();
        assert!(memory.private > 0 && memory.guest == 0);
    }
}
