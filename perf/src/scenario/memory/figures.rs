//! What a life comes to, in numbers.

use super::can_merge::Maps;
use super::life::{BURST, Plan, SETTLED, Seen, Story};

/// MiB of a page.
const PAGE_MIB: f64 = 1.0 / 256.0;

/// Of one merger.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// MiB saved, times the seconds for which they were.
    pub(super) saved_mib_s: f64,
    /// Of what could be saved at each moment, in percent.
    pub(super) found_pct: f64,
    /// CPU seconds of scanner and merger.
    pub(super) cpu_s: f64,
    /// Of that, without the scanner.
    pub(super) own_cpu_s: f64,
    /// Seconds from the moment at which the first guests had settled until nine tenths of what can merge were.
    pub(super) t90_s: Option<f64>,
    /// CPU once settled, in percent of a core.
    pub(super) settled_cpu_pct: f64,
    /// Merged pages that were copied.
    pub(super) cow: f64,
    /// Of huge pages in which nothing can merge, those that are still huge, in percent.
    pub(super) huge_kept_pct: Option<f64>,
    /// How many such huge pages there are.
    pub(super) huge_apart: u64,
    /// CPU time of a median burst of work, while guests start and once settled, in microseconds.
    pub(super) work_us: [f64; 2],
    /// Access latency, 99 of 100, mean of the guests: the same two.
    pub(super) p99_us: [f64; 2],
    /// Saved at the end.
    pub(super) end_mib: f64,
    /// Could be saved at the end.
    pub(super) end_can_mib: f64,
}

/// Reads a story.
pub(super) fn of(plan: &Plan, story: &Story, maps: &Maps) -> Outcome {
    let seen = &story.seen;
    let last = seen.last().copied().unwrap_or_default();
    let integral = |of: fn(&Seen) -> f64| -> f64 {
        let pairs = seen.windows(2);
        pairs
            .map(|pair| 0.5 * (of(&pair[0]) + of(&pair[1])) * (pair[1].at_s - pair[0].at_s))
            .sum()
    };
    let saved_mib_s = integral(|seen| seen.saved as f64) * PAGE_MIB;
    let can_mib_s = integral(|seen| seen.can as f64) * PAGE_MIB;
    let (from, to) = settled(plan);
    let (huge_kept_pct, huge_apart) = huge(story, maps);
    Outcome {
        saved_mib_s,
        found_pct: 100.0 * saved_mib_s / can_mib_s.max(1.0),
        cpu_s: last.cpu_s,
        own_cpu_s: last.own_cpu_s,
        t90_s: t90(plan, seen),
        settled_cpu_pct: 100.0 * (cpu_at(seen, to) - cpu_at(seen, from)) / (to - from),
        cow: last.cow as f64,
        huge_kept_pct,
        huge_apart,
        work_us: [BURST, SETTLED].map(|mark| mean(story, mark, |of| of.median_ns as f64 / 1000.0)),
        p99_us: [BURST, SETTLED].map(|mark| mean(story, mark, |of| of.p99_us)),
        end_mib: last.saved as f64 * PAGE_MIB,
        end_can_mib: last.can as f64 * PAGE_MIB,
    }
}

/// From the mark after the burst to the upgrade.
fn settled(plan: &Plan) -> (f64, f64) {
    let at = |wanted| {
        let mut events = plan.events.iter();
        events.find_map(|(at, event)| (*event == super::life::Event::Mark(wanted)).then_some(*at))
    };
    (at(BURST).unwrap_or(0.0), at(SETTLED).unwrap_or(plan.end_s))
}

fn cpu_at(seen: &[Seen], at_s: f64) -> f64 {
    let found = seen.iter().find(|seen| seen.at_s >= at_s).or(seen.last());
    found.map_or(0.0, |seen| seen.cpu_s)
}

/// Counted from the moment after the last start at which no guest loads any more.
fn t90(plan: &Plan, seen: &[Seen]) -> Option<f64> {
    let (_, upgrade) = settled(plan);
    let mut quiet = None;
    for look in seen
        .iter()
        .filter(|look| look.at_s > plan.started_s && look.at_s < upgrade)
    {
        if !look.still {
            quiet = None;
            continue;
        }
        let since = *quiet.get_or_insert(look.at_s);
        // Between boot and settling a guest is still for a while, with less to merge: the last stretch counts.
        if look.saved * 10 >= look.can * 9 && settles_no_more(seen, look, upgrade) {
            return Some(look.at_s - since);
        }
    }
    None
}

fn settles_no_more(seen: &[Seen], now: &Seen, upgrade: f64) -> bool {
    let mut later = seen
        .iter()
        .filter(|look| look.at_s > now.at_s && look.at_s < upgrade);
    later.all(|look| look.still)
}

/// Huge pages without any page that has an equal, once settled.
fn huge(story: &Story, maps: &Maps) -> (Option<f64>, u64) {
    let (Some(states), Some(figures)) = (story.states.get(SETTLED), story.marks.get(SETTLED))
    else {
        return (None, 0);
    };
    let (mut apart, mut kept, mut known) = (0, 0, true);
    for ((name, _), wanted) in states.iter().zip(maps.apart(states, 0)) {
        let huge = figures.get(name).map_or(&[][..], |of| &of.huge);
        known &= huge.len() >= wanted.len();
        apart += wanted.iter().filter(|apart| **apart).count();
        let both = wanted
            .iter()
            .zip(huge)
            .filter(|(apart, huge)| **apart && **huge);
        kept += both.count();
    }
    let part = (known && apart > 0).then(|| 100.0 * kept as f64 / apart as f64);
    (part, apart as u64)
}

fn mean(story: &Story, mark: &str, of: impl Fn(&super::holder::Work) -> f64) -> f64 {
    let Some(figures) = story.marks.get(mark) else {
        return 0.0;
    };
    let working: Vec<f64> = figures
        .values()
        .filter(|figures| figures.work.bursts > 0)
        .map(|figures| of(&figures.work))
        .collect();
    working.iter().sum::<f64>() / working.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::life::{END, Event};
    use super::*;

    fn plan() -> Plan {
        let marks = [(6.0, BURST), (8.0, SETTLED), (10.0, END)];
        Plan {
            events: marks.map(|(at, mark)| (at, Event::Mark(mark))).to_vec(),
            end_s: 10.0,
            started_s: 2.0,
        }
    }

    /// A look a second; the last guest starts at 2 s and loads until 4 s; a tenth is saved each second.
    fn seen() -> Vec<Seen> {
        let at = |s: u64| Seen {
            at_s: s as f64,
            saved: 256 * s.min(7) * 10,
            can: 256 * 70,
            cpu_s: 0.5 * s.min(6) as f64,
            cow: s,
            still: s >= 4 || s == 1,
            ..Seen::default()
        };
        (0..=10).map(at).collect()
    }

    #[test]
    fn a_life_in_numbers() {
        let folder =
            std::env::temp_dir().join(format!("berth-perf-figures-{}", std::process::id()));
        crate::scenario::memory::dumps::made::make(&folder, 1, 2).unwrap();
        let reader = crate::scenario::memory::dumps::store::Reader::open(&folder).unwrap();
        let maps = Maps::read(&reader).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let story = Story {
            seen: seen(),
            ..Story::default()
        };
        let outcome = of(&plan(), &story, &maps);
        // A triangle up to 70 MiB at 7 s, and 3 s of 70 MiB.
        assert_eq!(outcome.saved_mib_s, 245.0 + 210.0);
        assert_eq!(outcome.cpu_s, 3.0);
        assert_eq!(outcome.settled_cpu_pct, 0.0);
        // Quiet from 4 s on, 63 of 70 MiB at 7 s.
        assert_eq!(outcome.t90_s, Some(3.0));
        assert_eq!((outcome.end_mib, outcome.end_can_mib), (70.0, 70.0));
        assert_eq!(outcome.huge_kept_pct, None);
    }

    #[test]
    fn what_never_comes_has_no_time() {
        let mut seen = seen();
        for look in &mut seen {
            look.can *= 2;
        }
        assert_eq!(t90(&plan(), &seen), None);
        // Nine tenths while a guest still loads do not count.
        let mut seen = self::seen();
        for look in &mut seen {
            look.saved = look.can;
        }
        assert_eq!(t90(&plan(), &seen), Some(0.0));
        seen.iter_mut().for_each(|look| look.still = false);
        assert_eq!(t90(&plan(), &seen), None);
    }
}
