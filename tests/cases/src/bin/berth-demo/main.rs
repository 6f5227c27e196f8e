//! `berth-demo`: a Debian guest whose disk and network are processes of their own, and the proof of it.
//!
//! `./demo` at the top of the repository prepares everything and runs this, on the host or in the lab.

#![forbid(unsafe_code)]

mod measure;
mod report;
mod shell;
mod steps;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use berth_tests_framework::story::{self, Context, Options};
use clap::Parser;

/// Runs a Debian guest on berth-blk and berth-net, proves that it works, and prints what it took
#[derive(Debug, Parser)]
#[command(
    name = "berth-demo",
    version,
    after_help = "\
Examples:
  berth-demo --assets target/lab/assets --bin target/release --out target/demo
  berth-demo --shell --assets target/lab/assets --bin target/release --out target/demo"
)]
struct Args {
    /// Kernels, initramfs and images, made by tests/lab/assets
    #[arg(long, value_name = "DIR", default_value = "target/lab/assets")]
    assets: PathBuf,
    /// The programs
    #[arg(long, value_name = "DIR", default_value = "target/release")]
    bin: PathBuf,
    /// Where disk.img, serial.log and result.json go
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
    /// What the guest runs on, for the report
    #[arg(long, value_name = "TEXT", default_value = "hardware KVM")]
    host: String,
    /// Give the guest's console to this terminal
    #[arg(long)]
    shell: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-demo: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(args: &Args) -> Result<()> {
    story::clean_up_on_signals()?;
    let options = Options::of_folders(&args.assets, &args.bin, &args.out, 1)?;
    remove_old_logs(&options.out)?;
    let context = Context::alone(&options)?;
    if args.shell {
        return shell::run(&context, &options.out);
    }
    match steps::run(&context, &options.out, &args.host) {
        Ok(result) => {
            let path = options.out.join("result.json");
            fs::write(&path, format!("{:#}\n", result.json()))
                .with_context(|| path.display().to_string())?;
            print!("{}", result.table());
            Ok(())
        }
        Err(error) => {
            eprint!("{}", context.log_tails());
            Err(error.context(format!("failed at: {}", context.current_step())))
        }
    }
}

/// Logs are added to, and those of another run would mislead.
fn remove_old_logs(out: &Path) -> Result<()> {
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}
