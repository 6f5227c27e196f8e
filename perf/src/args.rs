//! The command line as typed.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::awake::How;
use crate::janitor::Janitor;
use crate::subject::{Variant, on_path};
use crate::sys;
use crate::target::Window;

const EXAMPLES: &str = "\
Examples:
  The whole table, as root (zram needs it), with a copy for machines:
    perf/run blk --json=/tmp/table.json

  Four cells in about a minute, while working on the daemon:
    perf/run blk --quick

  One cell, our daemon with more polling and an older build beside the current one:
    perf/run blk --cell=zram-randread-4k-qd1 --subject=berth-blk \\
      --variant='poll=--poll-us 200' --variant='old=/tmp/berth-blk-old'

  Frames from guest to tap, 64 bytes each:
    perf/run net --cell=to-tap-64

Close what else runs: two cores are measured, and a third party on them is measured too.";

/// Measures Berth's daemons against their peers and against the limit with no virtio between
#[derive(Debug, clap::Parser)]
#[command(name = "berth-perf", version, about, after_help = EXAMPLES)]
pub struct Args {
    /// What to measure
    #[command(subcommand)]
    pub what: What,
}

/// Subcommands.
#[derive(Debug, clap::Subcommand)]
pub enum What {
    /// Disks: berth-blk, qemu-storage-daemon, Cloud Hypervisor's daemon, and io_uring itself
    Blk(Box<BlkArgs>),
    /// Network cards: berth-net, DPDK's and Cloud Hypervisor's daemons, and plain reads and writes
    Net(Box<NetArgs>),
    /// Clears up after the others
    #[command(hide = true)]
    Janitor,
}

/// For both.
#[derive(Clone, Debug, clap::Args)]
pub struct Common {
    /// Only cells of this name, or with these parts in it (zram, qd32, poll; to-tap, 64); repeatable
    #[arg(long, value_name = "NAME")]
    pub cell: Vec<String>,

    /// Only these subjects, and the limit; repeatable
    #[arg(long, value_name = "NAME")]
    pub subject: Vec<String>,

    /// The subject that shares are of [default: fio-io_uring, loop-io_uring without fio; tap]
    #[arg(long, value_name = "NAME")]
    pub limit: Option<String>,

    /// Our daemon once more with other flags, or another build of it; repeatable
    #[arg(long, value_name = "NAME=[PROGRAM] [FLAG]…", value_parser = Variant::parse)]
    pub variant: Vec<Variant>,

    /// Half a second for each run, and only the cells to tune with
    #[arg(long)]
    pub quick: bool,

    /// List cells and subjects, and exit
    #[arg(long)]
    pub list: bool,

    /// Runs of each subject in each cell
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,

    /// Length of one run in milliseconds; a fifth of it more warms up [default: 1500, --quick 500]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(50..=600_000))]
    pub run_ms: Option<u64>,

    /// Do not count system calls and hand-offs, which takes perf and a run more of each subject
    #[arg(long)]
    pub no_counts: bool,

    /// CPU of the client
    #[arg(long, value_name = "CPU", default_value_t = 0, value_parser = cpu)]
    pub client_cpu: usize,

    /// CPU of the daemon, and of the limit
    #[arg(long, value_name = "CPU", default_value_t = 1, value_parser = cpu)]
    pub daemon_cpu: usize,

    /// How cores are kept awake
    #[arg(long, value_enum, value_name = "HOW", default_value_t = How::Spin)]
    pub awake: How,

    /// Where files and sockets go, in a directory of their own: not a tmpfs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub dir: PathBuf,

    /// Write everything that was measured to this file as JSON
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
}

impl Common {
    /// When a run is measured.
    pub fn window(&self) -> Window {
        let default_ms = if self.quick { 500 } else { 1500 };
        let measured = Duration::from_millis(self.run_ms.unwrap_or(default_ms));
        Window {
            warmup: measured / 5,
            measured,
        }
    }

    /// Whether the kernel's counters are wanted and there; says so where they are not.
    pub fn counts(&self) -> bool {
        let perf = on_path("perf").is_some();
        if !perf && !self.no_counts {
            eprintln!("absent: perf, so nobody counts system calls: install Debian's linux-perf");
        }
        perf && !self.no_counts
    }

    /// A directory for this run, which `janitor` removes.
    pub fn make_directory(&self, janitor: &mut Janitor) -> Result<PathBuf> {
        let directory = self.dir.join(format!("berth-perf-{}", std::process::id()));
        fs::create_dir(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        janitor.directory(&directory)?;
        Ok(directory)
    }
}

/// For network cards.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct NetArgs {
    /// For both.
    #[command(flatten)]
    pub common: Common,

    /// Our daemon [default: berth-net beside this program]
    #[arg(long, value_name = "PROGRAM")]
    pub berth_net: Option<PathBuf>,

    /// Cloud Hypervisor's vhost_user_net [default: from the PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub cloud_hypervisor: Option<PathBuf>,
}

/// For disks.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct BlkArgs {
    /// For both.
    #[command(flatten)]
    pub common: Common,

    /// Do not watch idle daemons, which takes 11 s [--quick does not either]
    #[arg(long)]
    pub no_idle: bool,

    /// Size of the zram device, all of which takes memory
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(16..))]
    pub zram_mib: u64,

    /// Size of the file
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..))]
    pub file_mib: u64,

    /// Our daemon [default: berth-blk beside this program]
    #[arg(long, value_name = "PROGRAM")]
    pub berth_blk: Option<PathBuf>,

    /// Cloud Hypervisor's vhost_user_block [default: from the PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub cloud_hypervisor: Option<PathBuf>,
}

/// A CPU that this process may use.
fn cpu(text: &str) -> Result<usize, String> {
    let cpu: usize = text.parse().map_err(|_| "not a number".to_owned())?;
    if sys::may_run_on(cpu) {
        return Ok(cpu);
    }
    Err("there is no such CPU for us".to_owned())
}
