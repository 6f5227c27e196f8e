//! Network cards: frames a second from guest to tap and from tap to guest, against plain reads and
//! writes on a tap.
//!
//! ```text
//!  to the tap:    CPU 0: testpmd txonly ─ virtio-user ─▶ rings ─▶ CPU 1: daemon ─ write ─▶ tap ─▶ nobody
//!  from the tap:  CPU 0: testpmd io ◀─ virtio-user ─ rings ◀─ CPU 1: daemon ◀─ read ─ tap ◀─┐
//!                            └──────────────── AF_PACKET on the tap ────────────────────────┘
//! ```
//!
//! From the tap a fixed number of frames goes round, so that the sender cannot run ahead of the
//! reader. All of it is in a network namespace of its own, which goes with the last process in it; the scenario's
//! thread is moved there for good.
//! What is counted is what the kernel counts on the tap.

mod cells;
mod circle;
mod limit;
mod measure;
mod subject;
mod tap;
mod testpmd;

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::setup::Setup;
use crate::awake::Awake;
use crate::context::Context;
use crate::scenario::{self, Better, Cell, Entry, Metric, Need, Sample, Scenario};
use crate::sys;
use subject::Subject;

/// See the module.
pub const ENTRY: Entry = Entry {
    name: "net",
    about: "frames each way between a guest's driver and a tap, against plain reads and writes on the tap",
    needs: &[
        Need::Root,
        Need::Tool {
            program: testpmd::PROGRAM,
            how: testpmd::HOW,
        },
    ],
    metrics: &[
        Metric::new(
            "rate",
            "1/s",
            Better::More,
            "frames a second, as the kernel counts them on the tap",
        ),
        Metric::new(
            "cpu",
            "µs",
            Better::Less,
            "CPU time of the daemon per frame",
        ),
        Metric::new(
            "calls",
            "per frame",
            Better::Less,
            "system calls of the daemon",
        ),
    ],
    cells: cells::all,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 40 } else { 4 * 60 }),
};

struct Net {
    setup: Setup,
    subjects: Vec<Subject>,
    _awake: Awake,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let subjects = subject::all(context)?;
    let setup = Setup::of(context);
    // Before the first thread: all that follow, and all children, are in it.
    sys::own_network().context("cannot make a network namespace (as root)")?;
    let awake = Awake::keep(&[setup.client_cpu, setup.daemon_cpu], context.awake)?;
    Ok(Box::new(Net {
        setup,
        subjects,
        _awake: awake,
    }))
}

impl Scenario for Net {
    fn subjects(&self) -> Vec<scenario::Subject> {
        self.subjects
            .iter()
            .map(|subject| subject.who.clone())
            .collect()
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _: u32) -> Result<Sample> {
        let cell = cells::find(&cell.name).context("a cell of somebody else")?;
        measure::run(&self.setup, &cell, &self.subjects[subject])
    }

    fn count(&mut self, cell: &Cell, subject: usize) -> Result<Option<Sample>> {
        if !self.setup.count {
            return Ok(None);
        }
        let cell = cells::find(&cell.name).context("a cell of somebody else")?;
        measure::count(&self.setup, &cell, &self.subjects[subject]).map(Some)
    }
}
