//! `berth-stock-disk`: a disk on the crate `vhost-user-backend`, which shares no code with our daemons: the device
//! that a frontend meets when somebody builds one the usual way.
//!
//! One connection after another on a listening socket, one request after another in a queue, and nothing kept for a
//! successor: no INFLIGHT_SHMFD. A frontend that repeats what has no used entry loses nothing, as requests are
//! finished in the order in which they came.

#![forbid(unsafe_code)]

mod device;
mod request;

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use device::Disk;

/// Serves an image as a vhost-user disk built on the crate vhost-user-backend
#[derive(Debug, Parser)]
#[command(
    name = "berth-stock-disk",
    version,
    after_help = "\
Example:
  berth-stock-disk --socket disk.sock --image disk.img &
  berth-vmm … --generic-vhost-user device_type=block,socket=disk.sock,queue_sizes=[128]"
)]
struct Args {
    /// Where to listen; a socket that is there is replaced
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// A raw image of whole sectors
    #[arg(long, value_name = "PATH")]
    image: PathBuf,
}

fn main() -> ExitCode {
    match serve(&Args::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("berth-stock-disk: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn serve(args: &Args) -> Result<std::convert::Infallible> {
    let image = File::options()
        .read(true)
        .write(true)
        .open(&args.image)
        .with_context(|| args.image.display().to_string())?;
    let mut listener =
        Listener::new(&args.socket, true).with_context(|| args.socket.display().to_string())?;
    loop {
        let disk = Disk::new(image.try_clone()?)?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        // The crate's error is no std::error::Error.
        let why = |error: vhost_user_backend::Error| anyhow!("{error}");
        let disk = Arc::new(Mutex::new(disk));
        let mut daemon =
            VhostUserDaemon::new("stock-disk".to_owned(), disk, memory).map_err(why)?;
        daemon.start(&mut listener).map_err(why)?;
        eprintln!("berth-stock-disk: connected");
        // How a frontend leaves is its business.
        if let Err(error) = daemon.wait() {
            eprintln!("berth-stock-disk: {error}");
        }
    }
}
