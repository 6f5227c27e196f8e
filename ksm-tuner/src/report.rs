//! What the tuner tells of itself: `status`, `explain` and metrics are views of one report.

use std::collections::VecDeque;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::policy::{Decision, State};
use crate::sample::{Ksm, PAGE, ProcessKsm, Sample};

/// Decisions that are kept to be explained.
const KEPT: usize = 500;

/// The state of things after a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When, in milliseconds since the tuner started.
    pub at_ms: u64,
    /// State of the policy.
    pub state: State,
    /// For how many seconds.
    pub state_s: u64,
    /// The domain that is merged.
    pub domain: Option<String>,
    /// Nothing is done, only said.
    pub dry_run: bool,
    /// What the scanner does, and why.
    pub scanner: String,
    /// MiB that merging saves now.
    pub saved_mib: u64,
    /// Merged pages, and places in which they are mapped beyond the first.
    pub pages_shared: u64,
    /// See `pages_shared`.
    pub pages_sharing: u64,
    /// Seconds of CPU that the kernel's scanner has used since the tuner started.
    pub scanner_cpu_s: f64,
    /// Seconds of CPU of the tuner itself.
    pub tuner_cpu_s: f64,
    /// Milliseconds of CPU of both for each MiB saved; none while nothing is.
    pub cpu_ms_per_mib: Option<f64>,
    /// Merged pages that were written to and copied since the tuner started.
    pub cow_breaks: Option<u64>,
    /// MiB that programs could get.
    pub available_mib: u64,
    /// Percent of ten seconds in which some task waited for memory.
    pub memory_waiting: f64,
    /// VMs.
    pub vms: Vec<VmStatus>,
}

/// One VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Process id of its VMM.
    pub pid: u32,
    /// Trust domain.
    pub domain: Option<String>,
    /// Guest RAM.
    pub size_mib: u64,
    /// What may be merged.
    pub mergeable_mib: u64,
    /// What is offered.
    pub offered_mib: u64,
    /// What is merged, pages of zeros included.
    pub merged_mib: u64,
    /// What that saves: its part of `saved_mib` of the host.
    pub saved_mib: u64,
    /// What merging saves after its bookkeeping, as the kernel reckons.
    pub profit_kib: i64,
    /// What its balloon was told to hold and holds, if it has one.
    pub balloon_mib: Option<(u64, u64)>,
    /// What the guest has available, if it says.
    pub available_mib: Option<u64>,
}

/// What never changes while the tuner runs, and what it has cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Since {
    /// CPU of the scanner at the start, in microseconds.
    pub scanner_cpu_us: u64,
    /// Copies of merged pages at the start.
    pub cow_ksm: Option<u64>,
    /// CPU of the tuner so far, in microseconds.
    pub tuner_cpu_us: u64,
}

/// A status from a sample; what the policy says of itself is put in by the caller.
pub fn status(sample: &Sample, since: Since) -> Status {
    let saved = sample.ksm.saved_pages() * PAGE;
    let scanner_us = sample.scanner_cpu_us.saturating_sub(since.scanner_cpu_us);
    let cpu_us = scanner_us + since.tuner_cpu_us;
    let saved_mib = saved >> 20;
    Status {
        at_ms: sample.at_ms,
        saved_mib,
        pages_shared: sample.ksm.pages_shared,
        pages_sharing: sample.ksm.pages_sharing,
        scanner_cpu_s: scanner_us as f64 / 1e6,
        tuner_cpu_s: since.tuner_cpu_us as f64 / 1e6,
        cpu_ms_per_mib: (saved_mib > 0).then(|| cpu_us as f64 / 1e3 / saved_mib as f64),
        cow_breaks: sample
            .host
            .cow_ksm
            .zip(since.cow_ksm)
            .map(|(now, then)| now.saturating_sub(then)),
        available_mib: sample.host.available_bytes >> 20,
        memory_waiting: sample.host.memory_some_avg10,
        vms: sample
            .vms
            .iter()
            .map(|(name, vm)| VmStatus {
                name: name.clone(),
                pid: vm.pid,
                domain: vm.domain.clone(),
                size_mib: vm.size_bytes >> 20,
                mergeable_mib: vm.mergeable_bytes >> 20,
                offered_mib: vm.advised_bytes >> 20,
                merged_mib: vm
                    .ksm
                    .map_or(0, |ksm| ((ksm.merging_pages + ksm.zero_pages) * PAGE) >> 20),
                saved_mib: vm.ksm.map_or(0, |ksm| saved_of(&sample.ksm, &ksm) >> 20),
                profit_kib: vm.ksm.map_or(0, |ksm| ksm.profit_bytes >> 10),
                balloon_mib: vm
                    .balloon
                    .map(|balloon| (balloon.target_bytes >> 20, balloon.actual_bytes >> 20)),
                available_mib: vm
                    .balloon
                    .and_then(|balloon| Some(balloon.guest?.available_bytes >> 20)),
            })
            .collect(),
        ..Status::default()
    }
}

/// Bytes that merging saves of a VM: its pages of zeros, and of its merged pages the part that is not kept.
fn saved_of(ksm: &Ksm, vm: &ProcessKsm) -> u64 {
    let all = ksm.pages_shared + ksm.pages_sharing;
    let merged = u128::from(vm.merging_pages) * u128::from(ksm.pages_sharing);
    let merged = merged.checked_div(u128::from(all)).unwrap_or(0);
    (vm.zero_pages + u64::try_from(merged).unwrap_or(0)) * PAGE
}

/// What a person reads.
pub fn table(status: &Status) -> String {
    let mut text = String::new();
    let domain = match &status.domain {
        Some(domain) => format!("domain {domain}"),
        None => "no domain: nothing is merged".to_owned(),
    };
    let dry = if status.dry_run { ", dry run" } else { "" };
    let cost = status
        .cpu_ms_per_mib
        .map_or_else(|| "–".to_owned(), |cost| format!("{cost:.1} ms"));
    let cow = status
        .cow_breaks
        .map_or_else(|| "–".to_owned(), |pages| pages.to_string());
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} for {} s, {domain}{dry}",
        status.state, status.state_s
    );
    let _ = writeln!(text, "scanner   {}", status.scanner);
    let _ = writeln!(
        text,
        "saved     {} MiB ({} pages are mapped {} times more)",
        status.saved_mib, status.pages_shared, status.pages_sharing
    );
    let _ = writeln!(
        text,
        "CPU       scanner {:.2} s, tuner {:.2} s, per MiB saved {cost}; merged pages copied {cow}",
        status.scanner_cpu_s, status.tuner_cpu_s
    );
    let _ = writeln!(
        text,
        "host      {} MiB available, tasks wait for memory {:.2} % of the time",
        status.available_mib, status.memory_waiting
    );
    text + &vm_table(&status.vms)
}

fn vm_table(vms: &[VmStatus]) -> String {
    if vms.is_empty() {
        return "no VMs\n".to_owned();
    }
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "\n{:<16} {:>8} {:<12} {:>7} {:>9} {:>8} {:>8} {:>7} {:>10} {:>11}",
        "VM",
        "PID",
        "DOMAIN",
        "MiB",
        "MERGEABLE",
        "OFFERED",
        "MERGED",
        "SAVED",
        "PROFIT KiB",
        "BALLOON"
    );
    for vm in vms {
        let balloon = vm.balloon_mib.map_or_else(
            || "–".to_owned(),
            |(target, actual)| format!("{actual}/{target}"),
        );
        let _ = writeln!(
            text,
            "{:<16} {:>8} {:<12} {:>7} {:>9} {:>8} {:>8} {:>7} {:>10} {:>11}",
            vm.name,
            vm.pid,
            vm.domain.as_deref().unwrap_or("–"),
            vm.size_mib,
            vm.mergeable_mib,
            vm.offered_mib,
            vm.merged_mib,
            vm.saved_mib,
            vm.profit_kib,
            balloon
        );
    }
    text
}

/// Prometheus text.
pub fn metrics(status: &Status) -> String {
    let mut text = String::new();
    for state in [State::Off, State::Burst, State::Trickle, State::Pressure] {
        let name = state.to_string().to_lowercase();
        let is = u64::from(state == status.state);
        let _ = writeln!(text, "berth_tuner_state{{state=\"{name}\"}} {is}");
    }
    for (name, value) in [
        ("saved_bytes", (status.saved_mib << 20) as f64),
        ("pages_shared", status.pages_shared as f64),
        ("pages_sharing", status.pages_sharing as f64),
        ("scanner_cpu_seconds_total", status.scanner_cpu_s),
        ("cpu_seconds_total", status.tuner_cpu_s),
        ("available_bytes", (status.available_mib << 20) as f64),
        ("memory_waiting_percent", status.memory_waiting),
    ] {
        let _ = writeln!(text, "berth_tuner_{name} {value}");
    }
    if let Some(cow) = status.cow_breaks {
        let _ = writeln!(text, "berth_tuner_cow_breaks_total {cow}");
    }
    for vm in &status.vms {
        let label = vm.name.replace(['\\', '"', '\n'], "_");
        for (name, mib) in [
            ("mergeable", Some(vm.mergeable_mib)),
            ("offered", Some(vm.offered_mib)),
            ("merged", Some(vm.merged_mib)),
            ("saved", Some(vm.saved_mib)),
            ("balloon", vm.balloon_mib.map(|balloon| balloon.1)),
        ] {
            if let Some(mib) = mib {
                let _ = writeln!(
                    text,
                    "berth_tuner_vm_{name}_bytes{{vm=\"{label}\"}} {}",
                    mib << 20
                );
            }
        }
    }
    text
}

/// What others may ask for: written by the main thread, read by those that answer.
#[derive(Debug, Default)]
pub struct Published {
    /// After the last step.
    pub status: Status,
    decisions: VecDeque<Explained>,
}

/// A decision, when it was made, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// Seconds since 1970.
    pub time_s: u64,
    /// It.
    #[serde(flatten)]
    pub decision: Decision,
    /// What could not be done of it.
    pub failed: Vec<String>,
}

impl Published {
    /// Keeps a decision.
    pub fn explain(&mut self, explained: Explained) {
        self.decisions.push_back(explained);
        if self.decisions.len() > KEPT {
            self.decisions.pop_front();
        }
    }

    /// The last `count` decisions, the oldest first.
    pub fn last(&self, count: usize) -> Vec<Explained> {
        let skip = self.decisions.len().saturating_sub(count);
        self.decisions.iter().skip(skip).cloned().collect()
    }
}

/// Lines for a person.
pub fn explanation(explained: &Explained) -> String {
    let mut text = String::new();
    let time = clock(explained.time_s);
    let decision = &explained.decision;
    if let Some(why) = &decision.changed {
        let _ = writeln!(text, "{time} {:<8} {why}", decision.state);
    }
    for step in &decision.steps {
        let _ = writeln!(
            text,
            "{time} {:<8} {}: {}",
            decision.state,
            action(&step.action),
            step.why
        );
    }
    for failed in &explained.failed {
        let _ = writeln!(text, "{time} {:<8} failed: {failed}", decision.state);
    }
    text
}

/// An action in a few words.
pub fn action(action: &crate::policy::Action) -> String {
    use crate::policy::Action;
    match action {
        Action::Scanner(settings) if settings.run == 0 => "scanner stops".to_owned(),
        Action::Scanner(settings) => format!(
            "scanner runs, {} pages every {} ms",
            settings.pages_to_scan, settings.sleep_millisecs
        ),
        Action::Compare { vm } => format!("compare pages of {vm}"),
        Action::Advise {
            vm, merge, ranges, ..
        } => {
            let what = if *merge { "offer" } else { "withdraw" };
            match ranges.len() {
                0 => format!("{what} all memory of {vm}"),
                count => format!("{what} {count} runs of {vm}"),
            }
        }
        Action::Balloon { vm, bytes } => format!("balloon of {vm} to {} MiB", bytes >> 20),
        Action::Reclaim { vm, bytes } => format!("reclaim {} MiB of {vm}", bytes >> 20),
    }
}

/// The time of day, UTC.
fn clock(time_s: u64) -> String {
    let day = time_s % 86_400;
    format!("{:02}:{:02}:{:02}", day / 3600, day / 60 % 60, day % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Action, Step};
    use crate::sample::{Balloon, ProcessKsm, Vm};

    fn sample() -> Sample {
        let mut sample = Sample::default();
        sample.host.available_bytes = 100 << 20;
        sample.host.cow_ksm = Some(12);
        sample.ksm.pages_shared = 10;
        sample.ksm.pages_sharing = 512;
        sample.scanner_cpu_us = 3_000_000;
        let vm = Vm {
            pid: 7,
            domain: Some("farm".to_owned()),
            size_bytes: 1 << 30,
            mergeable_bytes: 1 << 30,
            advised_bytes: 1 << 29,
            ksm: Some(ProcessKsm {
                rmap_items: 5,
                merging_pages: 256,
                zero_pages: 256,
                profit_bytes: -2048,
            }),
            balloon: Some(Balloon {
                target_bytes: 64 << 20,
                actual_bytes: 32 << 20,
                guest: None,
            }),
            ..Vm::default()
        };
        sample.vms.insert("web".to_owned(), vm);
        sample
    }

    fn reported() -> Status {
        let since = Since {
            scanner_cpu_us: 1_000_000,
            cow_ksm: Some(2),
            tuner_cpu_us: 10_000,
        };
        Status {
            state: State::Burst,
            state_s: 4,
            domain: Some("farm".to_owned()),
            scanner: "merges new memory".to_owned(),
            ..status(&sample(), since)
        }
    }

    #[test]
    fn a_status_counts_from_the_tuners_start() {
        let status = reported();
        assert_eq!(status.saved_mib, 2);
        assert_eq!(status.scanner_cpu_s, 2.0);
        assert_eq!(status.cpu_ms_per_mib, Some(1005.0));
        assert_eq!(status.cow_breaks, Some(10));
        assert_eq!(status.vms[0].merged_mib, 2);
        let text = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status);
        assert!(text.contains(r#""state":"BURST""#), "{text}");
    }

    #[test]
    fn what_vms_save_adds_up_to_what_the_host_saves() {
        let ksm = Ksm {
            pages_shared: 3000,
            pages_sharing: 9000,
            zero_pages: Some(500),
            ..Ksm::default()
        };
        let vm = |merging_pages, zero_pages| ProcessKsm {
            merging_pages,
            zero_pages,
            ..ProcessKsm::default()
        };
        let saved = saved_of(&ksm, &vm(8000, 100)) + saved_of(&ksm, &vm(4000, 400));
        assert_eq!(saved, ksm.saved_pages() * PAGE);
        assert_eq!(saved_of(&Ksm::default(), &vm(7, 0)), 0);
    }

    #[test]
    fn a_table_has_all_of_it() {
        let text = table(&reported());
        for part in [
            "BURST for 4 s, domain farm\n",
            "scanner   merges new memory\n",
            "saved     2 MiB (10 pages are mapped 512 times more)\n",
            "per MiB saved 1005.0 ms; merged pages copied 10\n",
            "\nweb                     7 farm            1024      1024      512        2       1         -2       32/64\n",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        assert!(table(&Status::default()).contains("no domain: nothing is merged"));
        assert!(table(&Status::default()).ends_with("no VMs\n"));
    }

    #[test]
    fn metrics_are_prometheus_text() {
        let text = metrics(&reported());
        for line in [
            "berth_tuner_state{state=\"burst\"} 1",
            "berth_tuner_state{state=\"off\"} 0",
            "berth_tuner_saved_bytes 2097152",
            "berth_tuner_scanner_cpu_seconds_total 2",
            "berth_tuner_cow_breaks_total 10",
            "berth_tuner_vm_balloon_bytes{vm=\"web\"} 33554432",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn decisions_are_kept_and_explained() {
        let mut published = Published::default();
        for at_ms in 0..KEPT as u64 + 10 {
            published.explain(Explained {
                time_s: 3661,
                decision: Decision {
                    at_ms,
                    state: State::Pressure,
                    changed: Some("5 MiB available".to_owned()),
                    steps: vec![Step {
                        action: Action::Balloon {
                            vm: "web".to_owned(),
                            bytes: 1 << 20,
                        },
                        why: "it has 7 MiB".to_owned(),
                    }],
                },
                failed: vec!["no answer".to_owned()],
            });
        }
        let last = published.last(2);
        assert_eq!(last[1].decision.at_ms, KEPT as u64 + 9);
        assert_eq!(published.last(usize::MAX).len(), KEPT);
        assert_eq!(
            explanation(&last[0]),
            "01:01:01 PRESSURE 5 MiB available\n\
             01:01:01 PRESSURE balloon of web to 1 MiB: it has 7 MiB\n\
             01:01:01 PRESSURE failed: no answer\n"
        );
    }
}
