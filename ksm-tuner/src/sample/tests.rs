//! Readers over a tree as a kernel has it.

use super::*;
use std::fs;
use std::path::Path;

use crate::testing::Folder;

fn put(root: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

const PROC: [(&str, &str); 9] = [
    (
        "proc/meminfo",
        "MemTotal:       24684096 kB\nMemFree: 5 kB\nMemAvailable:   23274024 kB\nSwapFree:  8 kB\n",
    ),
    (
        "proc/vmstat",
        "thp_split_page 358\nksm_swpin_copy 1\ncow_ksm 17\n",
    ),
    ("proc/stat", "cpu  1 2 3\ncpu0 1 1 1\ncpu1 1 1 1\nintr 5\n"),
    (
        "proc/pressure/memory",
        "some avg10=3.95 avg60=3.81 avg300=3.50 total=518812048\nfull avg10=0.18 avg60=1.11 avg300=1.15 total=129217489\n",
    ),
    (
        "proc/pressure/cpu",
        "some avg10=75.56 avg60=34.69 avg300=21.15 total=19690507778\n",
    ),
    (
        "proc/37/stat",
        "37 (ksmd) S 2 0 0 0 -1 2097216 0 0 0 0 12 30 0 0 25 5 1 0 28 0 0\n",
    ),
    ("proc/37/schedstat", "2431110 358276851 320\n"),
    ("proc/40/stat", "40 (ksmd) S 1 0 0 0 -1 0\n"),
    (
        "proc/99/ksm_stat",
        "ksm_rmap_items 100\nksm_zero_pages 3\nksm_merging_pages 60\nksm_process_profit -17\nksm_merge_any: no\n",
    ),
];

const KSM_OF_6_1: [(&str, &str); 10] = [
    ("sys/kernel/mm/ksm/run", "1\n"),
    ("sys/kernel/mm/ksm/pages_to_scan", "100\n"),
    ("sys/kernel/mm/ksm/sleep_millisecs", "20\n"),
    ("sys/kernel/mm/ksm/pages_shared", "11\n"),
    ("sys/kernel/mm/ksm/pages_sharing", "22\n"),
    ("sys/kernel/mm/ksm/pages_unshared", "33\n"),
    ("sys/kernel/mm/ksm/pages_volatile", "44\n"),
    ("sys/kernel/mm/ksm/full_scans", "5\n"),
    ("sys/kernel/mm/ksm/use_zero_pages", "0\n"),
    ("sys/kernel/mm/ksm/max_page_sharing", "256\n"),
];

const KSM_SINCE: [(&str, &str); 5] = [
    ("sys/kernel/mm/ksm/smart_scan", "1\n"),
    ("sys/kernel/mm/ksm/pages_scanned", "1000\n"),
    ("sys/kernel/mm/ksm/ksm_zero_pages", "8\n"),
    ("sys/kernel/mm/ksm/general_profit", "-64\n"),
    ("sys/kernel/mm/ksm/advisor_mode", "none [scan-time]\n"),
];

fn roots(folder: &Folder) -> Roots {
    Roots {
        proc: folder.path().join("proc"),
        sys: folder.path().join("sys"),
        cgroup: Some(folder.path().join("cgroup")),
    }
}

#[test]
fn a_host_is_read() {
    let folder = Folder::new();
    put(folder.path(), &PROC);
    put(folder.path(), &KSM_OF_6_1);
    put(folder.path(), &KSM_SINCE);
    let roots = roots(&folder);
    let scanner = scanner_pid(&roots);
    assert_eq!(scanner, Some(37), "a program of that name is not it");
    let sample = read(&roots, scanner, 5).unwrap();
    assert_eq!(sample.host.total_bytes, 24_684_096 << 10);
    assert_eq!(sample.host.available_bytes, 23_274_024 << 10);
    assert_eq!(sample.host.cores, 2);
    assert_eq!(sample.host.memory_some_us, 518_812_048);
    assert_eq!(sample.host.memory_full_avg10, 0.18);
    assert_eq!(sample.host.cow_ksm, Some(17));
    assert_eq!(sample.scanner_cpu_us, 2431);
    assert_eq!(
        sample.ksm.settings.advisor_mode.as_deref(),
        Some("scan-time")
    );
    assert_eq!(sample.ksm.general_profit, Some(-64));
    assert_eq!(sample.ksm.saved_pages(), 30);
}

#[test]
fn an_old_kernel_has_less_to_say() {
    let folder = Folder::new();
    put(folder.path(), &PROC);
    put(folder.path(), &KSM_OF_6_1);
    let sample = read(&roots(&folder), None, 0).unwrap();
    assert_eq!(sample.ksm.pages_scanned, None);
    assert_eq!(sample.ksm.settings.smart_scan, None);
    assert_eq!(sample.ksm.settings.max_page_sharing, Some(256));
    assert_eq!(sample.ksm.saved_pages(), 22);
}

#[test]
fn a_kernel_without_merging_is_named() {
    let folder = Folder::new();
    put(folder.path(), &PROC);
    let error = read(&roots(&folder), None, 0).unwrap_err().to_string();
    assert!(error.ends_with("kernel/mm/ksm/run"), "{error}");
    put(folder.path(), &KSM_OF_6_1);
    put(folder.path(), &[("sys/kernel/mm/ksm/run", "on\n")]);
    let error = read(&roots(&folder), None, 0).unwrap_err().to_string();
    assert!(
        error.ends_with("says \"on\", which is not a number"),
        "{error}"
    );
}

#[test]
fn cpu_is_found_in_ticks_where_there_is_nothing_better() {
    let folder = Folder::new();
    put(folder.path(), &PROC);
    fs::remove_file(folder.path().join("proc/37/schedstat")).unwrap();
    let used = process::cpu_us(&folder.path().join("proc"), 37).unwrap();
    assert_eq!(used, 420_000);
}

#[test]
fn a_process_is_read_and_one_that_has_gone_says_nothing() {
    let folder = Folder::new();
    put(folder.path(), &PROC);
    let (ksm, cgroup) = of_process(&roots(&folder), 99);
    assert_eq!(ksm.unwrap().profit_bytes, -17);
    assert_eq!(ksm.unwrap().merging_pages, 60);
    assert_eq!(cgroup, None);
    assert_eq!(of_process(&roots(&folder), 98), (None, None));
}

#[test]
fn only_a_cgroup_of_its_own_can_be_reclaimed_from() {
    let folder = Folder::new();
    put(
        folder.path(),
        &[
            ("proc/1/cgroup", "1:cpu:/\n0::/\n"),
            ("proc/2/cgroup", "0::/vms/a\n"),
            ("proc/3/cgroup", "0::/../x\n"),
            ("cgroup/memory.reclaim", ""),
            ("cgroup/vms/a/memory.reclaim", ""),
            ("cgroup/vms/a/memory.current", "4096\n"),
            ("cgroup/vms/a/memory.swap.current", "10\n"),
            ("cgroup/vms/a/memory.swap.max", "30\n"),
            ("cgroup/vms/a/memory.pressure", "some avg10=0.00 total=9\n"),
        ],
    );
    let of = |pid| of_process(&roots(&folder), pid).1;
    assert_eq!(of(1), None);
    assert_eq!(of(3), None);
    let group = of(2).unwrap();
    assert_eq!(group.swap_left_bytes, Some(20));
    assert_eq!(group.memory_some_us, 9);
}

#[test]
fn a_sample_can_be_recorded() {
    let sample = Sample {
        at_ms: 7,
        vms: BTreeMap::from([("a".to_owned(), Vm::default())]),
        ..Sample::default()
    };
    let line = serde_json::to_string(&sample).unwrap();
    assert_eq!(serde_json::from_str::<Sample>(&line).unwrap(), sample);
}
