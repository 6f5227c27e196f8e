//! The command line as typed.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::awake::How;
use crate::context::Variant;
use crate::scenario::memory::dumps::take::TakeArgs;
use crate::scenario::memory::holder::HolderArgs;
use crate::sys;

const EXAMPLES: &str = "\
Examples:
  What can be measured here, and who is there to compare with:
    berth-perf list

  Everything that this host can do, as root, with a report to look at:
    berth-perf run --out /tmp/run && xdg-open /tmp/run/report.html

  Disks against qemu-storage-daemon only, in about a minute:
    berth-perf run blk --against qemu-storage-daemon --quick

  Before and after a change, side by side in the same rounds:
    berth-perf run blk --builds /tmp/before,target/release

  Two runs of different days (ratios compare, absolute figures hardly):
    berth-perf compare /tmp/run1 /tmp/run2 --threshold 5

Close what else runs: two cores are measured, and a third party on them is measured too.";

/// Measures Berth and its peers on this host, side by side in one run, and shows it
#[derive(Debug, clap::Parser)]
#[command(name = "berth-perf", version, about, after_help = EXAMPLES)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub what: What,
}

/// Subcommands.
#[derive(Debug, clap::Subcommand)]
pub enum What {
    /// Scenarios with their cells, what each needs, and which peers are here
    List(ListArgs),
    /// Measure: all scenarios that can run here, or those that are named
    Run(Box<RunArgs>),
    /// Show a run that was measured: the table, and the page report.html beside it
    Report(ReportArgs),
    /// What changed between two runs beyond their noise; exit code 1 on a regression
    Compare(CompareArgs),
    /// Holds the memory of a guest
    #[command(hide = true)]
    MemoryHolder(HolderArgs),
    /// Boots guests and writes their memory down
    #[command(hide = true)]
    MemoryDumps(TakeArgs),
    /// Clears up after the others
    #[command(hide = true)]
    Janitor,
}

/// For `list`.
#[derive(Clone, Debug, clap::Args)]
pub struct ListArgs {
    /// For machines
    #[arg(long)]
    pub json: bool,
    /// Where a peer is (repeatable)
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = named)]
    pub peer: Vec<(String, PathBuf)>,
}

/// For `report`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReportArgs {
    /// Folder of a run, or its results.json
    pub run: PathBuf,
    /// Where the page goes [default: report.html in the run's folder]
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write only the picture of the main table, as SVG
    #[arg(long, value_name = "FILE", conflicts_with_all = ["html", "markdown"])]
    pub svg: Option<PathBuf>,
    /// Tables as Markdown, the main one first, and nothing else
    #[arg(long)]
    pub markdown: bool,
    /// Only check that the run is complete and its file has the shape that others read
    #[arg(long, conflicts_with_all = ["html", "markdown", "svg"])]
    pub check: bool,
}

/// For `compare`.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareArgs {
    /// Before: folder of a run, or its results.json
    pub before: PathBuf,
    /// After
    pub after: PathBuf,
    /// A worsening of more than so many percent, and beyond the noise, is a regression
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    pub threshold: f64,
}

/// For `run`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// Scenarios [default: all that can run here]
    #[arg(value_name = "SCENARIO")]
    pub scenarios: Vec<String>,

    /// Not these scenarios, of all that can run here; several with commas
    #[arg(
        long,
        value_name = "SCENARIO",
        value_delimiter = ',',
        conflicts_with = "scenarios"
    )]
    pub without: Vec<String>,

    /// Only these peers, beside the limit; several with commas, none with 'none'
    #[arg(long, value_name = "PEER", value_delimiter = ',')]
    pub against: Option<Vec<String>>,

    /// Folders with our programs, measured side by side in the same rounds
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub builds: Vec<PathBuf>,

    /// Half a second for each run, few rounds, and only the cells to tune with
    #[arg(long)]
    pub quick: bool,

    /// Folder for results.json and report.html [default: target/perf/DATE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Add to the run that is in --out already, in place of its scenarios of the same name
    #[arg(long, requires = "out")]
    pub add: bool,

    /// Only cells of this name, or with these parts in it (zram, qd32, poll; to-tap, 64); repeatable
    #[arg(long, value_name = "NAME")]
    pub cell: Vec<String>,

    /// Only these subjects, and the one that ratios are of; repeatable
    #[arg(long, value_name = "NAME")]
    pub subject: Vec<String>,

    /// The subject that ratios are of [default: fio-io_uring, loop-io_uring without fio; tap]
    #[arg(long, value_name = "NAME")]
    pub limit: Option<String>,

    /// Our daemon once more with other flags, or another build of it; repeatable
    #[arg(long, value_name = "NAME=[PROGRAM] [FLAG]…", value_parser = Variant::parse)]
    pub variant: Vec<Variant>,

    /// Where a peer is; repeatable
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = named)]
    pub peer: Vec<(String, PathBuf)>,

    /// Repetitions of everything [default: each cell's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,

    /// Length of one timed run in milliseconds; a fifth of it more warms up [default: 1500, --quick 500]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(50..=600_000))]
    pub run_ms: Option<u64>,

    /// Do not count system calls and hand-offs, which takes a run more of each subject
    #[arg(long)]
    pub no_counts: bool,

    /// CPU of the client
    #[arg(long, value_name = "CPU", default_value_t = 0, value_parser = cpu)]
    pub client_cpu: usize,

    /// CPU of the daemon, and of the limit [default: 1, 0 where there is no other]
    #[arg(long, value_name = "CPU", default_value_t = usize::from(sys::may_run_on(1)), value_parser = cpu)]
    pub daemon_cpu: usize,

    /// Where guests run
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = Where::Auto)]
    pub r#where: Where,

    /// Print results after every cell, each in a line: for the one outside the lab
    #[arg(long, hide = true)]
    pub stream: bool,

    /// How cores are kept awake
    #[arg(long, value_enum, value_name = "HOW", default_value_t = How::Spin)]
    pub awake: How,

    /// Where files and sockets go, in a directory of their own: not a tmpfs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub dir: PathBuf,

    /// Folder with vmlinux, vmlinuz and guest-initramfs.cpio [default: what tests/lab/assets makes]
    #[arg(long, value_name = "DIR")]
    pub assets: Option<PathBuf>,

    /// Size of the zram device, all of which takes memory
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(16..))]
    pub zram_mib: u64,

    /// Size of the file
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..))]
    pub file_mib: u64,
}

/// Where guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Where {
    /// On this host where it can, else in the lab
    Auto,
    /// On this host
    Host,
    /// In the lab: a machine under QEMU's software CPU, whose time is emulated
    Lab,
}

/// A CPU that this process may use.
fn cpu(text: &str) -> Result<usize, String> {
    let cpu: usize = text.parse().map_err(|_| "not a number".to_owned())?;
    if sys::may_run_on(cpu) {
        return Ok(cpu);
    }
    Err("there is no such CPU for us".to_owned())
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ => Err("expected NAME=PROGRAM".to_owned()),
    }
}
