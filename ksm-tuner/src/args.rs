//! Command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

use crate::config::Config;

/// Finds and frees the memory that guests of this host have in common
#[derive(Debug, Parser)]
#[command(name = "berth-tuner", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  berth-tuner run --config /etc/berth/tuner.toml
  berth-tuner run --vms /run/berth --dry-run      say what would be done, and why; needs no root
  berth-tuner status --json
  berth-tuner explain 20                          the last 20 decisions, with the numbers behind them
  berth-tuner defaults > /etc/berth/tuner.toml    a configuration to start from

Nothing is merged until merge.domain in the configuration names a trust domain; VMs name theirs with
'berth-vmm --platform trust_domain=NAME --memory mergeable=on'. SIGHUP has the configuration read again; SIGTERM
ends the daemon, which puts back what it has changed.";

/// What there is to do
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run as a daemon: sample, decide, act
    #[command(
        after_help = "Example:\n  berth-tuner run --config /etc/berth/tuner.toml --metrics-socket=/run/berth-tuner/metrics.sock"
    )]
    Run(RunArgs),
    /// Show what the running tuner does and what it has brought
    #[command(after_help = "Example:\n  berth-tuner status --json | jq .saved_mib")]
    Status(AskArgs),
    /// Show the same again and again
    #[command(after_help = "Example:\n  berth-tuner watch --every-ms=500")]
    Watch(WatchArgs),
    /// Show the last decisions, and why they were made
    #[command(after_help = "Example:\n  berth-tuner explain 5")]
    Explain(ExplainArgs),
    /// Print a configuration with all defaults
    Defaults,
}

/// Of `run`
#[derive(Debug, Clone, ClapArgs)]
pub struct RunArgs {
    /// Configuration, TOML
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Folder of the VMs' API sockets, in place of general.vms
    #[arg(long, value_name = "DIR")]
    pub vms: Option<PathBuf>,

    /// Folder of state and control socket, in place of general.run_dir
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    /// Log what would be done and do nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Serve counters as Prometheus text on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,

    /// Write every sample to this file, a line of JSON each, to be replayed
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
}

/// Of who asks the daemon
#[derive(Debug, Clone, ClapArgs)]
pub struct AskArgs {
    /// Folder of the daemon's control socket
    #[arg(long, value_name = "DIR", default_value_os_t = Config::default().general.run_dir)]
    pub run_dir: PathBuf,

    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Of `watch`
#[derive(Debug, Clone, ClapArgs)]
pub struct WatchArgs {
    /// Where to ask
    #[command(flatten)]
    pub ask: AskArgs,

    /// Milliseconds between two
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..))]
    pub every_ms: u64,

    /// End after so many
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

/// Of `explain`
#[derive(Debug, Clone, ClapArgs)]
pub struct ExplainArgs {
    /// Where to ask
    #[command(flatten)]
    pub ask: AskArgs,

    /// How many, at most
    #[arg(value_name = "N", default_value_t = 20)]
    pub count: usize,
}
