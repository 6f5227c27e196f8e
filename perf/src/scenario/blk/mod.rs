//! Disks: `berth-blk`, its peers, and the device with no virtio between.
//!
//! ```text
//!  CPU 0: client thread ─ target/virtio ─▶ socket, rings, eventfds ─▶ CPU 1: daemon ─▶ disk
//!                                                                     CPU 1: target/uring … ─▶ disk   (limit)
//!  both: kept awake
//! ```
pub mod backing;
pub mod cells;
pub mod fio;
pub mod idle;
pub mod measure;
pub mod subject;
pub mod target;

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::setup::Setup;
use crate::awake::Awake;
use crate::context::Context;
use crate::scenario::{self, Better, Cell, Entry, Metric, Sample, Scenario};
use backing::{Backing, Disk};
use subject::Subject;

/// See the module.
pub const ENTRY: Entry = Entry {
    name: "blk",
    about: "disk requests through the real vhost-user frontend on the host, against the device itself",
    // As root for zram; cells on a file do without.
    needs: &[],
    metrics: METRICS,
    cells: cells::all,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 100 } else { 40 * 60 }),
};

const METRICS: &[Metric] = &[
    Metric::new("rate", "1/s", Better::More, "requests a second"),
    Metric::new(
        "p50",
        "µs",
        Better::Less,
        "latency as the client sees it, median",
    ),
    Metric::new("p99", "µs", Better::Less, "latency, 99th percentile"),
    Metric::new("p999", "µs", Better::Less, "latency, 99.9th percentile"),
    Metric::new(
        "cpu",
        "µs",
        Better::Less,
        "CPU time of the daemon per request, its kernel workers included",
    ),
    Metric::new(
        "calls",
        "per request",
        Better::Less,
        "system calls of the daemon",
    ),
    Metric::new(
        "hands",
        "per request",
        Better::Neither,
        "io_uring requests that the kernel handed to a worker thread",
    ),
    Metric::new(
        "idle_cpu",
        "ms",
        Better::Less,
        "CPU time of an idle daemon in five seconds",
    ),
    Metric::new(
        "idle_private",
        "KiB",
        Better::Less,
        "private memory of an idle daemon without the guest's",
    ),
];

struct Blk {
    setup: Setup,
    disks: Vec<Disk>,
    subjects: Vec<Subject>,
    _awake: Awake,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let subjects = subject::all(context)?;
    let setup = Setup::of(context);
    let disks = disks(context)?;
    let awake = Awake::keep(&[setup.client_cpu, setup.daemon_cpu], context.awake)?;
    Ok(Box::new(Blk {
        setup,
        disks,
        subjects,
        _awake: awake,
    }))
}

/// The disks that the chosen cells need.
fn disks(context: &mut Context) -> Result<Vec<Disk>> {
    let chosen: Vec<Backing> = context
        .cells
        .iter()
        .filter_map(|cell| Some(cells::find(&cell.name)?.backing))
        .collect();
    let mut disks = Vec::new();
    if chosen.contains(&Backing::Zram) {
        disks.push(backing::make_zram(
            context.zram_mib << 20,
            &mut context.janitor,
        )?);
    }
    if chosen.contains(&Backing::File) || chosen.contains(&Backing::Cache) {
        let file = backing::make_file(&context.directory, context.file_mib << 20)?;
        if chosen.contains(&Backing::Cache) {
            disks.push(backing::cached(&file)?);
        }
        disks.push(file);
    }
    Ok(disks)
}

impl Blk {
    fn disk(&self, backing: Backing) -> Result<&Disk> {
        let disk = self.disks.iter().find(|disk| disk.backing == backing);
        disk.context("a cell without its disk")
    }
}

impl Scenario for Blk {
    fn subjects(&self) -> Vec<scenario::Subject> {
        self.subjects
            .iter()
            .map(|subject| subject.who.clone())
            .collect()
    }

    fn fits(&self, cell: &Cell, subject: usize) -> bool {
        let subject = &self.subjects[subject];
        match cells::find(&cell.name) {
            Some(cell) => subject.fits(cell.backing),
            None => subject.is_daemon() && subject.fits(Backing::File),
        }
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _: u32) -> Result<Sample> {
        let subject = &self.subjects[subject];
        let Some(cell) = cells::find(&cell.name) else {
            return idle::watch(subject, self.setup.daemon_cpu, &self.setup.directory);
        };
        let disk = self.disk(cell.backing)?;
        measure::prepared(&cell, disk, || {
            measure::run(&self.setup, &cell, disk, subject)
        })
    }

    fn count(&mut self, cell: &Cell, subject: usize) -> Result<Option<Sample>> {
        let subject = &self.subjects[subject];
        let cell = cells::find(&cell.name);
        let Some(cell) = cell.filter(|_| self.setup.counts(subject)) else {
            return Ok(None);
        };
        let disk = self.disk(cell.backing)?;
        let count = || measure::count(&self.setup, &cell, disk, subject);
        measure::prepared(&cell, disk, count).map(Some)
    }
}
