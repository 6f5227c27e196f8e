//! The scanner: how fast, when, and what it has brought.
//!
//! ```text
//!   CPU account:  + budget × time − what ksmd used     in the red: run=0 until it is out again
//!   a pass:       full_scans goes up ─▶ yield = pages saved ÷ CPU seconds since the last one
//!   a scan:       burst: until ≥ min_passes and yield < min_yield      look: one pass
//! ```
//!
//! `pages_to_scan` follows from the cost of a page, which is measured, so that work ÷ (work + sleep) is the budget.
//! Memory that is new to the kernel is put behind its cursor, so `min_passes` counts the rest of the current pass.

use super::pressure::{Host, Windows};
use super::{Action, Decision, History, State, mib};
use crate::config::Config;
use crate::sample::{Sample, Settings};

/// CPU of a page, in microseconds, before it was measured.
const COST_US: f64 = 6.0;
/// Memory of a VM that is newly offered counts as much from this on.
const MUCH_BYTES: u64 = 64 << 20;
/// Of a budget; the rest is for error.
const AIM: f64 = 0.95;
/// `pages_to_scan` changes when it is off by more than this part.
const TOLERANCE: f64 = 0.5;

/// What is remembered of the scanner.
#[derive(Debug, Clone)]
pub(super) struct Scanner {
    /// CPU that may be used, in microseconds.
    balance_us: f64,
    /// Part of a core that it may use now.
    budget: f64,
    /// In the red.
    waits: bool,
    cost_us: f64,
    scan: Option<Scan>,
    /// CPU of the last pass, in microseconds.
    pass_us: u64,
    /// Pages for a CPU second, of the last pass.
    last_yield: Option<f64>,
    /// Looks in a row that found too little.
    looks: u32,
    /// When to look next.
    look_at_ms: u64,
    /// Why the last scan ended.
    ended: String,
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            balance_us: 0.0,
            budget: 0.0,
            waits: false,
            cost_us: COST_US,
            scan: None,
            pass_us: 0,
            last_yield: None,
            looks: 0,
            look_at_ms: 0,
            ended: "nothing was scanned yet".to_owned(),
        }
    }
}

/// A scan under way.
#[derive(Debug, Clone, Copy)]
struct Scan {
    kind: Kind,
    first_pass: u64,
    /// As of the last pass.
    pass: u64,
    cpu_us: u64,
    saved: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Burst,
    Look,
}

/// How a scan goes on.
enum Outcome {
    GoesOn,
    Ends(String),
    /// A look that found enough.
    Grows(String),
}

impl Scanner {
    pub(super) fn says(&self) -> String {
        let found = self.last_yield.map_or_else(String::new, |found| {
            format!(", last pass {found:.0} pages per CPU second")
        });
        let what = match self.scan {
            Some(Scan {
                kind: Kind::Burst, ..
            }) => "merges new memory",
            Some(_) => "looks whether there is more to merge",
            None => return format!("stands still: {}{found}", self.ended),
        };
        let wait = if self.waits {
            ", waiting: its CPU is used up"
        } else {
            ""
        };
        format!("{what} at {:.2} of a core{wait}{found}", self.budget)
    }

    /// Settles the account and measures the cost of a page.
    pub(super) fn account(
        &mut self,
        config: &Config,
        windows: &Windows,
        last: Option<&Sample>,
        sample: &Sample,
    ) {
        // Where others wait for CPUs, less: down to a half where they always do. The scanner is at nice 5 as it is.
        let busy = ((windows.cpu_waiting() - 0.2) / 0.8).clamp(0.0, 1.0);
        self.budget = config.merge.cpu_budget * (1.0 - 0.5 * busy);
        let Some(last) = last else {
            return;
        };
        let used_us = sample.scanner_cpu_us.saturating_sub(last.scanner_cpu_us) as f64;
        let time_us = 1000.0 * sample.at_ms.saturating_sub(last.at_ms) as f64;
        // At most what one step gives is kept, so that a rest is not followed by excess.
        let most = self.budget * time_us;
        self.balance_us = (self.balance_us + most - used_us).min(most);
        self.waits = self.balance_us < if self.waits { 0.5 * most } else { 0.0 };
        if let (Some(now), Some(before)) = (sample.ksm.pages_scanned, last.ksm.pages_scanned) {
            let pages = now.saturating_sub(before);
            if pages >= 1000 && used_us > 0.0 {
                let cost = (used_us / pages as f64).clamp(0.2, 200.0);
                self.cost_us += 0.1 * (cost - self.cost_us);
            }
        }
    }

    fn begin(&mut self, kind: Kind, sample: &Sample) {
        self.scan = Some(Scan {
            kind,
            first_pass: sample.ksm.full_scans,
            pass: sample.ksm.full_scans,
            cpu_us: sample.scanner_cpu_us,
            saved: sample.ksm.saved_pages(),
        });
    }

    fn end(&mut self, why: String) {
        self.scan = None;
        self.ended = why;
    }

    /// Takes note of a pass that has ended.
    fn progress(&mut self, config: &Config, sample: &Sample) -> Outcome {
        let Some(scan) = &mut self.scan else {
            return Outcome::GoesOn;
        };
        let pass = sample.ksm.full_scans;
        if pass <= scan.pass {
            return Outcome::GoesOn;
        }
        self.pass_us = sample.scanner_cpu_us.saturating_sub(scan.cpu_us) / (pass - scan.pass);
        let cpu_s = (sample.scanner_cpu_us.saturating_sub(scan.cpu_us) as f64 / 1e6).max(0.001);
        let found = sample.ksm.saved_pages().saturating_sub(scan.saved) as f64 / cpu_s;
        self.last_yield = Some(found);
        let passes = pass - scan.first_pass;
        scan.pass = pass;
        scan.cpu_us = sample.scanner_cpu_us;
        scan.saved = sample.ksm.saved_pages();
        let merge = &config.merge;
        let worth = found >= merge.min_yield;
        let said = format!(
            "pass {passes} saved {found:.0} pages per CPU second, the limit is {:.0}",
            merge.min_yield
        );
        match scan.kind {
            Kind::Look if worth => Outcome::Grows(said),
            Kind::Look => Outcome::Ends(said),
            Kind::Burst if passes >= merge.max_passes => {
                Outcome::Ends(format!("{said}; {passes} passes are enough"))
            }
            Kind::Burst if passes >= merge.min_passes && !worth => Outcome::Ends(said),
            Kind::Burst => Outcome::GoesOn,
        }
    }

    /// When to look again: each time twice as long, and never so often that passes take more than `settled_cpu`.
    fn look_later(&mut self, config: &Config, sample: &Sample) {
        let merge = &config.merge;
        let wait_s = merge
            .probe_first_s
            .saturating_mul(1 << self.looks.min(20))
            .min(merge.probe_last_s);
        // The first looks are part of the burst: a guest that was starting goes on with it.
        let rest_ms = match self.looks {
            0 | 1 => 0.0,
            _ => self.pass_us as f64 / 1000.0 / merge.settled_cpu,
        };
        self.looks = self.looks.saturating_add(1);
        self.look_at_ms = sample.at_ms + (1000 * wait_s).max(rest_ms as u64);
    }
}

/// Follows the state machine.
pub(super) fn change_state(
    config: &Config,
    next: &mut History,
    sample: &Sample,
    host: &Host,
    decision: &mut Decision,
) {
    let news = news(config, next, sample);
    let foreign = foreign(config, sample);
    let wanted = config.merge.domain.is_some() && offered(config, sample) > 0 && foreign.is_none();
    if !wanted {
        let why = foreign.unwrap_or_else(|| "no memory of the domain is offered".to_owned());
        next.scanner.end(why);
    } else if let Some(storm) = storm(config, next, sample) {
        next.scanner.end(storm);
        next.scanner.look_later(config, sample);
    } else if let Some(news) = news {
        next.scanner.looks = 0;
        next.scanner.begin(Kind::Burst, sample);
        mark_offers(next, sample);
        if next.state != State::Pressure || host.short.is_none() {
            enter(next, sample, State::Burst, news, decision);
        }
    } else {
        go_on(config, next, sample, decision);
    }
    if let Some(short) = &host.short {
        if next.state != State::Pressure && wanted && next.scanner.scan.is_none() {
            next.scanner.begin(Kind::Burst, sample);
        }
        enter(next, sample, State::Pressure, short.clone(), decision);
        return;
    }
    let (state, why) = match &next.scanner.scan {
        _ if !wanted => (State::Off, next.scanner.ended.clone()),
        Some(Scan {
            kind: Kind::Burst, ..
        }) => (State::Burst, "there is memory to merge".to_owned()),
        _ => (State::Trickle, next.scanner.ended.clone()),
    };
    enter(next, sample, state, why, decision);
}

fn go_on(config: &Config, next: &mut History, sample: &Sample, decision: &mut Decision) {
    match next.scanner.progress(config, sample) {
        Outcome::GoesOn
            if next.scanner.scan.is_none() && sample.at_ms >= next.scanner.look_at_ms =>
        {
            next.scanner.begin(Kind::Look, sample);
        }
        Outcome::GoesOn => {}
        Outcome::Ends(why) => {
            next.scanner.end(why);
            next.scanner.look_later(config, sample);
        }
        Outcome::Grows(why) => {
            next.scanner.looks = 0;
            next.scanner.begin(Kind::Burst, sample);
            if next.state != State::Pressure {
                enter(next, sample, State::Burst, why, decision);
            }
        }
    }
}

fn enter(next: &mut History, sample: &Sample, state: State, why: String, decision: &mut Decision) {
    if next.state != state {
        next.state = state;
        next.since_ms = sample.at_ms;
        decision.changed = Some(why);
    }
}

/// Memory of the domain that is offered, in bytes.
fn offered(config: &Config, sample: &Sample) -> u64 {
    let ours = |domain: &Option<String>| domain.is_some() && *domain == config.merge.domain;
    let vms = sample.vms.values().filter(|vm| ours(&vm.domain));
    vms.map(|vm| vm.advised_bytes).sum()
}

/// Memory of another domain that is offered: it would be merged with ours, so nothing is scanned before it is withdrawn.
fn foreign(config: &Config, sample: &Sample) -> Option<String> {
    let ours = &config.merge.domain;
    let mut others = sample
        .vms
        .iter()
        .filter(|(_, vm)| vm.advised_bytes > 0 && vm.domain.is_some() && vm.domain != *ours);
    others.next().map(|(name, vm)| {
        format!(
            "{} MiB of VM {name}, of another domain, are still offered",
            mib(vm.advised_bytes)
        )
    })
}

/// What there is to merge that was not there when the last burst began.
fn news(config: &Config, next: &History, sample: &Sample) -> Option<String> {
    sample.vms.iter().find_map(|(name, vm)| {
        let before = next.vms.get(name)?.burst_bytes;
        let new = vm.advised_bytes.saturating_sub(before);
        let much = before == 0 && new > 0 || new >= MUCH_BYTES;
        (vm.domain.is_some() && vm.domain == config.merge.domain && much)
            .then(|| format!("VM {name} offers {} MiB that are new", mib(new)))
    })
}

fn mark_offers(next: &mut History, sample: &Sample) {
    for (name, known) in &mut next.vms {
        if let Some(vm) = sample.vms.get(name) {
            known.burst_bytes = vm.advised_bytes;
        }
    }
}

/// Merged pages are written to so often that merging them costs more than it brings.
fn storm(config: &Config, next: &History, sample: &Sample) -> Option<String> {
    next.scanner.scan?;
    let (pages, ms) = next.windows.cow_pages(5000);
    if ms == 0 {
        return None;
    }
    let per_second = pages * 1000 / ms;
    let most = config.merge.max_cow * u64::from(sample.host.cores.max(1));
    (per_second > most).then(|| {
        format!("{per_second} merged pages a second are written to and copied, above {most}")
    })
}

/// Has the scanner do what the state asks for, where it does not yet.
pub(super) fn set(config: &Config, next: &History, sample: &Sample, decision: &mut Decision) {
    let now = &sample.ksm.settings;
    let scanner = &next.scanner;
    let runs = scanner.scan.is_some() && !scanner.waits;
    // A host where the tuner has nothing to do is left as it is found.
    if config.merge.domain.is_none() {
        return;
    }
    let mut wanted = Settings {
        run: u64::from(runs),
        ..now.clone()
    };
    if runs {
        let (pages, sleep_ms) = pace(scanner.budget, scanner.cost_us, now.sleep_millisecs);
        let off = (pages as f64 - now.pages_to_scan as f64).abs() / pages as f64;
        if off > TOLERANCE || now.sleep_millisecs != sleep_ms {
            wanted.pages_to_scan = pages;
            wanted.sleep_millisecs = sleep_ms;
        }
        wanted.smart_scan = now.smart_scan.map(|_| 1);
        wanted.use_zero_pages = now
            .use_zero_pages
            .map(|_| u64::from(config.merge.use_zero_pages));
        wanted.advisor_mode = now.advisor_mode.as_ref().map(|_| "none".to_owned());
        wanted.max_page_sharing = sharing(config, sample);
    }
    if wanted != *now {
        let why = scanner.says();
        decision.add(Action::Scanner(wanted), why);
    }
}

/// How often a page may be mapped; the kernel takes another number only while no page is merged.
fn sharing(config: &Config, sample: &Sample) -> Option<u64> {
    let now = sample.ksm.settings.max_page_sharing?;
    let wanted = config.merge.max_page_sharing;
    Some(
        wanted
            .filter(|_| sample.ksm.pages_shared == 0)
            .unwrap_or(now),
    )
}

/// `pages_to_scan` and `sleep_millisecs` at which a page's cost makes a part of a core. Around a tenth of a core the sleep stays what it is.
fn pace(budget: f64, cost_us: f64, sleep_now_ms: u64) -> (u64, u64) {
    let aim = (AIM * budget).min(0.9);
    let sleep_ms = match sleep_now_ms {
        10 if aim >= 0.08 => 10,
        100 if aim <= 0.12 => 100,
        _ if aim >= 0.1 => 10,
        _ => 100,
    };
    let work_us = 1000.0 * sleep_ms as f64 * aim / (1.0 - aim);
    ((work_us / cost_us).max(1.0) as u64, sleep_ms)
}
