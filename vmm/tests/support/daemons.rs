//! Looks for the processes of daemons that the program under test has started.

use std::fs::File;
use std::path::Path;

use super::has_kvm;

/// Whether the daemons were built beside the program under test; says so where they were not.
pub(crate) fn has_daemons() -> bool {
    let vmm = Path::new(env!("CARGO_BIN_EXE_berth-vmm"));
    let has = ["berth-blk", "berth-net"]
        .iter()
        .all(|name| vmm.with_file_name(name).is_file());
    if !has {
        eprintln!("skipped: the daemons are not built (cargo build -p berth-blk -p berth-net)");
    }
    has && has_kvm()
}

/// An image of 16 MiB; what names it in `--disk`.
pub(crate) fn image(path: &Path) -> String {
    File::create(path).unwrap().set_len(16 << 20).unwrap();
    format!("path={}", path.display())
}

/// Process ids of programs with that text in their arguments.
pub(crate) fn processes(text: &str) -> Vec<i32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
    .collect()
}

/// The daemon of an image; not the VMM, which has its path among its arguments too.
pub(crate) fn daemon(image: &Path) -> Option<i32> {
    let pids = processes(&format!("--blk-file={}", image.display()));
    pids.first().copied()
}

/// Ends a process as `kill -9` does.
pub(crate) fn kill(pid: i32) {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Whether a process has ended, be it that nobody has asked how.
pub(crate) fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses.
    stat.rsplit(") ")
        .next()
        .is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

/// The process that started it.
pub(crate) fn parent(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent.unwrap().trim().parse().unwrap()
}
