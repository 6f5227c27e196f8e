//! The disk table: finds who is there, makes the disks, runs the cells, prints.
#![forbid(unsafe_code)]

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::args::BlkArgs;
use crate::backing::{self, Backing, Disk};
use crate::cells::{self, Cell};
use crate::idle::{self, Idle};
use crate::janitor::Janitor;
use crate::measure::{self, Setup};
use crate::progress::Progress;
use crate::report;
use crate::rounds::CellResult;
use crate::spinner::Spinners;
use crate::subject::{self, Programs, Subject};
use crate::target::Window;

/// Measures, prints, and clears up.
pub fn run(args: &BlkArgs) -> Result<()> {
    let cells = cells::select(&args.cell, args.quick)?;
    let programs = Programs {
        berth: args.berth_blk.clone(),
        cloud_hypervisor: args.cloud_hypervisor.clone(),
    };
    let (subjects, absent) = subject::all(&programs, &args.variant)?;
    let mut wanted = args.subject.clone();
    if !wanted.is_empty() {
        wanted.extend(args.variant.iter().map(|variant| variant.name.clone()));
    }
    let (subjects, limit) = subject::select(subjects, &wanted, args.limit.as_deref())?;
    for line in &absent {
        eprintln!("absent: {line}");
    }
    if args.list {
        list(&cells, &subjects);
        return Ok(());
    }
    let mut janitor = Janitor::start()?;
    let measured = measure_all(args, &cells, &subjects, limit, &mut janitor);
    janitor.finish()?;
    let (results, idle) = measured?;
    print!(
        "{}{}{}",
        report::details(&results),
        report::summary(&results),
        report::idle_table(&idle)
    );
    if let Some(path) = &args.json {
        let json = report::as_json(&results, &idle, &host(), &absent);
        fs::write(path, format!("{json:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    report::failures(&results)
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
    let directory = args.dir.join(format!("berth-bench-{}", std::process::id()));
    fs::create_dir(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    janitor.directory(&directory)?;
    let default_ms = if args.quick { 500 } else { 1500 };
    let measured = Duration::from_millis(args.run_ms.unwrap_or(default_ms));
    let perf = subject::on_path("perf").is_some();
    if !perf && !args.no_counts {
        eprintln!("absent: perf, so nobody counts system calls: install Debian's linux-perf");
    }
    let setup = Setup {
        client_cpu: args.client_cpu,
        daemon_cpu: args.daemon_cpu,
        window: Window {
            warmup: measured / 5,
            measured,
        },
        rounds: args.rounds,
        limit,
        count: !args.no_counts && perf,
        directory,
    };
    let disks = disks(args, cells, &setup, janitor)?;
    let _awake = Spinners::start(&[args.client_cpu, args.daemon_cpu])?;
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
    let idle = if args.no_idle || args.quick {
        Vec::new()
    } else {
        eprintln!("watching idle daemons for {} s", idle::WATCHED.as_secs());
        idle::watch(subjects, args.daemon_cpu, &setup.directory)?
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
fn host() -> Value {
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
        "awake": "a SCHED_IDLE spinner on each core",
        "version": env!("CARGO_PKG_VERSION"),
    })
}
