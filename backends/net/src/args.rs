//! The command line as typed. [`crate::config`] checks what clap cannot.

#![forbid(unsafe_code)]

use std::os::fd::RawFd;

use berth_queue_worker::{DaemonArgs, RateLimit};
use clap::Parser;

use crate::device::MAX_PAIRS;
use crate::mac::Mac;
use crate::settings::EngineChoice;

const EXAMPLES: &str = "\
Examples:
  A tap that exists, for one guest:
    ip tuntap add tap0 mode tap && ip link set tap0 up
    berth-net --socket-path=/run/net0.sock --tap=tap0 --mac=52:54:00:12:34:56

  A tap made for the life of the daemon, four queue pairs, jumbo frames:
    berth-net --socket-path=/run/net0.sock --tap=tap0 --create --num-queues=4 --mtu=9000

  100 Mbit/s each way, bursts of 2 MB, and at most 20000 frames a second to the guest:
    berth-net --socket-path=/run/net0.sock --tap=tap0 \\
      --rate-limit-rx=bw_size=2000000,bw_refill_time=160,ops_size=20000,ops_refill_time=1000 \\
      --rate-limit-tx=bw_size=2000000,bw_refill_time=160

  A tap opened by a more privileged parent, on a connected socket:
    berth-net --fd=3 --tap-fd=4

Exit code: 0 after SIGTERM or at the end of a session on --fd, 1 on failure, 2 on wrong usage.
RUST_LOG sets the log level (default: info).";

/// vhost-user network device over a tap
#[derive(Debug, Clone, Parser)]
#[command(name = "berth-net", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Args {
    /// Flags that every daemon has.
    #[command(flatten)]
    pub daemon: DaemonArgs,

    /// Attach to this tap; one pair needs no multi_queue tap
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,

    /// Make the tap if it does not exist, set it up, and remove it at the end
    #[arg(long, requires = "tap", conflicts_with = "tap_fd")]
    pub create: bool,

    /// Use these attached tap descriptors, one a queue pair
    #[arg(
        long,
        value_name = "N[,N...]",
        value_delimiter = ',',
        conflicts_with = "tap"
    )]
    pub tap_fd: Vec<RawFd>,

    /// MAC address that the guest is told; without it the frontend or the guest chooses one
    #[arg(long, value_name = "MAC")]
    pub mac: Option<Mac>,

    /// Queue pairs, 1 to 8 [default: 1, or one a descriptor of --tap-fd]
    #[arg(long, value_name = "PAIRS", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_PAIRS)))]
    pub num_queues: Option<u16>,

    /// Largest ring that a frontend may set up, a power of two, 16 to 1024
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub queue_size: u16,

    /// MTU that the guest is told, and that a tap made with --create gets [default: the tap's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..=65521))]
    pub mtu: Option<u16>,

    /// Hold what the guest receives, all queues together, to so many bytes and frames:
    /// bw_size=BYTES (or 10M, 1G), bw_one_time_burst=, bw_refill_time=MS, ops_size=N,
    /// ops_one_time_burst=, ops_refill_time=MS
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub rate_limit_rx: Option<RateLimit>,

    /// The same for what the guest sends
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub rate_limit_tx: Option<RateLimit>,

    /// What moves frames to the tap and back
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineChoice,

    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}
