//! `berth-net-lab`: TCP between a guest and its host, by berth-net and by what stands in its place.
//!
//! The same kernel and initramfs run as four guests of one host, each behind a network card of another kind;
//! all stay up, one at a time carries a transfer, and the next in turn follows at once:
//!
//! ```text
//!   round ─▶ direction ─▶ vhost-net, qemu, berth-net, berth-vmm     a share: vhost-net's time / the subject's
//! ```
//!
//! The same program is the guest's end of a transfer (`guest`). `perf/net-lab` puts it into
//! the initramfs and runs it in the lab, where time is emulated: so it prints shares and no speeds.

#![forbid(unsafe_code)]

mod counts;
mod guests;
mod table;
mod transfer;

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use berth_tests_framework::story::{self, Context, Options};
use clap::{Parser, Subcommand};

use crate::guests::Subject;
use crate::table::Table;
use crate::transfer::Direction;

/// Measures TCP between guests and their host, by berth-net, QEMU's own virtio-net and vhost-net
#[derive(Debug, Parser)]
#[command(name = "berth-net-lab", version)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Boots the guests, measures, and prints the table; needs root, KVM and /dev/vhost-net
    Measure(Measure),
    /// A guest's end of one transfer
    Guest {
        /// Which way the bytes go
        direction: Direction,
        /// Where the host listens
        host: SocketAddr,
        /// How many bytes
        bytes: u64,
    },
}

#[derive(Debug, clap::Args)]
struct Measure {
    /// vmlinux, and a guest-initramfs.cpio that has this program as /bin/berth-net-lab
    #[arg(long, value_name = "DIR")]
    assets: PathBuf,
    /// berth-net and berth-vmm
    #[arg(long, value_name = "DIR")]
    bin: PathBuf,
    /// Where the logs go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How often each subject is measured, each way
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// MiB of one transfer
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
}

fn main() -> ExitCode {
    let result = match Args::parse().what {
        What::Measure(args) => measure(&args),
        What::Guest {
            direction,
            host,
            bytes,
        } => transfer::guest_end(direction, host, bytes),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-net-lab: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn measure(args: &Measure) -> Result<()> {
    for device in ["/dev/kvm", "/dev/vhost-net"] {
        fs::File::options()
            .read(true)
            .write(true)
            .open(device)
            .with_context(|| device.to_owned())?;
    }
    story::clean_up_on_signals()?;
    let options = Options::of_folders(&args.assets, &args.bin, &args.out, 1)?;
    let context = Context::alone(&options)?;
    match run_rounds(&context, args) {
        Ok(table) => {
            print!("{}", table.text(args.mib));
            Ok(())
        }
        Err(error) => {
            eprint!("{}", context.log_tails());
            Err(error.context(format!("failed at: {}", context.current_step())))
        }
    }
}

/// Boots every subject, then takes them in turn.
fn run_rounds(context: &Context, args: &Measure) -> Result<Table> {
    let start = Instant::now();
    let mut guests = Vec::new();
    for subject in Subject::ALL {
        context.step(format!("boot {}", subject.name()));
        guests.push(guests::boot(context, subject)?);
        eprintln!(
            "{:4} s  {} is up",
            start.elapsed().as_secs(),
            subject.name()
        );
    }
    let bytes = args.mib << 20;
    let mut log = fs::File::create(context.log("kvm-counts"))?;
    for guest in &mut guests {
        let name = guest.subject.name();
        writeln!(log, "{name}: the guest's clock is {}", guest.clock()?)?;
        for direction in Direction::ALL {
            context.step(format!("warm up {}", guest.subject.name()));
            // The caches and the guest's code: the first transfer is not the second.
            guest.transfer(direction, bytes / 4)?;
        }
    }
    let mut table = Table::default();
    for round in 1..=args.rounds {
        for direction in Direction::ALL {
            let mut took = [0.0; Subject::ALL.len()];
            for (guest, took) in guests.iter_mut().zip(&mut took) {
                let name = guest.subject.name();
                context.step(format!("round {round}, {direction}, {name}"));
                let before = guest.counts()?;
                *took = guest.transfer(direction, bytes)?.as_secs_f64();
                let grown = counts::grown(&before, &guest.counts()?);
                writeln!(log, "round {round}, {direction}, {name}: {grown}")?;
            }
            table.add(direction, took);
            let now = start.elapsed().as_secs();
            let shares = table::line(&table::shares(took));
            eprintln!("{now:4} s  round {round}, {direction}: {shares}");
        }
    }
    for guest in guests {
        guest.power_off()?;
    }
    Ok(table)
}
