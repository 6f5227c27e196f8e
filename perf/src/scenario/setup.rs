//! What the scenarios of daemons run under: one core for the client, one for the daemon.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::clock::Window;
use crate::context::Context;

/// What is the same for all runs.
#[derive(Clone, Debug)]
pub struct Setup {
    /// CPU of the client.
    pub client_cpu: usize,
    /// CPU of daemon and limit.
    pub daemon_cpu: usize,
    /// Per run.
    pub window: Window,
    /// Whether a run more counts system calls.
    pub count: bool,
    /// For sockets and logs.
    pub directory: PathBuf,
}

impl Setup {
    /// As the command line says.
    pub fn of(context: &mut Context) -> Self {
        let counter = context.tool(
            "perf",
            "install Debian's linux-perf: nobody counts system calls",
        );
        Self {
            client_cpu: context.client_cpu,
            daemon_cpu: context.daemon_cpu,
            window: context.window,
            count: counter.is_some(),
            directory: context.directory.clone(),
        }
    }
}
