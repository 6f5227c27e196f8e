//! `berth-vmm`: reads the command line, runs the guest, ends with 0, 1 or 2, or as a test program says.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use berth_vmm::args::{self, Options, Stop};
use berth_vmm::config::validate::validate;
use berth_vmm::launcher::{LauncherProcess, Policy};
use berth_vmm::socket::{ApiSocket, Listener};
use berth_vmm::telemetry::{events, metrics, startup};
use berth_vmm::vm::requests::Requests;
use berth_vmm::vm::{Driver, Limits, Signals};
use berth_vmm::{api, descriptors, kvm, sandbox};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let begin = startup::Begin::now();
    let options = match args::parse(std::env::args_os()) {
        Ok(options) => options,
        Err(Stop::Print(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(Stop::Usage(line)) => {
            eprintln!("berth-vmm: {line}");
            return ExitCode::from(2);
        }
    };
    if options.startup_trace {
        startup::start(&begin);
        startup::mark("command line");
    }
    match run(options) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("berth-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<u8> {
    start_log(options.log_file.as_deref(), options.verbosity)?;
    // A process of its own: before signals are blocked, and before there is a thread or a sandbox.
    let launcher = start_launcher(&options).context("cannot start the launcher")?;
    descriptors::raise_limit();
    let signals = Signals::new().context("cannot take over signals")?;
    let host = kvm::host().context("cannot ask the host for its limits")?;
    let api_path = options.api_socket.as_ref().and_then(ApiSocket::path);
    if let Some(config) = &options.config {
        validate(config, api_path, host)?;
    }
    let irqchip = options
        .config
        .as_ref()
        .map(|config| config.platform.irqchip);
    kvm::open(irqchip)?;
    startup::mark("log, limits of the host");
    let (sender, requests) = Requests::new().context("cannot make the request queue")?;
    // No thread before this; whatever is named on the command line is opened before the sandbox closes.
    sandbox::prepare(&options.sandbox)?;
    startup::mark("privileges given up");
    if let Some(place) = &options.event_monitor {
        events::start(place)?;
    }
    events::event("vmm", "starting", &[]);
    let metrics = options
        .metrics_socket
        .as_deref()
        .map(open_metrics)
        .transpose()?;
    let api = options.api_socket.as_ref().map(api::bind).transpose()?;
    let limits = Limits {
        host,
        api_socket: api_path.map(Into::into),
        launcher: launcher.as_ref().map(LauncherProcess::launcher),
    };
    let mut driver = Driver::new(limits, signals, (sender.clone(), requests))?;
    let sockets = [api_path, options.metrics_socket.as_deref()];
    let sockets: Vec<_> = sockets.into_iter().flatten().map(Into::into).collect();
    match options.config {
        Some(config) => {
            driver.create(config.clone())?;
            sandbox::confine(Some(&config), &sockets)?;
        }
        None => sandbox::confine(None, &sockets)?,
    }
    startup::mark("serial port opened, sandbox closed");
    let _api = api
        .map(|listener| api::start(listener, sender.clone()))
        .transpose()?;
    let _metrics = metrics
        .map(|(listener, statm)| metrics::start(listener, statm, sender))
        .transpose()
        .context("cannot start the metrics thread")?;
    startup::mark("API, metrics");
    Ok(driver.run()?)
}

/// The process that starts daemons, if there can be any to start.
fn start_launcher(options: &Options) -> io::Result<Option<LauncherProcess>> {
    let rules: &[_] = match options.sandbox.landlock {
        true => &options.sandbox.rules,
        false => &[],
    };
    let policy = Policy::new(options.config.as_ref(), options.api_socket.is_some(), rules);
    if policy.is_empty() {
        return Ok(None);
    }
    LauncherProcess::fork(&policy).map(Some)
}

/// What the metrics thread needs, opened before the sandbox closes.
fn open_metrics(path: &Path) -> anyhow::Result<(Listener, File)> {
    let listener = Listener::bind(path).context("metrics socket")?;
    let statm = File::open("/proc/self/statm").context("cannot read our own memory")?;
    Ok((listener, statm))
}

fn start_log(path: Option<&Path>, verbosity: u8) -> anyhow::Result<()> {
    let default = match verbosity {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false);
    match path {
        None => log
            .with_ansi(io::stderr().is_terminal())
            .with_writer(io::stderr)
            .without_time()
            .init(),
        Some(path) => log.with_ansi(false).with_writer(open_log(path)?).init(),
    }
    Ok(())
}

fn open_log(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot open the log file {}", path.display()))
}
