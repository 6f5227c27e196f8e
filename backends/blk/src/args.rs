//! The command line as typed. Follows QEMU's conventions for vhost-user backend programs
//! (docs/interop/vhost-user.rst, "Backend program conventions").
#![forbid(unsafe_code)]

use std::path::PathBuf;

use berth_queue_worker::{DaemonArgs, RateLimit};

use crate::device::{BlkConfig, MAX_QUEUE_SIZE, MAX_QUEUES, SERIAL_LEN};
use crate::engine::{EngineChoice, FixedBuffers};
use crate::image::{Cache, LockTime};

const EXAMPLES: &str = "\
Examples:
  Serve an image on a socket, for one frontend after the other:
    berth-blk --socket-path=/run/disk0.sock --blk-file=disk.img --num-queues=2

  The same, read-only and past the host's page cache:
    berth-blk --socket-path=/run/disk0.sock --blk-file=/dev/vg0/root --read-only --cache=none

  No more than 100 MiB and 5000 requests a second, after 1 GiB at full speed:
    berth-blk --socket-path=/run/disk0.sock --blk-file=disk.img \
      --rate-limit=bw_size=100M,bw_one_time_burst=1G,bw_refill_time=1000,ops_size=5000,ops_refill_time=1000

  Its guest, under QEMU:
    qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
      -chardev socket,id=c,path=/run/disk0.sock -device vhost-user-blk-pci,chardev=c …

  Make the disk larger under its guest:
    berth-blk --socket-path=/run/disk0.sock --blk-file=disk.img --control-socket=/run/disk0.ctl
    truncate -s 20G disk.img && echo resize | nc -N -U /run/disk0.ctl

RUST_LOG sets the log level (error, warn, info, debug, trace). SIGTERM shuts down cleanly, SIGHUP
looks at the image's size again. Exit code: 0, 1 on failure, 2 on wrong usage.";

/// A disk for virtual machines, as a vhost-user device process.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "berth-blk", version, about, after_help = EXAMPLES)]
pub struct Args {
    /// Where to serve.
    #[command(flatten)]
    pub daemon: DaemonArgs,

    /// The disk image: a raw file or a block device
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "print_capabilities"
    )]
    pub blk_file: Option<PathBuf>,

    /// Refuse writes, and lock the image for reading only
    #[arg(long)]
    pub read_only: bool,

    /// How the host caches the image
    #[arg(long, value_enum, default_value = "writeback")]
    pub cache: Cache,

    /// When the image is locked against others
    #[arg(long, value_enum, default_value = "always")]
    pub lock: LockTime,

    /// What does the I/O
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineChoice,

    /// io_uring with a kernel thread that takes submissions: no system call while busy, a CPU more
    #[arg(long, conflicts_with_all = ["engine", "iopoll"])]
    pub sqpoll: bool,

    /// io_uring that asks the device for completions instead of being interrupted: takes a CPU
    /// while I/O is in flight; needs --cache=none and a device with poll queues
    #[arg(long, conflicts_with = "engine")]
    pub iopoll: bool,

    /// Register guest memory with io_uring, which pins it; the guest and the frontend must never
    /// discard pages of it
    #[arg(long, value_enum, default_value = "off")]
    pub fixed_buffers: FixedBuffers,

    /// Number of virtqueues
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub num_queues: u16,

    /// Largest ring a frontend may set up, a power of two
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUE_SIZE, value_parser = queue_size)]
    pub queue_size: u16,

    /// What the guest sees as the disk's serial, up to 20 bytes
    #[arg(long, visible_alias = "serial", value_name = "ID", default_value = "", value_parser = serial)]
    pub serial_id: String,

    /// Hold the disk, all its queues together, to so many bytes and requests: bw_size=BYTES (or
    /// 10M, 1G), bw_one_time_burst=, bw_refill_time=MS, ops_size=N, ops_one_time_burst=,
    /// ops_refill_time=MS
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub rate_limit: Option<RateLimit>,

    /// Print what this program can do, as JSON for management software, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(&size) => Ok(size),
        _ => Err(format!(
            "expected a power of two from 2 to {MAX_QUEUE_SIZE}"
        )),
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_LEN {
        return Err(format!("longer than {SERIAL_LEN} bytes"));
    }
    Ok(text.to_owned())
}

impl Args {
    fn engine_choice(&self) -> EngineChoice {
        match (self.sqpoll, self.iopoll) {
            (true, _) => EngineChoice::SqPoll,
            (_, true) => EngineChoice::IoPoll,
            _ => self.engine,
        }
    }

    /// What the device is told.
    pub fn config(&self) -> BlkConfig {
        let mut serial = [0; SERIAL_LEN];
        serial[..self.serial_id.len()].copy_from_slice(self.serial_id.as_bytes());
        BlkConfig {
            serial,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            engine: self.engine_choice(),
            fixed_buffers: self.fixed_buffers,
            rate_limit: self.rate_limit,
        }
    }
}
