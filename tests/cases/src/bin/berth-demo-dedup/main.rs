//! `berth-demo-dedup`: the same Debian guests twice, on shared memory and on memory that is merged, and what each takes.
//!
//! ```text
//!   round 1  guest1 … guestN   --memory shared=on                 ─▶ boot, read /usr, measure
//!   round 2  the same disks    --memory mergeable=on (DMA window) ─▶ boot, read /usr, berth-tuner merges, measure
//! ```
//!
//! `./demo --dedup` at the top of the repository prepares everything and runs this, on the host or in the lab.

#![forbid(unsafe_code)]

mod farm;
mod ksm;
mod measure;
mod report;
mod tuner;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use berth_tests_framework::story::{self, Context, Options};
use berth_tests_framework::wait::seconds;
use clap::Parser;

use crate::farm::{Farm, Memory};
use crate::ksm::Ksm;
use crate::report::{Outcome, Timeline};
use crate::tuner::Tuner;

/// Runs the same guests on shared and on merged memory, and prints what they take of the host
#[derive(Debug, Parser)]
#[command(
    name = "berth-demo-dedup",
    version,
    after_help = "Example:
  berth-demo-dedup --guests 4 --assets target/lab/assets --bin target/release --out target/demo"
)]
struct Args {
    /// Guests of 512 MiB
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    guests: u32,
    /// Kernels, initramfs and images, made by tests/lab/assets
    #[arg(long, value_name = "DIR", default_value = "target/lab/assets")]
    assets: PathBuf,
    /// The programs
    #[arg(long, value_name = "DIR", default_value = "target/release")]
    bin: PathBuf,
    /// Where dedup.json and the logs go
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
    /// Only see whether such a file is what a run leaves
    #[arg(long, value_name = "DEDUP.JSON")]
    check: Option<PathBuf>,
    /// What the guests run on, for the report
    #[arg(long, value_name = "TEXT", default_value = "hardware KVM")]
    host: String,
}

/// Longest time for which the table is watched; then what is merged by then is what counts.
const MERGING_LIMIT: Duration = seconds(150);

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-demo-dedup: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// Prints what happens next, with the seconds since the start.
pub(crate) struct Progress<'a> {
    pub(crate) context: &'a Context,
    pub(crate) start: Instant,
}

impl Progress<'_> {
    pub(crate) fn step(&self, what: &str) {
        println!("[{:5.1}s] {what}", self.start.elapsed().as_secs_f64());
        self.context.step(what);
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(path) = &args.check {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        return report::check_json(&serde_json::from_str(&text)?);
    }
    story::clean_up_on_signals()?;
    Ksm::check()?;
    let options = Options::of_folders(&args.assets, &args.bin, &args.out, 1)?;
    remove_old_logs(&options.out)?;
    let context = Context::alone(&options)?;
    let progress = Progress {
        context: &context,
        start: Instant::now(),
    };
    match rounds(&progress, args) {
        Ok(outcome) => {
            let path = options.out.join("dedup.json");
            fs::write(&path, format!("{:#}\n", outcome.json()))
                .with_context(|| path.display().to_string())?;
            print!("{}", outcome.table());
            outcome.check()
        }
        Err(error) => {
            eprint!("{}", context.log_tails());
            Err(error.context(format!("failed at: {}", context.current_step())))
        }
    }
}

fn rounds(progress: &Progress<'_>, args: &Args) -> Result<Outcome> {
    let count = args.guests;
    progress.step(&format!("making {count} disks, copies of one Debian"));
    let disks = farm::disks(progress.context, count)?;

    let mut farm = Farm::start(progress, &disks, Memory::Shared)?;
    let contents = farm.work(progress)?;
    let shared = farm.measure()?;
    farm.power_off(progress)?;

    let ksm = Ksm::take()?;
    let mut farm = Farm::start(progress, &disks, Memory::Merged)?;
    farm.work(progress)?;
    let before = farm.measure()?;
    progress.step("starting berth-tuner, which offers memory with equals to the kernel's merging");
    let mut tuner = Tuner::start(progress.context, farm.sockets())?;
    let timeline = watch(&farm, &tuner)?;
    let merged = farm.measure()?;
    let status = tuner.status()?;
    progress.step("reading all of /usr again in each guest: is merged memory what it was?");
    let again = farm.sums()?;
    if again.iter().any(|sum| *sum != contents) {
        bail!("a guest reads {again:?} from merged memory, and read {contents} before");
    }
    progress.step("ending berth-tuner: the kernel's settings are put back");
    tuner.end()?;
    ksm.check_restored()?;
    farm.power_off(progress)?;
    progress.step("proving from outside that the disks' file systems are clean");
    farm::prove_clean(&disks)?;
    progress.step("done");
    Ok(Outcome {
        host: args.host.clone(),
        shared,
        before,
        merged,
        timeline,
        status,
        contents,
        total_seconds: progress.start.elapsed().as_secs_f64(),
    })
}

/// The live table, until the tuner has merged what pays.
fn watch(farm: &Farm, tuner: &Tuner) -> Result<Timeline> {
    let start = Instant::now();
    let mut timeline = Timeline::new(&farm.names());
    print!("{}", timeline.header());
    let mut watch = tuner.watch()?;
    loop {
        let status = watch.next()?;
        let done = status["state"] == "TRICKLE" && timeline.was_in("BURST");
        if timeline.take(start.elapsed(), &status) {
            print!("{}", timeline.last_line());
        }
        if done || start.elapsed() > MERGING_LIMIT {
            print!("{}", timeline.footer(done));
            return Ok(timeline);
        }
    }
}

/// Logs are added to, and those of another run would mislead.
fn remove_old_logs(out: &Path) -> Result<()> {
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}
