//! The kernel's merging: what it is told, what it has done, and what it took.
//!
//! KSM is the host's. A lock, which the tests take too, keeps other users of this host's KSM out; what was set before is
//! put back when this is dropped, and by the janitor if we are killed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::guests::on_cpu;
use crate::interrupt;
use crate::janitor::Janitor;

const FOLDER: &str = "/sys/kernel/mm/ksm";
/// As the tests have it.
const LOCK: &str = "berth-tests-ksm.lock";
/// How long others may have memory open to merging before we give up.
const PATIENCE: Duration = Duration::from_secs(90);
/// What is changed, and the kernel's own value; the scanner comes first and last.
const DEFAULTS: [(&str, &str); 6] = [
    ("run", "0"),
    ("advisor_mode", "none"),
    ("smart_scan", "1"),
    ("use_zero_pages", "0"),
    ("sleep_millisecs", "20"),
    ("pages_to_scan", "100"),
];

/// The host's KSM, ours alone.
#[derive(Debug)]
pub(super) struct Ksm {
    before: Vec<(&'static str, String)>,
    ksmd: PathBuf,
    _lock: File,
}

/// Where it stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counters {
    /// Pages saved.
    pub(super) saved: u64,
    /// Times that all was scanned.
    pub(super) full_scans: u64,
    /// CPU time of the scanner.
    pub(super) cpu: Duration,
    /// Merged pages that were copied because somebody wrote to them.
    pub(super) cow: u64,
}

impl Ksm {
    /// Takes it once nobody else has it.
    pub(super) fn take(janitor: &mut Janitor) -> Result<Self> {
        let path = std::env::temp_dir().join(LOCK);
        let lock = File::create(&path).with_context(|| path.display().to_string())?;
        while lock.try_lock().is_err() {
            interrupt::sleep(Duration::from_millis(200))?;
        }
        let there = || DEFAULTS.iter().filter(|(name, _)| file(name).exists());
        // Put back last first: the scanner stops, the advisor lets go of what it locks, and may have it again at the end.
        for name in ["advisor_mode", "pages_to_scan", "sleep_millisecs"]
            .into_iter()
            .chain(["use_zero_pages", "smart_scan", "advisor_mode", "run"])
        {
            if file(name).exists() {
                janitor.setting(&file(name))?;
            }
        }
        let before = there().map(|(name, _)| Ok((*name, setting(name)?)));
        let before: Vec<_> = before.collect::<Result<_>>()?;
        // Said now rather than in the middle: whether we may.
        if let Some((name, value)) = before.first() {
            set(name, value)?;
        }
        Ok(Self {
            before,
            ksmd: ksmd().context("no kernel thread ksmd: this kernel has no KSM")?,
            _lock: lock,
        })
    }

    /// As the kernel comes, with everything taken apart.
    pub(super) fn reset(&self) -> Result<()> {
        set("run", "2")?;
        for (name, value) in DEFAULTS {
            if file(name).exists() {
                set(name, value)?;
            }
        }
        Ok(())
    }

    /// Where it stands.
    pub(super) fn counters(&self) -> Result<Counters> {
        let cow = fs::read_to_string("/proc/vmstat")?;
        let cow = cow.lines().find_map(|line| line.strip_prefix("cow_ksm "));
        Ok(Counters {
            saved: number("pages_sharing")? + number("ksm_zero_pages").unwrap_or(0),
            full_scans: number("full_scans")?,
            cpu: on_cpu(&self.ksmd).context("CPU time of ksmd")?,
            cow: cow.and_then(|count| count.parse().ok()).unwrap_or(0),
        })
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        // Nobody is left whose pages could be shared; what cannot be put back the janitor says.
        let _ = self.reset();
        for (name, value) in self.before.iter().rev() {
            let _ = set(name, value);
        }
    }
}

/// Another process, not one of our holders, whose memory is open to merging: it would be scanned and merged along.
pub(super) fn other() -> Result<Option<String>> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let path = entry.path();
        // Not a process, or one that has gone; an older kernel does not say.
        let Ok(text) = fs::read_to_string(path.join("ksm_stat")) else {
            continue;
        };
        if text.lines().any(|line| line == "ksm_mergeable: yes") {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            let (pid, name) = (entry.file_name(), name.trim().to_owned());
            return Ok(Some(format!(
                "process {} ({name}) has memory open to merging",
                pid.display()
            )));
        }
    }
    Ok(None)
}

/// Waits until there is no such process, for a while.
pub(super) fn wait_for_others() -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while let Some(other) = other()? {
        if Instant::now() >= end {
            bail!("{other}, which would be measured along: end it first");
        }
        interrupt::sleep(Duration::from_millis(500))?;
    }
    Ok(())
}

fn file(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// Sets one of its files.
pub(super) fn set(name: &str, value: &str) -> Result<()> {
    fs::write(file(name), value).with_context(|| format!("cannot set KSM's {name} to {value}"))
}

fn setting(name: &str) -> Result<String> {
    let text = fs::read_to_string(file(name)).with_context(|| file(name).display().to_string())?;
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    Ok(chosen.map_or(text.trim(), |(word, _)| word).to_owned())
}

fn number(name: &str) -> Result<u64> {
    let text = setting(name)?;
    match text.parse() {
        Ok(number) => Ok(number),
        Err(_) => bail!("KSM's {name} is {text:?}"),
    }
}

/// `schedstat` of the kernel's thread: its parent is kthreadd (2).
fn ksmd() -> Option<PathBuf> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (head, rest) = stat.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let parent = rest.split_whitespace().nth(1)?;
        (name == "ksmd" && parent == "2").then(|| entry.path().join("schedstat"))
    })
}
