//! `berth-perf`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use berth_perf::args::{Args, What};
use berth_perf::choose::Usage;
use berth_perf::scenario::memory;
use berth_perf::{compare, interrupt, janitor, list, report, run};
use clap::Parser;

fn main() -> ExitCode {
    let result = match Args::parse().what {
        What::List(args) => {
            list::run(&args);
            Ok(true)
        }
        What::Run(args) => run::run(&args),
        What::Report(args) => report::run(&args).map(|()| true),
        What::Compare(args) => compare::run(&args),
        What::MemoryHolder(args) => memory::holder::run(&args).map(|()| true),
        What::MemoryDumps(args) => memory::dumps::take::run(&args).map(|()| true),
        What::Janitor => janitor::run().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("berth-perf: {error:#}");
            match (error.is::<Usage>(), interrupt::requested()) {
                (true, _) => ExitCode::from(2),
                (false, true) => ExitCode::from(130),
                (false, false) => ExitCode::FAILURE,
            }
        }
    }
}
