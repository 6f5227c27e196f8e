//! When the first instruction of a guest runs, by the kernel's own trace: the same for every VMM.
//!
//! An instance of the kernel's trace buffer (so nobody else's tracing is touched) keeps the *first* events: it is
//! small and does not overwrite. A mark of ours and `kvm:kvm_entry` have the same clock.
//! Kernel: Documentation/trace/ftrace.rst, "Instances", "trace_marker".
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::janitor::Janitor;

const INSTANCES: &str = "/sys/kernel/tracing/instances";
const MARK: &str = "berth-perf starts a guest";

/// An instance; it goes when it is dropped.
pub(crate) struct FirstEntry(PathBuf);

impl FirstEntry {
    /// Makes one, which `janitor` removes if we cannot.
    pub(crate) fn new(janitor: &mut Janitor) -> Result<FirstEntry> {
        let name = format!("berth-perf-{}", std::process::id());
        let path = Path::new(INSTANCES).join(name);
        janitor.trace(&path)?;
        fs::create_dir(&path).with_context(|| {
            format!(
                "no trace instance {} (as root, with tracefs mounted)",
                path.display()
            )
        })?;
        let trace = FirstEntry(path);
        trace.set("tracing_on", "0")?;
        trace.set("trace_clock", "mono")?;
        trace.set("options/overwrite", "0")?;
        trace.set("buffer_size_kb", "64")?;
        trace.set("events/kvm/kvm_entry/enable", "1")?;
        Ok(trace)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Forgets all, and marks the moment before a VMM is started.
    pub(crate) fn begin(&self) -> Result<()> {
        self.set("tracing_on", "0")?;
        self.set("trace", "")?;
        self.set("tracing_on", "1")?;
        self.set("trace_marker", MARK)
    }

    /// From the mark to the first entry of one of these threads into a guest.
    pub(crate) fn finish(&self, tids: &[i32]) -> Result<Duration> {
        self.set("tracing_on", "0")?;
        let path = self.0.join("trace");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        first(&text, tids)
    }
}

impl Drop for FirstEntry {
    fn drop(&mut self) {
        // The janitor looks again.
        let _ = fs::remove_dir(&self.0);
    }
}

/// In lines such as ` vcpu0-12345 [001] d..1.  1234.567890: kvm_entry: vcpu 0, rip 0x…`.
fn first(trace: &str, tids: &[i32]) -> Result<Duration> {
    let mut mark = None;
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        let Some((head, event)) = line.split_once(": ") else {
            continue;
        };
        let Some(moment) = head.split_whitespace().last().and_then(seconds) else {
            continue;
        };
        let ours = || thread_of(head).is_some_and(|tid| tids.contains(&tid));
        match mark {
            None if event.contains(MARK) => mark = Some(moment),
            Some(mark) if event.starts_with("kvm_entry") && ours() => {
                let took = moment.checked_sub(mark);
                return took.context("a trace that goes back in time");
            }
            _ => {}
        }
    }
    match mark {
        None => bail!("the trace has lost its begin"),
        Some(_) => {
            bail!("the trace has no entry into this guest: other guests of this host fill it")
        }
    }
}

/// The number between the thread's name, which may have anything in it, and the CPU in brackets.
fn thread_of(head: &str) -> Option<i32> {
    let (thread, _) = head.rsplit_once('[')?;
    let (_, tid) = thread.trim_end().rsplit_once('-')?;
    tid.parse().ok()
}

fn seconds(text: &str) -> Option<Duration> {
    let (whole, part) = text.split_once('.')?;
    if part.len() != 6 {
        return None;
    }
    Some(Duration::from_secs(whole.parse().ok()?) + Duration::from_micros(part.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#
       other-[x]-9     [000] d..1.   100.000005: kvm_entry: vcpu 0, rip 0x1
      berth-perf-77    [001] .....   100.500000: tracing_mark_write: berth-perf starts a guest
         vcpu0-9       [000] d..1.   100.600000: kvm_entry: vcpu 0, rip 0x1
      CPU 0/KVM-812    [000] d..1.   101.750001: kvm_entry: vcpu 0, rip 0xfff0
      CPU 0/KVM-812    [000] d..1.   102.000000: kvm_entry: vcpu 0, rip 0xfff0
";

    #[test]
    fn the_first_entry_is_that_of_the_right_guest_after_the_mark() {
        assert_eq!(
            first(TRACE, &[812]).unwrap(),
            Duration::from_micros(1_250_001)
        );
        assert_eq!(first(TRACE, &[9, 812]).unwrap(), Duration::from_millis(100));
        let error = first(TRACE, &[4]).unwrap_err().to_string();
        assert!(error.contains("other guests"), "{error}");
        let lost = TRACE.replace(MARK, "");
        assert!(first(&lost, &[812]).is_err());
    }
}
