//! The disk table: finds who is there, makes the disks, runs the cells, prints.
#![forbid(unsafe_code)]

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::args::BlkArgs;
use crate::awake::{Awake, How};
use crate::backing::{self, Backing, Disk};
use crate::cells::{self, Cell};
use crate::idle::{self, Idle};
use crate::janitor::Janitor;
use crate::measure::{self, Setup};
use crate::progress::Progress;
use crate::report;
use crate::rounds::CellResult;
use crate::subject::{self, Programs, Subject};

/// Measures, prints, and clears up.
pub fn run(args: &BlkArgs) -> Result<()> {
    let common = &args.common;
    let cells = cells::select(&common.cell, common.quick)?;
    let programs = Programs {
        berth: args.berth_blk.clone(),
        cloud_hypervisor: args.cloud_hypervisor.clone(),
    };
    let (subjects, absent) = subject::all(&programs, &common.variant)?;
    let mut wanted = common.subject.clone();
    if !wanted.is_empty() {
        wanted.extend(common.variant.iter().map(|variant| variant.name.clone()));
    }
    let (subjects, limit) = subject::select(subjects, &wanted, common.limit.as_deref())?;
    for line in &absent {
        eprintln!("absent: {line}");
    }
    if common.list {
        list(&cells, &subjects);
        return Ok(());
    }
    let mut janitor = Janitor::start()?;
    let measured = measure_all(args, &cells, &subjects, limit, &mut janitor);
    janitor.finish()?;
    let (results, idle) = measured?;
    print!(
        "{}{}{}{}",
        report::details(&results),
        report::summary(&results),
        against_loop(&results),
        report::idle_table(&idle)
    );
    if let Some(path) = &common.json {
        let json = report::as_json(&results, &idle, &host(common.awake), &absent);
        fs::write(path, format!("{json:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    report::failures(&results)
}

/// The summary once more as shares of our own loop, where that is stricter than the limit.
fn against_loop(results: &[CellResult]) -> String {
    let mut results = results.to_vec();
    results
        .retain(|result| result.limit != subject::LOOP && result.series(subject::LOOP).is_some());
    for result in &mut results {
        subject::LOOP.clone_into(&mut result.limit);
    }
    if results.is_empty() {
        return String::new();
    }
    format!(
        "\nThe same as shares of our own loop over io_uring:\n{}",
        report::summary(&results)
    )
}

fn list(cells: &[Cell], subjects: &[Subject]) {
    println!("cells:");
    for cell in cells {
        let quick = if cell.quick { "  (quick)" } else { "" };
        println!("  {:<28} {}{quick}", cell.name(), cell.title());
    }
    println!("subjects:");
    for subject in subjects {
        println!("  {}", subject.name);
    }
}

fn measure_all(
    args: &BlkArgs,
    cells: &[Cell],
    subjects: &[Subject],
    limit: String,
    janitor: &mut Janitor,
) -> Result<(Vec<CellResult>, Vec<Result<Idle>>)> {
    let common = &args.common;
    let setup = Setup {
        client_cpu: common.client_cpu,
        daemon_cpu: common.daemon_cpu,
        window: common.window(),
        rounds: common.rounds,
        limit,
        count: common.counts(),
        directory: common.make_directory(janitor)?,
    };
    let disks = disks(args, cells, &setup, janitor)?;
    let awake = Awake::keep(&[common.client_cpu, common.daemon_cpu], common.awake)?;
    eprintln!("awake: {}", awake.describe());
    let mut progress = Progress::new(
        cells
            .iter()
            .map(|cell| measure::steps(&setup, cell, subjects))
            .sum(),
    );
    let mut results = Vec::new();
    for cell in cells {
        let disk = disks.iter().find(|disk| disk.backing == cell.backing);
        let disk = disk.context("a cell without its disk")?;
        let result = measure::cell(&setup, cell, disk, subjects, &mut progress)?;
        results.push(result);
    }
    progress.finish();
    let idle = if args.no_idle || common.quick {
        Vec::new()
    } else {
        eprintln!("watching idle daemons for {} s", idle::WATCHED.as_secs());
        idle::watch(subjects, common.daemon_cpu, &setup.directory)?
    };
    Ok((results, idle))
}

/// The disks that the cells need.
fn disks(
    args: &BlkArgs,
    cells: &[Cell],
    setup: &Setup,
    janitor: &mut Janitor,
) -> Result<Vec<Disk>> {
    let needed = |backing| cells.iter().any(|cell| cell.backing == backing);
    let mut disks = Vec::new();
    if needed(Backing::Zram) {
        eprintln!("filling {} MiB of zram", args.zram_mib);
        disks.push(backing::make_zram(args.zram_mib << 20, janitor)?);
    }
    if needed(Backing::File) || needed(Backing::Cache) {
        eprintln!("writing a file of {} MiB", args.file_mib);
        let file = backing::make_file(&setup.directory, args.file_mib << 20)?;
        if needed(Backing::Cache) {
            disks.push(backing::cached(&file)?);
        }
        disks.push(file);
    }
    Ok(disks)
}

/// Where it was measured.
pub fn host(awake: How) -> Value {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model
        .unwrap_or_default()
        .trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    json!({
        "kernel": kernel.trim(),
        "cpu": model,
        "cores": cores,
        "awake": awake.to_string(),
        "version": env!("CARGO_PKG_VERSION"),
    })
}
