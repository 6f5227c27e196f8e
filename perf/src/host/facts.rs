//! Facts that a reader of figures wants to know.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Of one host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Model name of CPU 0.
    pub cpu: String,
    /// CPUs that we may use.
    pub cpus: usize,
    /// MiB.
    pub memory_mib: u64,
    /// Release.
    pub kernel: String,
    /// Distribution.
    pub system: String,
    /// Vulnerability and what the kernel does about it.
    pub mitigations: BTreeMap<String, String>,
    /// Of CPU 0; none in most virtual machines.
    pub governor: Option<String>,
    /// The idle driver.
    pub idle_driver: Option<String>,
    /// Hardware, PVM, lab, nested, or none.
    pub kvm: String,
    /// How cores were kept awake.
    pub awake: String,
    /// Of this program.
    pub version: String,
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// What is behind `key` and a colon.
fn value_of(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

impl Facts {
    /// Of this host.
    pub fn gather(awake: String, in_lab: bool) -> Facts {
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let meminfo = read("/proc/meminfo").unwrap_or_default();
        let total = value_of(&meminfo, "MemTotal");
        let kib = total.and_then(|total| total.split(' ').next()?.parse::<u64>().ok());
        let release = read("/etc/os-release").unwrap_or_default();
        let system = release
            .lines()
            .find_map(|line| line.strip_prefix("PRETTY_NAME="));
        Facts {
            cpu: value_of(&cpuinfo, "model name").unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            system: system.unwrap_or_default().trim_matches('"').to_owned(),
            mitigations: mitigations(),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            idle_driver: read("/sys/devices/system/cpu/cpuidle/current_driver"),
            kvm: kvm(&cpuinfo, in_lab),
            awake,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// In one line.
    pub fn line(&self) -> String {
        let governor = self.governor.as_deref().unwrap_or("none visible");
        format!(
            "{} · {} CPUs · {} MiB · Linux {} · {} · KVM: {} · governor: {governor} · cores awake: {}",
            self.cpu, self.cpus, self.memory_mib, self.kernel, self.system, self.kvm, self.awake
        )
    }
}

fn mitigations() -> BTreeMap<String, String> {
    let folder = fs::read_dir("/sys/devices/system/cpu/vulnerabilities");
    let files = folder.into_iter().flatten().flatten();
    files
        .filter_map(|file| {
            let name = file.file_name().to_string_lossy().into_owned();
            let text = read(file.path())?;
            (text != "Not affected").then_some((name, text))
        })
        .collect()
}

/// What kind of KVM there is. PVM shows as a module of its own; a KVM that is there while the CPU shows
/// neither vmx nor svm is one, too.
fn kvm(cpuinfo: &str, in_lab: bool) -> String {
    if in_lab {
        return "lab (nested, on an emulated CPU)".to_owned();
    }
    if !Path::new("/dev/kvm").exists() {
        return "none".to_owned();
    }
    let flags = value_of(cpuinfo, "flags").unwrap_or_default();
    let has = |flag: &str| flags.split(' ').any(|word| word == flag);
    let hardware = has("vmx") || has("svm");
    let kind = match (hardware, has("hypervisor")) {
        _ if Path::new("/sys/module/kvm_pvm").exists() => "PVM",
        (false, _) => "without vmx or svm (PVM or alike)",
        (true, true) => "nested",
        (true, false) => "hardware",
    };
    kind.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_a_kernel_and_a_cpu() {
        let facts = Facts::gather("spin".to_owned(), false);
        assert!(facts.cpus > 0 && facts.memory_mib > 0 && !facts.kernel.is_empty());
        assert!(facts.line().contains(&facts.kernel));
    }

    #[test]
    fn values_are_found_behind_their_keys() {
        let text = "processor\t: 0\nmodel name\t: A B\nflags\t\t: fpu svm\n";
        assert_eq!(value_of(text, "model name").as_deref(), Some("A B"));
        assert_eq!(value_of(text, "nothing"), None);
        assert!(kvm(text, true).starts_with("lab"));
    }
}
