//! A host that does what it is told: a scanner with a cost for each page, guests with equal pages and balloons.

use std::collections::BTreeMap;

use super::{Action, Decision, History, State, decide};
use crate::config::Config;
use crate::sample::{Balloon, GuestMemory, Ksm, Run, Sample, Settings, Vm};

pub(super) const GIB: u64 = 1 << 30;
pub(super) const DOMAIN: &str = "farm";

/// Numbers that look random and are the same every time (xorshift64*).
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn within(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

pub(super) struct Host {
    pub(super) config: Config,
    pub(super) history: History,
    pub(super) sample: Sample,
    /// Microseconds of CPU for a page.
    pub(super) cost_us: f64,
    /// Part of offered memory that has equals.
    pub(super) equal: f64,
    pub(super) log: Vec<Decision>,
    cursor: f64,
    /// Pages merged of each VM once it was passed twice.
    passes: BTreeMap<String, u32>,
}

pub(super) fn config() -> Config {
    let mut config = Config::default();
    config.merge.domain = Some(DOMAIN.to_owned());
    config
}

impl Host {
    pub(super) fn new(config: Config) -> Self {
        let sample = Sample {
            host: crate::sample::Host {
                total_bytes: 64 * GIB,
                available_bytes: 48 * GIB,
                cores: 8,
                cow_ksm: Some(0),
                ..Default::default()
            },
            ksm: Ksm {
                settings: Settings {
                    run: 0,
                    pages_to_scan: 100,
                    sleep_millisecs: 20,
                    smart_scan: Some(1),
                    use_zero_pages: Some(0),
                    max_page_sharing: Some(256),
                    advisor_mode: Some("none".to_owned()),
                },
                pages_scanned: Some(0),
                zero_pages: Some(0),
                ..Ksm::default()
            },
            ..Sample::default()
        };
        Self {
            config,
            history: History::default(),
            sample,
            cost_us: 5.5,
            equal: 0.6,
            log: Vec::new(),
            cursor: 0.0,
            passes: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, name: &str, domain: &str, bytes: u64) {
        let pid = 100 + self.sample.vms.len() as u32;
        let vm = Vm {
            pid,
            running: true,
            domain: Some(domain.to_owned()),
            size_bytes: bytes,
            mergeable_bytes: bytes,
            ..Vm::default()
        };
        self.sample.vms.insert(name.to_owned(), vm);
    }

    pub(super) fn add_balloon(&mut self, name: &str, available: u64) {
        let vm = self.sample.vms.get_mut(name).unwrap();
        vm.balloon = Some(Balloon {
            guest: Some(GuestMemory {
                total_bytes: vm.size_bytes,
                available_bytes: available,
                oom_kills: Some(0),
                alloc_stalls: Some(0),
                direct_scans: Some(0),
                swap_in: Some(0),
            }),
            ..Balloon::default()
        });
    }

    pub(super) fn guest(&mut self, name: &str) -> &mut GuestMemory {
        let vm = self.sample.vms.get_mut(name).unwrap();
        vm.balloon.as_mut().unwrap().guest.as_mut().unwrap()
    }

    /// One step of `ms`: the host goes on, a decision is made and carried out.
    pub(super) fn step(&mut self, ms: u64) -> Decision {
        self.sample.at_ms += ms;
        self.scan(ms);
        let (next, decision) = decide(&self.config, &self.history, &self.sample);
        self.history = next;
        for vm in self.sample.vms.values_mut() {
            vm.compared = None;
        }
        for step in &decision.steps {
            self.act(&step.action);
        }
        if !decision.is_empty() {
            self.log.push(decision.clone());
        }
        decision
    }

    pub(super) fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.step(1000);
        }
    }

    pub(super) fn state(&self) -> State {
        self.history.state().0
    }

    pub(super) fn states(&self) -> Vec<State> {
        let changed = self
            .log
            .iter()
            .filter(|decision| decision.changed.is_some());
        changed.map(|decision| decision.state).collect()
    }

    fn offered_pages(&self) -> f64 {
        let vms = self.sample.vms.values();
        (vms.map(|vm| vm.advised_bytes).sum::<u64>() >> 12) as f64
    }

    fn scan(&mut self, ms: u64) {
        let settings = &self.sample.ksm.settings;
        let total = self.offered_pages();
        if settings.run != 1 || total == 0.0 {
            return;
        }
        let work_us = settings.pages_to_scan as f64 * self.cost_us;
        let rounds = 1000.0 * ms as f64 / (work_us + 1000.0 * settings.sleep_millisecs as f64);
        let pages = rounds * settings.pages_to_scan as f64;
        self.sample.scanner_cpu_us += (pages * self.cost_us) as u64;
        *self.sample.ksm.pages_scanned.as_mut().unwrap() += pages as u64;
        self.cursor += pages;
        while self.cursor >= total {
            self.cursor -= total;
            self.sample.ksm.full_scans += 1;
            for (name, vm) in &mut self.sample.vms {
                let passes = self.passes.entry(name.clone()).or_default();
                if vm.advised_bytes > 0 {
                    *passes += 1;
                }
            }
        }
        let mut merged = 0;
        for (name, vm) in &mut self.sample.vms {
            let pages = vm.advised_bytes >> 12;
            let equal = match self.passes.get(name) {
                Some(2..) => (pages as f64 * self.equal) as u64,
                _ => 0,
            };
            merged += equal;
            vm.ksm = Some(crate::sample::ProcessKsm {
                rmap_items: pages,
                merging_pages: equal,
                zero_pages: 0,
                profit_bytes: (equal << 12) as i64 - (pages << 6) as i64,
            });
        }
        self.sample.ksm.pages_sharing = merged;
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Scanner(settings) => self.sample.ksm.settings = settings.clone(),
            Action::Compare { vm } => {
                let vm = self.sample.vms.get_mut(vm).unwrap();
                let half = vm.mergeable_bytes / 2;
                let run = |start, equal| Run {
                    start,
                    len: half,
                    sampled: 100,
                    equal,
                };
                let all = [run(0, 60), run(half, 0)];
                // What is offered is not compared again.
                vm.compared = Some(all[usize::from(vm.advised_bytes > 0)..].to_vec());
            }
            Action::Advise {
                vm, merge, ranges, ..
            } => {
                let vm = self.sample.vms.get_mut(vm).unwrap();
                let some = ranges.iter().map(|range| range.1).sum::<u64>();
                vm.advised_bytes = match (merge, ranges.is_empty()) {
                    (false, _) => 0,
                    (true, true) => vm.mergeable_bytes,
                    (true, false) => (vm.advised_bytes + some).min(vm.mergeable_bytes),
                };
            }
            Action::Balloon { vm, bytes } => {
                let balloon = self
                    .sample
                    .vms
                    .get_mut(vm)
                    .unwrap()
                    .balloon
                    .as_mut()
                    .unwrap();
                let guest = balloon.guest.as_mut().unwrap();
                guest.available_bytes =
                    (guest.available_bytes + balloon.actual_bytes).saturating_sub(*bytes);
                let host = &mut self.sample.host.available_bytes;
                *host = *host + bytes - balloon.actual_bytes.min(*host + bytes);
                balloon.target_bytes = *bytes;
                balloon.actual_bytes = *bytes;
            }
            Action::Reclaim { bytes, .. } => {
                self.sample.host.available_bytes += bytes;
                self.sample.host.swap_free_bytes -= bytes;
            }
        }
    }
}
