//! What the daemons' mains share: command line, log, exit codes, and the run loop.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::device::Device;

/// Flags that every backend daemon has. Flatten it into the daemon's own `clap` arguments.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DaemonArgs {
    /// Listen on this Unix socket and serve one frontend after the other
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Serve on this file descriptor: a connected socket is one session, a listening one serves on
    #[arg(long, value_name = "N", conflicts_with = "socket_path")]
    pub fd: Option<i32>,

    /// Serve counters as Prometheus text on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,
}

/// Why a daemon could not serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {}

/// Sends the log to stderr; `RUST_LOG` sets the level (default `info`).
pub fn init_logging() {}

/// Serves `device` to one frontend after the other until SIGTERM or SIGINT, or until the only
/// session of a connected `--fd` has ended. The calling thread becomes the control thread.
///
/// Call before any other thread is started: it blocks the signals it wants to read.
pub fn run<D: Device>(args: &DaemonArgs, device: D) -> Result<(), DaemonError> {
    let _ = (args, device);
    Ok(())
}

/// Prints an error with its causes as one line, `NAME: what: cause: cause`, and gives exit code 1.
pub fn fail(name: &str, error: &dyn std::error::Error) -> ExitCode {
    let mut line = format!("{name}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    eprintln!("{line}");
    ExitCode::FAILURE
}
