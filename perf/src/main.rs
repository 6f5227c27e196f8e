//! `berth-perf`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use berth_perf::args::{Args, What};
use berth_perf::{blk, janitor, net};
use clap::Parser;

fn main() -> ExitCode {
    let result = match Args::parse().what {
        What::Blk(args) => blk::run(&args),
        What::Net(args) => net::run(&args),
        What::Janitor => janitor::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-perf: {error:#}");
            ExitCode::FAILURE
        }
    }
}
