//! What the daemons' mains share: command line, log, exit codes, and the run loop.
//!
//! ```text
//!   main: args ─▶ init_logging ─▶ open the device ─▶ run
//!   run:  block signals ─▶ sockets ─▶ sandbox ─▶ a thread each for metrics and control socket
//!         ─▶ loop { accept ─▶ session until it ends }
//! ```
//!
//! The thread that calls [`run`] is the control thread. One frontend is served at a time; the next
//! one waits in the socket's backlog. A frontend that misbehaves ends its session with one line.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::{info, warn};

use crate::control_socket::{self, ControlServer};
use crate::device::Device;
use crate::endpoint::{Endpoint, EndpointError, Listener};
use crate::metrics::{Metrics, MetricsServer};
use crate::notify::LogLimit;
use crate::protocol::connection::ConnectionError;
use crate::sandbox::{self, Plan, SandboxError};
use crate::session::{DEFAULT_POLL_LIMIT, Session, SessionError, SessionOptions};
use crate::signals::{Signals, Wish};
use crate::sys;

/// Sessions that came and went: a frontend can cause these lines at will.
static SESSION_LINES: LogLimit = LogLimit::new(Duration::from_millis(200));
static SESSION_FAULTS: LogLimit = LogLimit::new(Duration::from_secs(1));

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

    /// Take commands on this Unix socket, a line each; `help` lists them
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Give up what is not needed once everything is open
    #[arg(long, value_enum, default_value = "on", value_name = "MODE")]
    pub sandbox: sandbox::Mode,

    /// Look for work for up to N microseconds before sleeping, while queues are busy; 0: never
    #[arg(long, value_name = "N", default_value_t = DEFAULT_POLL_LIMIT.as_micros() as u32,
          value_parser = clap::value_parser!(u32).range(0..=MAX_POLL_US))]
    pub poll_us: u32,
}

/// A poll limit above this is a typing error.
const MAX_POLL_US: i64 = 10_000;

impl DaemonArgs {
    fn session_options(&self) -> SessionOptions {
        SessionOptions {
            poll_limit: Duration::from_micros(u64::from(self.poll_us)),
        }
    }
}

/// Why a daemon could not serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The vhost-user socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The metrics socket.
    #[error("metrics socket")]
    Metrics(#[source] EndpointError),
    /// The control socket.
    #[error("control socket")]
    Control(#[source] EndpointError),
    /// What should confine the process.
    #[error("sandbox")]
    Sandbox(#[from] SandboxError),
    /// A system call without which there is no going on.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Sends the log to stderr; `RUST_LOG` sets the level (default `info`).
pub fn init_logging() {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A second call (tests) leaves the first in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}

/// Serves `device` to one frontend after the other until SIGTERM or SIGINT, or until the only
/// session of a connected `--fd` has ended. The calling thread becomes the control thread.
///
/// Call before any other thread is started: it blocks the signals it wants to read.
pub fn run<D: Device>(args: &DaemonArgs, device: D) -> Result<(), DaemonError> {
    let signals = Signals::new(D::RELOADS).map_err(|source| DaemonError::System {
        what: "set up signals",
        source,
    })?;
    let sockets = Sockets::open(args)?;
    let plan = Plan {
        device: device.syscalls(),
        sockets: sockets.made(),
    };
    sandbox::enter(args.sandbox, &plan)?;
    let device = Arc::new(device);
    let of_device = Arc::clone(&device);
    let metrics = Metrics::new(D::NAME, device.num_queues()).with(move || of_device.metrics());
    let has_frontend = Arc::new(AtomicBool::new(false));
    let no_thread = |source| DaemonError::System {
        what: "start a thread",
        source,
    };
    let metrics_server = sockets
        .metrics
        .map(|listener| MetricsServer::start(listener, metrics.clone()));
    let _metrics_server = metrics_server.transpose().map_err(no_thread)?;
    let control_server = sockets.control.map(|listener| {
        let answer = control_answers(Arc::clone(&device), Arc::clone(&has_frontend));
        ControlServer::start(listener, answer)
    });
    let _control_server = control_server.transpose().map_err(no_thread)?;
    let server = Server {
        device,
        metrics,
        signals,
        has_frontend,
        options: args.session_options(),
    };
    match sockets.endpoint {
        Endpoint::Connected(stream) => server.serve_one(stream).map(drop),
        Endpoint::Listening(listener) => server.serve(&listener),
    }
}

/// All that the daemon listens on.
struct Sockets {
    endpoint: Endpoint,
    metrics: Option<Listener>,
    control: Option<Listener>,
}

impl Sockets {
    fn open(args: &DaemonArgs) -> Result<Sockets, DaemonError> {
        let listen = |path: &Option<PathBuf>| path.as_deref().map(Listener::bind).transpose();
        Ok(Sockets {
            endpoint: Endpoint::open(args.socket_path.as_deref(), args.fd)?,
            metrics: listen(&args.metrics_socket).map_err(DaemonError::Metrics)?,
            control: listen(&args.control_socket).map_err(DaemonError::Control)?,
        })
    }

    /// Those that are to be removed at the end.
    fn made(&self) -> Vec<PathBuf> {
        let more = self.metrics.iter().chain(&self.control);
        let all = self.endpoint.listener().into_iter().chain(more);
        all.filter_map(Listener::made_path)
            .map(Path::to_owned)
            .collect()
    }
}

/// What the control socket answers: `help`, `status`, and the device's own commands.
fn control_answers<D: Device>(
    device: Arc<D>,
    has_frontend: Arc<AtomicBool>,
) -> impl Fn(&str) -> Result<String, String> + Send + 'static {
    const OURS: [control_socket::Command; 2] = [
        ("help", "list the commands"),
        ("status", "say how things are"),
    ];
    let commands = [&OURS, device.commands()].concat();
    move |line| match control_socket::find(&commands, line)? {
        "help" => {
            let lines = commands
                .iter()
                .map(|(name, what)| format!("{name} ({what})"));
            Ok(lines.collect::<Vec<_>>().join(", "))
        }
        "status" => {
            let connected = has_frontend.load(Ordering::Relaxed);
            let frontend = if connected { "connected" } else { "none" };
            let own = device.status();
            Ok(format!("device={} frontend={frontend} {own}", D::NAME))
        }
        name => device.command(name),
    }
}

/// Whether to serve another frontend.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    Stop,
}

struct Server<D: Device> {
    device: Arc<D>,
    metrics: Metrics,
    signals: Signals,
    has_frontend: Arc<AtomicBool>,
    options: SessionOptions,
}

impl<D: Device> Server<D> {
    fn serve(&self, listener: &Listener) -> Result<(), DaemonError> {
        info!("ready for a frontend");
        loop {
            let mut slots = [
                sys::poll_slot(self.signals.fd(), libc::POLLIN),
                sys::poll_slot(listener.as_fd().as_raw_fd(), libc::POLLIN),
            ];
            wait(&mut slots)?;
            if slots[0].revents != 0 {
                match self.signals.take() {
                    Wish::Stop => return Ok(()),
                    Wish::Reload => self.device.reload(),
                    Wish::Nothing => {}
                }
            }
            if slots[1].revents == 0 {
                continue;
            }
            let accepted = listener.accept().map_err(|source| DaemonError::System {
                what: "accept a frontend",
                source,
            })?;
            if let Some(stream) = accepted
                && self.serve_one(stream)? == Next::Stop
            {
                return Ok(());
            }
        }
    }

    /// One session, from its first message to its end.
    fn serve_one(&self, stream: UnixStream) -> Result<Next, DaemonError> {
        let device = Arc::clone(&self.device);
        let session = Session::new(device, &self.metrics, stream, self.options);
        let session = session.map_err(|source| DaemonError::System {
            what: "begin a session",
            source,
        })?;
        if let Some(suppressed) = SESSION_LINES.pass() {
            info!(suppressed, "frontend connected");
        }
        self.has_frontend.store(true, Ordering::Relaxed);
        let end = run_session(session, Some(&self.signals));
        self.has_frontend.store(false, Ordering::Relaxed);
        match end? {
            Some(error) => report_end(&error),
            None => {
                info!("told to stop");
                return Ok(Next::Stop);
            }
        }
        Ok(Next::GoOn)
    }
}

/// Serves one frontend on a connected socket until it goes, on the calling thread and without
/// signals; says why it ended. For tests, fuzz targets and benches.
pub fn serve_connection<D: Device>(
    device: Arc<D>,
    metrics: Metrics,
    stream: UnixStream,
    options: SessionOptions,
) -> Result<SessionError, DaemonError> {
    let session = Session::new(device, &metrics, stream, options);
    let session = session.map_err(|source| DaemonError::System {
        what: "begin a session",
        source,
    })?;
    run_session(session, None)?.ok_or(DaemonError::System {
        what: "serve without signals",
        source: io::ErrorKind::Interrupted.into(),
    })
}

/// Runs a session to its end; `None` where a signal ended it. The workers have finished what was
/// in flight when this returns.
fn run_session<D: Device>(
    mut session: Session<D>,
    signals: Option<&Signals>,
) -> Result<Option<SessionError>, DaemonError> {
    loop {
        let mut slots = [
            sys::poll_slot(signals.map_or(-1, Signals::fd), libc::POLLIN),
            sys::poll_slot(session.connection_fd().as_raw_fd(), libc::POLLIN),
            sys::poll_slot(session.notify_fd().as_raw_fd(), libc::POLLIN),
            sys::poll_slot(session.memory_lost_fd().as_raw_fd(), libc::POLLIN),
        ];
        wait(&mut slots)?;
        if slots[0].revents != 0 {
            match signals.map_or(Wish::Nothing, Signals::take) {
                Wish::Stop => return Ok(None),
                Wish::Reload => session.device().reload(),
                Wish::Nothing => {}
            }
        }
        if slots[3].revents != 0 {
            return Ok(Some(SessionError::MemoryLost));
        }
        if slots[2].revents != 0 {
            session.notify_frontend();
        }
        if slots[1].revents != 0
            && let Err(error) = session.receive()
        {
            return Ok(Some(error));
        }
    }
}

fn wait(slots: &mut [libc::pollfd]) -> Result<(), DaemonError> {
    sys::poll(slots, -1).map_err(|source| DaemonError::System {
        what: "wait for events",
        source,
    })
}

fn report_end(error: &SessionError) {
    if matches!(error, SessionError::Connection(ConnectionError::Closed)) {
        if SESSION_LINES.pass().is_some() {
            info!("frontend disconnected");
        }
        return;
    }
    if let Some(suppressed) = SESSION_FAULTS.pass() {
        warn!(suppressed, "session ended: {}", chain_of(error));
    }
}

/// An error and its causes on one line.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    line
}

/// Prints an error with its causes as one line, `NAME: what: cause: cause`, and gives exit code 1.
pub fn fail(name: &str, error: &dyn std::error::Error) -> ExitCode {
    eprintln!("{name}: {}", chain_of(error));
    ExitCode::FAILURE
}
