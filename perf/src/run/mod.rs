//! `berth-perf run`: scenario after scenario, and what was measured so far always on disk.
//!
//! ```text
//!  choose ─▶ for each scenario: look at the host's noise ─▶ prepare ─▶ cells (engine) ─▶ results.json
//!            then: look again ─▶ withdraw verdicts that were too noisy ─▶ clear up ─▶ table, report.html
//! ```
#![forbid(unsafe_code)]

mod all;
mod one;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::args::RunArgs;
use crate::choose::{self, Chosen};
use crate::clock::{Window, now};
use crate::context::{Build, Context, source_tree};
use crate::host::Facts;
use crate::interrupt;
use crate::janitor::Janitor;
use crate::report;
use crate::results::{self, Results, Role};
use all::{Keeper, measure_all};

/// Measures, prints, and clears up. Whether all that was named could be measured.
pub fn run(args: &RunArgs) -> Result<bool> {
    let chosen = choose::choose(args)?;
    let builds = builds(args)?;
    let out = out_folder(args)?;
    interrupt::install()?;
    let mut context = context(args, builds)?;
    let in_lab = context.in_lab;
    let mut results = begun(args, &chosen, &out, in_lab)?;
    eprintln!("host: {}", results.host.line());
    let mut keeper = Keeper {
        results: &mut results,
        out: &out,
        stream: args.stream,
    };
    let measured = measure_all(args, &chosen, &mut context, &mut keeper);
    let cleared = context.janitor.finish();
    results.absent.extend(context.absent.iter().cloned());
    results.absent.sort();
    results.absent.dedup();
    results.interrupted = interrupt::requested();
    results.write(&out)?;
    report::write_page(&results, &out.join(report::PAGE))?;
    print!("{}", report::text(&results));
    println!("\nresults: {}", out.join(results::FILE).display());
    println!("report:  {}", out.join(report::PAGE).display());
    measured.and(cleared)?;
    if results.interrupted {
        bail!("stopped before the end; what was measured is kept");
    }
    Ok(failures(&chosen, &results))
}

/// A run without anything measured yet, or with what `--add` finds.
fn begun(args: &RunArgs, chosen: &[Chosen], out: &Path, in_lab: bool) -> Result<Results> {
    let mut results = Results {
        format: results::VERSION,
        date: now(),
        quick: args.quick,
        host: Facts::gather(args.awake.to_string(), in_lab),
        ..Results::default()
    };
    git(&mut results);
    if !args.add {
        return Ok(results);
    }
    let mut earlier = Results::read(out)?;
    if earlier.host != results.host || earlier.quick != args.quick {
        bail!(
            "--add: the run in {} is of another host, or was made in another way",
            out.display()
        );
    }
    let names: Vec<&str> = chosen.iter().map(|one| one.entry.name).collect();
    earlier.forget(&names);
    earlier.interrupted = false;
    Ok(earlier)
}

/// Whether nothing of ours failed, and nothing that was asked for by its name.
fn failures(chosen: &[Chosen], results: &Results) -> bool {
    let mut fine = true;
    for scenario in &results.scenarios {
        let named = chosen
            .iter()
            .any(|one| one.named && one.entry.name == scenario.name);
        if let Some(failure) = scenario.failure.as_ref().filter(|_| named) {
            eprintln!("berth-perf: {}: {failure}", scenario.name);
            fine = false;
        }
        for cell in &scenario.cells {
            let ours = cell
                .series
                .iter()
                .filter(|series| series.role == Role::Ours);
            for series in ours {
                if let Some(failure) = &series.failure {
                    eprintln!("berth-perf: {} in {}: {failure}", series.subject, cell.name);
                    fine = false;
                }
            }
        }
    }
    fine
}

fn context(args: &RunArgs, builds: Vec<Build>) -> Result<Context> {
    let mut janitor = Janitor::start()?;
    let directory = args.dir.join(format!("berth-perf-{}", std::process::id()));
    janitor.directory(&directory)?;
    fs::create_dir(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let measured =
        Duration::from_millis(args.run_ms.unwrap_or(if args.quick { 500 } else { 1500 }));
    Ok(Context {
        cells: Vec::new(),
        quick: args.quick,
        window: Window {
            warmup: measured / 5,
            measured,
        },
        client_cpu: args.client_cpu,
        daemon_cpu: args.daemon_cpu,
        awake: args.awake,
        directory,
        in_lab: std::env::var_os("BERTH_LAB").is_some(),
        janitor,
        variants: args.variant.clone(),
        count: !args.no_counts,
        builds,
        against: args.against.clone(),
        named: args.peer.clone(),
        assets: args.assets.clone(),
        zram_mib: args.zram_mib,
        file_mib: args.file_mib,
        absent: Vec::new(),
    })
}

/// Where our programs are: `--builds`, or the folder of this one.
fn builds(args: &RunArgs) -> Result<Vec<Build>> {
    if args.builds.is_empty() {
        let program = std::env::current_exe().context("cannot find this program")?;
        let folder = program.parent().unwrap_or(Path::new("/")).to_owned();
        let label = String::new();
        return Ok(vec![Build { label, folder }]);
    }
    let mut builds: Vec<Build> = Vec::new();
    for (index, folder) in args.builds.iter().enumerate() {
        if !folder.is_dir() {
            bail!("--builds {}: no such folder", folder.display());
        }
        let last = folder
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let label = last.unwrap_or_default();
        let taken = label.is_empty() || builds.iter().any(|build| build.label == label);
        builds.push(Build {
            label: if taken {
                format!("{label}{index}")
            } else {
                label
            },
            folder: folder.clone(),
        });
    }
    Ok(builds)
}

fn out_folder(args: &RunArgs) -> Result<PathBuf> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => {
            let tree = source_tree().map_or_else(|| PathBuf::from("."), |tree| tree.join("target"));
            tree.join("perf").join(now().replace(':', ""))
        }
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    Ok(out)
}

/// What the source tree around us is.
fn git(results: &mut Results) {
    let Some(tree) = source_tree() else { return };
    let ask = |arguments: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(&tree)
            .args(arguments)
            .output();
        let output = output.ok().filter(|output| output.status.success());
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        text.unwrap_or_default()
    };
    results.git_human_readable = ask(&["describe", "--always", "--dirty", "--tags"]);
    results.git_revision = ask(&["rev-parse", "HEAD"]);
    results.git_commit_date = ask(&["show", "-s", "--format=%cI", "HEAD"]);
}
