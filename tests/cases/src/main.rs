//! `berth-cases`: runs the cases of a tier; one line a check, exit code 1 if one fails.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_tests_cases::stories;
use berth_tests_framework::story::{self, Options, Story, Tier};
use berth_tests_framework::wait;
use clap::{Parser, ValueEnum};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TierName {
    /// Boots guests under berth-vmm: needs a KVM that runs ordinary guests
    Guest,
    /// Drives the daemons with QEMU: needs no KVM
    Client,
}

/// Runs the cases of a tier and prints one line a check
#[derive(Debug, Parser)]
#[command(
    name = "berth-cases",
    version,
    after_help = "\
Examples:
  berth-cases --tier client --assets target/lab/assets --bin target/release --out target/cases
  berth-cases --tier guest --filter disk --assets assets --bin bin --out out
  berth-cases --tier guest --list"
)]
struct Args {
    /// Which cases
    #[arg(long, value_enum)]
    tier: TierName,
    /// Only stories whose name, or the name of one of whose checks, contains one of these texts
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    filter: Vec<String>,
    /// Print the names of stories and checks, run nothing
    #[arg(long)]
    list: bool,
    /// Also the long cases
    #[arg(long)]
    full: bool,
    /// Kernels, initramfs and images, made by tests/lab/assets
    #[arg(long, value_name = "DIR", default_value = "target/lab/assets")]
    assets: PathBuf,
    /// The programs under test
    #[arg(long, value_name = "DIR", default_value = "target/release")]
    bin: PathBuf,
    /// Logs, one directory a story
    #[arg(long, value_name = "DIR", default_value = "target/cases")]
    out: PathBuf,
    /// Stories at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Factor on every deadline, for a host that has other work to do
    #[arg(long, value_name = "FACTOR", default_value_t = 1)]
    patience: u32,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("berth-cases: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let stories: Vec<_> = stories()
        .into_iter()
        .filter(|story| wanted(args, story))
        .collect();
    if stories.is_empty() {
        eprintln!(
            "berth-cases: no case of this tier matches '{}' (try --list)",
            args.filter.join(",")
        );
    }
    if args.list {
        for story in &stories {
            println!("{}: {}", story.name, story.checks.join(" "));
        }
        return Ok(true);
    }
    if args.tier == TierName::Guest {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .context("/dev/kvm: the tier 'guest' needs KVM; tests/lab/run has one")?;
    }
    wait::set_patience(args.patience);
    story::clean_up_on_signals()?;
    let options = Options::of_folders(&args.assets, &args.bin, &args.out, args.jobs)?;
    let totals = story::run(&stories, &options)?;
    println!("{}", totals.line());
    Ok(totals.all_well())
}

fn wanted(args: &Args, story: &Story) -> bool {
    let tier = match args.tier {
        TierName::Guest => Tier::Guest,
        TierName::Client => Tier::Client,
    };
    let named = |text: &String| {
        story.name.contains(text) || story.checks.iter().any(|check| check.contains(text))
    };
    story.tier == tier
        && (args.full || !story.long)
        && (args.filter.is_empty() || args.filter.iter().any(named))
}
