//! Memory that guests share: what `berth-tuner` finds, how fast and at which price, against what else has the kernel merge.
//!
//! ```text
//!   the lab: real guests in four states ── dumps ─▶ target/memory-dumps       once; made up for the short cell
//!   this host, its real KSM:
//!     holder × 9 (a process each, memory of a guest) ◀─ API socket ── berth-tuner
//!        ▲ states, by a plan: starts, settles, half upgrade, a new one, tight       │
//!        └─ the scenario ── looks 5 times a second ─▶ saved, CPU, copies     /sys/kernel/mm/ksm
//! ```
//!
//! | part | module |
//! |---|---|
//! | dumps of guests' memory: taken, made up, kept, read | [`dumps`] |
//! | a process that holds one guest's memory, works on it, and answers a tuner | [`holder`], `guests` |
//! | the plan of a host's life, and its course | `life` |
//! | who has the kernel merge | `merger` |
//! | the kernel's merging, ours alone for the time | `kernel` |
//! | what can merge, by hashes of pages | `can_merge` |
//! | figures | `figures` |
//! | memory that is less than what guests believe to have | `group` |

mod can_merge;
pub mod dumps;
mod figures;
mod group;
mod guests;
pub mod holder;
mod kernel;
mod life;
mod merger;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use self::can_merge::Maps;
use self::dumps::store::Reader;
use self::figures::Outcome;
use self::group::Group;
use self::guests::Place;
use self::kernel::Ksm;
use self::life::{Host, Pace, Plan, Story};
use self::merger::{KINDS, Kind, Merger};
use crate::context::Context;
use crate::scenario::{
    self, Better, Bound, Cell, Entry, Metric, Need, Of, Sample, Scenario, Subject,
};

/// See the module.
pub const ENTRY: Entry = Entry {
    name: "memory",
    about: "pages of guests merged on this host: berth-tuner against what else has the kernel merge",
    needs: &[Need::Root],
    metrics: METRICS,
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 80 } else { 26 * 60 }),
};

const METRICS: &[Metric] = &[
    more("saved", "MiB·s", "memory saved, times how long it was"),
    less(
        "cpu",
        "s",
        "CPU of scanner, tuner and the answers to it, in all",
    ),
    more("gain", "MiB·s/s", "memory saved for each second of CPU"),
    more(
        "found",
        "%",
        "of what could be saved at each moment, by the hashes of the dumps' pages",
    ),
    less(
        "t90",
        "s",
        "from the moment at which the first guests had settled until nine tenths of what can merge was",
    ),
    less("settled_cpu", "%", "of a core, once settled"),
    less(
        "cow",
        "pages",
        "merged pages that were copied when a guest wrote to them",
    ),
    more(
        "huge_kept",
        "%",
        "of the huge pages without any page that can merge, those still huge",
    ),
    less(
        "slower_burst",
        "%",
        "CPU time of a median burst of guests' work while guests start, more than with nobody",
    ),
    less("slower_settled", "%", "the same once settled"),
    less(
        "p99",
        "us",
        "latency of guests' memory accesses once settled, 99 of 100",
    ),
    less(
        "psi",
        "%",
        "of ten seconds in which a guest waited for memory, at the end",
    ),
];

const fn more(name: &'static str, unit: &'static str, about: &'static str) -> Metric {
    Metric::new(name, unit, Better::More, about)
}

const fn less(name: &'static str, unit: &'static str, about: &'static str) -> Metric {
    Metric::new(name, unit, Better::Less, about)
}

const LIFE: &str = "life";
const SHORT: &str = "short";
const TIGHT: &str = "overcommit";
/// Guests' memory for each part of the memory that there is.
const OVERCOMMIT: f64 = 1.5;
/// Of a set of dumps: guests, and MiB of each.
const TAKEN: (u64, u64) = (9, 512);
/// The same of memory that is made up.
const MADE: (u64, u64) = (4, 64);
/// Time for nine tenths, with 8 GiB of guests.
const T90_S: f64 = 60.0;

fn cells() -> Vec<Cell> {
    let goals = |cell: Cell| {
        cell.goal("saved", Of::BestPeer, Bound::AtLeast(1.0))
            .goal("gain", Of::BestPeer, Bound::AtLeast(1.0))
            .goal("settled_cpu", Of::Itself, Bound::AtMost(1.0))
            .goal("huge_kept", Of::Itself, Bound::AtLeast(80.0))
            .goal("slower_burst", Of::Itself, Bound::AtMost(5.0))
            .goal("slower_settled", Of::Itself, Bound::AtMost(2.0))
    };
    let scaled = T90_S * ((TAKEN.0 - 1) * TAKEN.1) as f64 / 8192.0;
    vec![
        Cell::new(SHORT, "4 guests of 64 MiB, made up, in a short life")
            .quick()
            .rounds(1, 1),
        goals(
            Cell::new(
                LIFE,
                "9 guests of 512 MiB: start, settle, upgrade, a new one, tight",
            )
            .rounds(1, 1)
            .goal("t90", Of::Itself, Bound::AtMost(scaled)),
        ),
        Cell::new(TIGHT, "the same guests with memory for two thirds of them")
            .rounds(1, 1)
            .goal("psi", Of::Itself, Bound::AtMost(1.0)),
    ]
}

/// One who takes part.
struct Who {
    subject: Subject,
    kind: Kind,
    program: Option<PathBuf>,
}

/// Dumps and what is known of them.
struct Memory {
    reader: Reader,
    maps: Maps,
    place: Place,
}

struct Scene {
    who: Vec<Who>,
    ksm: Ksm,
    /// By the cell's name.
    memory: BTreeMap<&'static str, Memory>,
    folder: PathBuf,
    /// What guests do with nobody merging, by cell: what slows them is measured against this.
    alone: BTreeMap<String, Outcome>,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let mut who = Vec::new();
    for kind in KINDS {
        let subject = match kind {
            Kind::None => Subject::limit(kind.name()),
            Kind::Tuner => continue,
            _ => Subject::peer(kind.name()),
        };
        who.push(Who {
            subject,
            kind,
            program: None,
        });
    }
    who.extend(context.ours("berth-tuner")?.into_iter().map(|ours| Who {
        subject: ours.subject,
        kind: Kind::Tuner,
        program: Some(ours.program),
    }));
    let folder = context.folder("memory")?;
    let mut memory = BTreeMap::new();
    if context.wants(SHORT) {
        let dumps = folder.join("made");
        dumps::made::make(&dumps, MADE.0, MADE.1)?;
        memory.insert(SHORT, Memory::new(dumps, folder.join("short"))?);
    }
    if context.wants(LIFE) || context.wants(TIGHT) {
        let dumps = dumps::obtain(context, TAKEN.0, TAKEN.1)?;
        let taken = Memory::new(dumps, folder.join("life"))?;
        taken.reader.read_ahead()?;
        memory.insert(LIFE, taken);
    }
    if context.wants(TIGHT) {
        for folder in Group::find()?.folders() {
            context.janitor.cgroup(&folder)?;
        }
    }
    let ksm = Ksm::take(&mut context.janitor)?;
    Ok(Box::new(Scene {
        who,
        ksm,
        memory,
        folder,
        alone: BTreeMap::new(),
    }))
}

impl Memory {
    fn new(dumps: PathBuf, folder: PathBuf) -> Result<Self> {
        let sockets = folder.join("sockets");
        fs::create_dir_all(&sockets)?;
        let reader = Reader::open(&dumps)?;
        let maps = Maps::read(&reader)?;
        let own = folder.join("own");
        maps.write_own(&reader, &own)?;
        let place = Place {
            dumps,
            own,
            sockets,
        };
        Ok(Self {
            reader,
            maps,
            place,
        })
    }

    fn names(&self) -> Vec<String> {
        let guests = self.reader.set.guests.iter();
        guests.map(|guest| guest.name.clone()).collect()
    }
}

/// How long the parts of a life are.
fn pace(cell: &str) -> Pace {
    match cell {
        SHORT => Pace {
            gap: 0.5,
            boot: 0.5,
            load: 0.5,
            burst: 4.0,
            settled: 2.0,
            later: 1.0,
        },
        _ => Pace {
            gap: 1.5,
            boot: 2.0,
            load: 5.0,
            burst: 32.0,
            settled: 16.0,
            later: 16.0,
        },
    }
}

impl Scenario for Scene {
    fn subjects(&self) -> Vec<scenario::Subject> {
        self.who.iter().map(|who| who.subject.clone()).collect()
    }

    fn fits(&self, cell: &Cell, subject: usize) -> bool {
        match cell.name.as_str() {
            // The others differ from these in what a short life does not show.
            SHORT => matches!(
                self.who[subject].kind,
                Kind::None | Kind::Constant | Kind::Tuner
            ),
            // Without merging guests do not fit, and that need not be shown.
            TIGHT => self.who[subject].kind != Kind::None,
            _ => true,
        }
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        let who = &self.who[subject];
        let memory = match cell.name.as_str() {
            SHORT => &self.memory[SHORT],
            _ => &self.memory[LIFE],
        };
        kernel::wait_for_others()?;
        let logs = self
            .folder
            .join(format!("{}-{}", cell.name, who.subject.name));
        fs::create_dir_all(&logs)?;
        let plan = Plan::life(&memory.names(), pace(&cell.name));
        let group = match cell.name == TIGHT {
            true => {
                let guests = memory.names().len() as u64 * memory.reader.set.bytes;
                Some(Group::new((guests as f64 / OVERCOMMIT) as u64)?)
            }
            false => None,
        };
        let lived = live(&self.ksm, memory, who, &plan, (&logs, group.as_ref()));
        let (story, psi) = match lived {
            Ok(lived) => lived,
            Err(error) => {
                let tuner = fs::read_to_string(logs.join("tuner.log")).unwrap_or_default();
                let last: Vec<&str> = tuner.lines().rev().take(5).collect();
                for line in last.iter().rev() {
                    eprintln!("{line}");
                }
                return Err(error);
            }
        };
        let outcome = figures::of(&plan, &story, &memory.maps);
        ensure!(
            outcome.end_can_mib > 0.0,
            "nothing of these guests can merge"
        );
        let sample = sample(&outcome, &story, self.alone.get(&cell.name), psi);
        let sample = match kernel::other()? {
            Some(other) => sample.note(format!("{other} and was measured along")),
            None => sample,
        };
        if who.kind == Kind::None {
            self.alone.insert(cell.name.clone(), outcome);
        }
        Ok(sample.note(memory.reader.set.from.clone()))
    }
}

/// One life with one merger; with a group, also how long its tasks waited for memory at the end, in percent.
fn live(
    ksm: &Ksm,
    memory: &Memory,
    who: &Who,
    plan: &Plan,
    (logs, group): (&std::path::Path, Option<&Group>),
) -> Result<(Story, Option<f64>)> {
    let place = &memory.place;
    // Sockets of the life before.
    fs::remove_dir_all(&place.sockets)?;
    fs::create_dir_all(&place.sockets)?;
    ksm.reset()?;
    let mut merger = Merger::start(who.kind, who.program.as_deref(), place, logs)?;
    let mut host = Host {
        ksm,
        maps: &memory.maps,
        place,
        groups: group.map(Group::folders).unwrap_or_default(),
        offers_all: who.kind.offers_all(),
        holders: Vec::new(),
        states: Vec::new(),
    };
    let story = host.run(plan, &mut merger);
    let psi = group.map(Group::waiting).transpose();
    let killed = group.map(Group::killed).transpose();
    merger.end()?;
    drop(host);
    match killed? {
        Some(killed) if killed > 0 => bail!("memory was not enough: {killed} guests were killed"),
        _ => Ok((story?, psi?)),
    }
}

fn sample(outcome: &Outcome, story: &Story, alone: Option<&Outcome>, psi: Option<f64>) -> Sample {
    let timeline = |of: fn(&life::Seen) -> f64| -> Vec<[f64; 2]> {
        story
            .seen
            .iter()
            .step_by(5)
            .map(|seen| [seen.at_s, of(seen)])
            .collect()
    };
    let mut sample = Sample::new()
        .figure("saved", outcome.saved_mib_s)
        .figure("cpu", outcome.cpu_s)
        .figure("found", outcome.found_pct)
        .figure("settled_cpu", outcome.settled_cpu_pct)
        .figure("cow", outcome.cow)
        .figure("p99", outcome.p99_us[1])
        .timeline("saved MiB", timeline(|seen| seen.saved as f64 / 256.0))
        .timeline(
            "could be saved MiB",
            timeline(|seen| seen.can as f64 / 256.0),
        )
        .timeline("CPU s", timeline(|seen| seen.cpu_s));
    if outcome.cpu_s > 0.01 {
        sample = sample.figure("gain", outcome.saved_mib_s / outcome.cpu_s);
    }
    sample = match outcome.t90_s {
        Some(t90) => sample.figure("t90", t90),
        None => sample.note("never nine tenths before the upgrade"),
    };
    if let Some(kept) = outcome.huge_kept_pct {
        sample = sample.figure("huge_kept", kept);
    }
    if let Some(psi) = psi {
        sample = sample.figure("psi", psi);
    }
    let slower =
        |at: usize, alone: &Outcome| 100.0 * (outcome.work_us[at] / alone.work_us[at] - 1.0);
    if let Some(alone) = alone {
        sample = sample
            .figure("slower_burst", slower(0, alone))
            .figure("slower_settled", slower(1, alone));
    }
    sample.note(format!(
        "at the end {:.0} of {:.0} MiB saved; {:.2} s of CPU outside of the scanner; {} huge pages have nothing that can merge",
        outcome.end_mib, outcome.end_can_mib, outcome.own_cpu_s, outcome.huge_apart
    ))
}
