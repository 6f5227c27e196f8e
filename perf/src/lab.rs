//! Scenarios that need guests, where the host can run none: one boot of the lab's machine with our programs and the
//! peers in it, and a `berth-perf` there that tells us of every cell.
//!
//! ```text
//!  run ─▶ perf/lab ─▶ tests/lab/run ─▶ QEMU ─ berth-perf run … --stream ─▶ "@results {…}" ─▶ our results
//!                                                                       "[boot 3/9] …"    ─▶ our progress line
//! ```
//! Time is emulated there, so what comes of it is marked: ratios and counts only.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::args::{RunArgs, Where};
use crate::choose::Chosen;
use crate::context::{Context, source_tree};
use crate::progress::Progress;
use crate::results::Results;
use crate::scenario::Need;
use crate::{interrupt, sys};

/// A line of the output that is a result.
pub const RESULTS: &str = "@results ";
/// How much slower than on a host everything may be, and how long the machine may take to boot.
const SLOWER: u32 = 3;
const BOOT: Duration = Duration::from_secs(300);

/// Whether a scenario boots guests.
pub fn needs_guests(one: &Chosen) -> bool {
    one.entry.needs.contains(&Need::Guest)
}

/// Whether guests run in the lab; an error that says why where there is no way.
pub fn wanted(args: &RunArgs, context: &Context) -> Result<bool> {
    if context.in_lab {
        return Ok(false);
    }
    match args.r#where {
        Where::Host => return Ok(false),
        Where::Lab => return Ok(true),
        Where::Auto => {}
    }
    let tree = tree()?;
    let vmm = context.builds[0].folder.join("berth-vmm");
    let output = Command::new(tree.join("tests/lab/where"))
        .env("BERTH_VMM", std::path::absolute(&vmm)?)
        .stderr(Stdio::piped())
        .output()
        .context("cannot start tests/lab/where")?;
    match String::from_utf8_lossy(&output.stdout).trim() {
        "host" => Ok(false),
        "lab" => Ok(true),
        _ => bail!(
            "cannot find out where guests run: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ),
    }
}

fn tree() -> Result<PathBuf> {
    source_tree().context(
        "needs a KVM that runs guests; the lab that stands in for one is in the source tree (run it from there)",
    )
}

/// Runs them there. `keep` gets everything that is known, after every cell.
pub fn run(
    args: &RunArgs,
    chosen: &[&Chosen],
    context: &mut Context,
    progress: &mut Progress,
    mut keep: impl FnMut(&Results) -> Result<()>,
) -> Result<()> {
    let stage = context.folder("lab")?;
    let mut child = start(args, chosen, context, &stage)?;
    let output = child.stdout.take().context("the lab's output")?;
    let mut last = String::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("reading the lab's output")?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end();
        if let Some(json) = line.strip_prefix(RESULTS) {
            let results = serde_json::from_str(json).context("what the lab sent")?;
            keep(&results)?;
        } else if line.starts_with('[') {
            progress.relay(line);
        } else if !line.is_empty() {
            line.clone_into(&mut last);
        }
    }
    let status = child.wait().context("waiting for the lab")?;
    if !status.success() && !interrupt::requested() {
        bail!("in the lab: {last} ({status})");
    }
    Ok(())
}

fn start(args: &RunArgs, chosen: &[&Chosen], context: &Context, stage: &Path) -> Result<Child> {
    let expected: Duration = chosen
        .iter()
        .map(|one| (one.entry.expected)(args.quick))
        .sum();
    let limit = expected * SLOWER + BOOT;
    let mut command = Command::new(tree()?.join("perf/lab"));
    command.arg("--stage").arg(std::path::absolute(stage)?);
    command.arg("--timeout").arg(limit.as_secs().to_string());
    let mut labels = Vec::new();
    for build in &context.builds {
        let folder = std::path::absolute(&build.folder)?;
        command
            .arg("--build")
            .arg(format!("{}:{}", folder.display(), build.label));
        labels.push(format!("/lab/builds/{}", build.label));
    }
    if context.builds.len() > 1 || !context.builds[0].label.is_empty() {
        // The berth-perf that runs there is this one.
        let program = std::env::current_exe()?;
        let folder = program.parent().unwrap_or(Path::new("/"));
        command.arg("--build").arg(format!("{}:", folder.display()));
    } else {
        labels.clear();
    }
    command.arg("--").args(["run", "--stream", "--out=out"]);
    command.args(chosen.iter().map(|one| one.entry.name));
    command.args(pass_on(args));
    if !labels.is_empty() {
        command.arg(format!("--builds={}", labels.join(",")));
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    sys::tie_child(&mut command, &[]);
    command.spawn().context("cannot start perf/lab")
}

/// What the one in the lab is to know of our command line.
fn pass_on(args: &RunArgs) -> Vec<String> {
    let mut all = Vec::new();
    let mut flag = |name: &str, value: &str| all.push(format!("--{name}={value}"));
    args.cell.iter().for_each(|cell| flag("cell", cell));
    args.subject
        .iter()
        .for_each(|subject| flag("subject", subject));
    args.limit.iter().for_each(|limit| flag("limit", limit));
    args.against
        .iter()
        .for_each(|peers| flag("against", &peers.join(",")));
    args.rounds
        .iter()
        .for_each(|rounds| flag("rounds", &rounds.to_string()));
    args.run_ms
        .iter()
        .for_each(|ms| flag("run-ms", &ms.to_string()));
    flag("dir", "/lab");
    if args.quick {
        all.push("--quick".to_owned());
    }
    if args.no_counts {
        all.push("--no-counts".to_owned());
    }
    all
}
