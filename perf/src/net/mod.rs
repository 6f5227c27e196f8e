//! The net table: frames a second from guest to tap and from tap to guest, against plain reads and
//! writes on a tap.
//!
//! ```text
//!  to the tap:    CPU 0: testpmd txonly ─ virtio-user ─▶ rings ─▶ CPU 1: daemon ─ write ─▶ tap ─▶ nobody
//!  from the tap:  CPU 0: testpmd io ◀─ virtio-user ─ rings ◀─ CPU 1: daemon ◀─ read ─ tap ◀─┐
//!                            └──────────────── AF_PACKET on the tap ────────────────────────┘
//! ```
//!
//! From the tap a fixed number of frames goes round, so that the sender cannot run ahead of the
//! reader. All of it is in a network namespace of its own, which goes with the last process in it.
//! What is counted is what the kernel counts on the tap.

mod cells;
mod circle;
mod limit;
mod measure;
mod subject;
mod tap;
mod testpmd;

use std::fs;

use anyhow::{Context, Result};

use crate::args::NetArgs;
use crate::awake::Awake;
use crate::blk;
use crate::janitor::Janitor;
use crate::progress::Progress;
use crate::report;
use crate::rounds::CellResult;
use crate::sys;

/// Measures, prints, and clears up.
pub fn run(args: &NetArgs) -> Result<()> {
    let common = &args.common;
    let cells = cells::select(&common.cell)?;
    let (subjects, absent) = subject::all(args)?;
    let (subjects, limit) = subject::select(subjects, common)?;
    for line in &absent {
        eprintln!("absent: {line}");
    }
    if common.list {
        for cell in &cells {
            println!("{:<16} {}", cell.name(), cell.title());
        }
        for subject in &subjects {
            println!("subject {}", subject.name);
        }
        return Ok(());
    }
    testpmd::find()?;
    let mut janitor = Janitor::start()?;
    let measured = measure_all(args, &cells, &subjects, &limit, &mut janitor);
    janitor.finish()?;
    let results = measured?;
    print!("{}{}", report::details(&results), report::summary(&results));
    if let Some(path) = &common.json {
        let json = report::as_json(&results, &[], &blk::host(common.awake), &absent);
        fs::write(path, format!("{json:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    report::failures(&results)
}

fn measure_all(
    args: &NetArgs,
    cells: &[cells::Cell],
    subjects: &[subject::Subject],
    limit: &str,
    janitor: &mut Janitor,
) -> Result<Vec<CellResult>> {
    let common = &args.common;
    let setup = measure::Setup {
        client_cpu: common.client_cpu,
        daemon_cpu: common.daemon_cpu,
        window: common.window(),
        rounds: common.rounds,
        limit: limit.to_owned(),
        count: common.counts(),
        directory: common.make_directory(janitor)?,
    };
    // Before the first thread: all that follow, and all children, are in it.
    sys::own_network().context("cannot make a network namespace (as root)")?;
    let awake = Awake::keep(&[common.client_cpu, common.daemon_cpu], common.awake)?;
    eprintln!("awake: {}", awake.describe());
    let each = common.rounds as usize + usize::from(setup.count);
    let mut progress = Progress::new(cells.len() * subjects.len() * each);
    let results = cells
        .iter()
        .map(|cell| measure::cell(&setup, cell, subjects, &mut progress))
        .collect();
    progress.finish();
    Ok(results)
}
