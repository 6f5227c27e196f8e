//! Entry point of `berth-blk`: arguments, image, run.

use std::process::ExitCode;

use berth_blk::BlkDevice;
use berth_blk::args::Args;
use berth_blk::engine::{self, FixedBuffers};
use berth_blk::image::{Disk, OpenOptions};
use berth_queue_worker::{fail, init_logging, parse_args, run};

fn main() -> ExitCode {
    let args = match parse_args::<Args>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    if args.print_capabilities {
        let features = ["read-only", "blk-file"];
        println!(
            "{}",
            serde_json::json!({"type": "block", "features": features})
        );
        return ExitCode::SUCCESS;
    }
    init_logging();
    match serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail("berth-blk", error.as_ref()),
    }
}

fn serve(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let options = OpenOptions {
        // clap requires it unless --print-capabilities is there, which does not come here.
        path: args.blk_file.clone().unwrap_or_default(),
        read_only: args.read_only,
        cache: args.cache,
        lock: args.lock,
    };
    let disk = Disk::open(&options)?;
    tracing::info!(
        image = %options.path.display(),
        sectors = disk.capacity_sectors(),
        read_only = args.read_only,
        cache = ?args.cache,
        "disk opened"
    );
    let config = args.config();
    engine::check(&disk, config.engine, config.fixed_buffers)?;
    if config.fixed_buffers == FixedBuffers::GuestNeverDiscards {
        tracing::info!("guest memory will be pinned: nobody may discard pages of it");
    }
    run(&args.daemon, BlkDevice::new(disk, &config))?;
    Ok(())
}
