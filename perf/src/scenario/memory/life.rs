//! The life of a host: guests start, settle, half of them upgrade, a new one comes, memory gets tight.
//!
//! ```text
//!   t     0 ····· starts ·····│      settle       │  upgrade    │ newcomer  │   tight    │
//!   guest 0  boot  settled    │                   │  upgraded   │           │            │
//!   guest 1     boot  settled │                   │             │           │  tight     │
//!   …                         │                   │  (even)     │           │  (odd)     │
//!   guest n                   │                   │             │ boot …    │            │
//! ```
//!
//! A plan is a list of events by time; [`Host::run`] follows it with one merger and notes what comes of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::can_merge::Maps;
use super::guests::{Holder, Place};
use super::holder::Figures;
use super::kernel::{Counters, Ksm};
use super::merger::Merger;
use crate::interrupt;

/// Between two looks.
const STEP: Duration = Duration::from_millis(200);

/// What happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// A guest starts: its holder, and the memory of its boot within so many milliseconds.
    Start(String, u64),
    /// A guest's memory becomes that of a state within so many milliseconds.
    Load(String, &'static str, u64),
    /// The guests' figures are taken: what they were since the last mark is of this name.
    Mark(&'static str),
}

/// Seconds and events, in order.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) events: Vec<(f64, Event)>,
    /// Seconds at which it is over.
    pub(super) end_s: f64,
    /// When the last of the first guests has started.
    pub(super) started_s: f64,
}

/// How long the parts of a life are, in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Between two starts.
    pub(super) gap: f64,
    /// From a guest's start until it begins to settle, and until it has.
    pub(super) boot: f64,
    /// How long it takes to settle.
    pub(super) load: f64,
    /// From the last start to the first mark.
    pub(super) burst: f64,
    /// From there to the upgrade.
    pub(super) settled: f64,
    /// Of the upgrade, the newcomer and the tight part, each.
    pub(super) later: f64,
}

/// Marks.
pub(super) const BURST: &str = "burst";
/// The same.
pub(super) const SETTLED: &str = "settled";
/// The same.
pub(super) const END: &str = "end";

impl Plan {
    /// The life of a host with these guests; the last one comes late.
    pub(super) fn life(guests: &[String], pace: Pace) -> Self {
        let ms = |seconds: f64| (1000.0 * seconds) as u64;
        let mut events = Vec::new();
        let start = |events: &mut Vec<_>, at: f64, name: &String| {
            events.push((at, Event::Start(name.clone(), ms(0.5 * pace.boot))));
            let load = Event::Load(name.clone(), "settled", ms(pace.load));
            events.push((at + pace.boot, load));
        };
        let (first, late) = guests.split_at(guests.len() - 1);
        let mut at = 0.0;
        for name in first {
            start(&mut events, at, name);
            at += pace.gap;
        }
        let started_s = at - pace.gap;
        events.push((started_s + pace.burst, Event::Mark(BURST)));
        let upgrade = started_s + pace.burst + pace.settled;
        events.push((upgrade, Event::Mark(SETTLED)));
        for name in first.iter().step_by(2) {
            let load = Event::Load(name.clone(), "upgraded", ms(pace.load));
            events.push((upgrade, load));
        }
        for name in late {
            start(&mut events, upgrade + pace.later, name);
        }
        let tight = upgrade + 2.0 * pace.later;
        for name in first.iter().skip(1).step_by(2) {
            let load = Event::Load(name.clone(), "tight", ms(pace.load));
            events.push((tight, load));
        }
        let end_s = tight + pace.later;
        events.push((end_s, Event::Mark(END)));
        events.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self {
            events,
            end_s,
            started_s,
        }
    }
}

/// One look.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// Seconds since the begin.
    pub(super) at_s: f64,
    /// Pages saved, by the kernel's count.
    pub(super) saved: u64,
    /// Pages that can be saved, by the dumps.
    pub(super) can: u64,
    /// CPU seconds of scanner, merger and holders' APIs.
    pub(super) cpu_s: f64,
    /// Of that, without the scanner.
    pub(super) own_cpu_s: f64,
    /// Merged pages that were copied.
    pub(super) cow: u64,
    /// No guest is loading.
    pub(super) still: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Story {
    pub(super) seen: Vec<Seen>,
    /// Figures of each guest by mark.
    pub(super) marks: BTreeMap<&'static str, BTreeMap<String, Figures>>,
    /// States of the guests at each mark.
    pub(super) states: BTreeMap<&'static str, Vec<(String, String)>>,
}

/// A host that is alive.
pub(super) struct Host<'a> {
    pub(super) ksm: &'a Ksm,
    pub(super) maps: &'a Maps,
    pub(super) place: &'a Place,
    /// Control groups for the holders.
    pub(super) groups: Vec<PathBuf>,
    /// Whether a guest's memory is advised as soon as it starts.
    pub(super) offers_all: bool,
    pub(super) holders: Vec<Holder>,
    pub(super) states: Vec<(String, String)>,
}

impl Host<'_> {
    /// Follows a plan.
    pub(super) fn run(&mut self, plan: &Plan, merger: &mut Merger) -> Result<Story> {
        let began = Instant::now();
        let first = self.ksm.counters()?;
        let mut story = Story::default();
        let mut events = plan.events.iter().peekable();
        let (mut can, mut api) = (0, BTreeMap::new());
        loop {
            let at_s = began.elapsed().as_secs_f64();
            let now = self.ksm.counters()?;
            merger.step(at_s, &now)?;
            while let Some((_, event)) = events.next_if(|(due, _)| *due <= at_s) {
                self.happen(event, merger, &now, &mut story)?;
                can = self.maps.pages(&self.states);
            }
            let mut still = true;
            for holder in &mut self.holders {
                still &= holder.poll()?;
                api.insert(holder.name.clone(), holder.api_cpu());
            }
            let own = merger.cpu() + api.values().sum::<Duration>();
            let cpu = now.cpu.saturating_sub(first.cpu) + own;
            story.seen.push(Seen {
                at_s,
                saved: now.saved,
                can,
                cpu_s: cpu.as_secs_f64(),
                own_cpu_s: own.as_secs_f64(),
                cow: now.cow - first.cow,
                still,
            });
            if events.peek().is_none() {
                return Ok(story);
            }
            interrupt::sleep(STEP)?;
        }
    }

    fn happen(
        &mut self,
        event: &Event,
        merger: &mut Merger,
        now: &Counters,
        story: &mut Story,
    ) -> Result<()> {
        match event {
            Event::Start(name, ms) => {
                let mut holder = Holder::start(self.place, name, &self.groups)?;
                if self.offers_all {
                    holder.tell("offer")?;
                }
                holder.tell(&format!("load boot {ms}"))?;
                self.holders.push(holder);
                self.states.push((name.clone(), "boot".to_owned()));
                merger.guest_started(now)
            }
            Event::Load(name, state, ms) => {
                let at = self.holders.iter().position(|holder| holder.name == *name);
                let at = at.with_context(|| format!("{name} has not started"))?;
                self.holders[at].tell(&format!("load {state} {ms}"))?;
                self.states[at].1 = (*state).to_owned();
                Ok(())
            }
            Event::Mark(mark) => {
                let mut of = BTreeMap::new();
                for holder in &mut self.holders {
                    of.insert(holder.name.clone(), holder.figures()?);
                }
                story.marks.insert(mark, of);
                story.states.insert(mark, self.states.clone());
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_has_all_its_parts_in_order() {
        let guests: Vec<String> = (0..5).map(|n| format!("g{n}")).collect();
        let pace = Pace {
            gap: 1.0,
            boot: 2.0,
            load: 3.0,
            burst: 20.0,
            settled: 10.0,
            later: 15.0,
        };
        let plan = Plan::life(&guests, pace);
        assert!(plan.events.is_sorted_by(|a, b| a.0 <= b.0));
        assert_eq!((plan.started_s, plan.end_s), (3.0, 78.0));
        let at = |wanted: &Event| plan.events.iter().find(|(_, event)| event == wanted);
        let load = |name: &str, state| Event::Load(name.to_owned(), state, 3000);
        assert_eq!(at(&load("g0", "upgraded")).unwrap().0, 33.0);
        assert!(at(&load("g1", "upgraded")).is_none());
        assert_eq!(at(&load("g3", "tight")).unwrap().0, 63.0);
        assert_eq!(at(&Event::Start("g4".to_owned(), 1000)).unwrap().0, 48.0);
        assert_eq!(plan.events.last().unwrap().1, Event::Mark(END));
    }
}
