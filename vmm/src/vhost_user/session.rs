//! The thread that keeps one backend connected and does what the device wishes of it.
//!
//! ```text
//!            nobody there            handshake fails
//!           ┌──────────┐   ┌────────────────────────────────────┐
//!           ▼          │   ▼                                    │
//!  start ─▶ Waiting ───┴─▶ Connecting ──▶ Live ──▶ Lost ────────┘
//!             connect         handshake     │ hung up, silent, refused
//!                                           └─ quit: rings taken back ─▶ Closed
//! ```
//!
//! While it is live the thread sleeps in epoll and, when woken, brings the backend's rings in line with
//! the wish in [`Shared`]. Every operation has a deadline; one that is missed ends the connection, and
//! the rings count as taken back: a process that does not answer can be told nothing more.
//!
//! A backend that is started here ([`crate::launcher`]) is waited for after its connection has ended, and
//! the next one is started when it is gone: at once if it had served for a while, else after longer and
//! longer pauses. One that never serves at all ends the session, with its last words.
//!
//! A backend that comes back gets the rings again from the used index on, with the region that says
//! what its predecessor had in flight, if what it offers still holds what the driver chose.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config_writes::ConfigWrites;
use super::connection::Connection;
use super::deadline::Deadlines;
use super::dial::{Dialer, Dialled};
use super::inflight::Inflight;
use super::peer::{Error, Peer};
use super::shared::{Rings, SessionState, Shared};
use super::wait::Waiter;
use crate::launcher::Daemon;

/// First and longest pause between two dials.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between two daemons that are started.
const LONGEST_REST: Duration = Duration::from_secs(30);
/// How long a daemon may take to end after its connection.
const DAEMON_GRACE: Duration = Duration::from_secs(2);
/// Pause after a backend that did not live for this long; no longer than an operation may take.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

pub(super) const WAKE: u64 = 0;
pub(super) const SOCKET: u64 = 1;
pub(super) const REQUESTS: u64 = 2;
pub(super) const DAEMON_LOG: u64 = 3;
/// Tokens of rings' error events start here.
pub(super) const RING_ERROR: u64 = 4;

/// Why a connection is over.
pub(super) enum End {
    Quit,
    Lost(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Lost(error)
    }
}

/// A session's thread.
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    dialer: Dialer,
    deadlines: Arc<Deadlines>,
    pub(super) limit: Duration,
    /// Whether the guest's pages may be discarded.
    pub(super) discards: bool,
    /// For pauses, while no backend is connected.
    idle: Waiter,
    /// Rings that some backend has run, so that the next one resumes them.
    pub(super) begun: Option<Arc<Rings>>,
    /// What backends have in flight of these rings.
    pub(super) inflight: Option<Inflight>,
    /// What the driver wrote to configuration space, for the next backend.
    pub(super) written: ConfigWrites,
    /// What was last said about a backend that will not serve, so that it is said once.
    pub(super) said: Option<String>,
    /// The daemon that was started for this connection.
    pub(super) daemon: Option<Daemon>,
    /// Whether any backend ever served.
    pub(super) served: bool,
    /// Daemons that ended, one after the other, as soon as they were started.
    short_lived: u32,
}

impl Session {
    /// `limit` is the longest time that an operation on the backend may take.
    pub(super) fn new(
        shared: Arc<Shared>,
        dialer: Dialer,
        deadlines: Arc<Deadlines>,
        limit: Duration,
    ) -> io::Result<Self> {
        let idle = Waiter::new()?;
        idle.watch(shared.wake_event(), WAKE)?;
        Ok(Self {
            shared,
            dialer,
            deadlines,
            limit,
            discards: false,
            idle,
            begun: None,
            inflight: None,
            written: ConfigWrites::default(),
            said: None,
            daemon: None,
            served: false,
            short_lived: 0,
        })
    }

    pub(super) fn run(mut self) {
        while let Some(stream) = self.dial() {
            self.shared.set_session(SessionState::Connecting);
            let start = Instant::now();
            let end = self.connection(stream);
            // The connection is closed: whatever the backend still does, it cannot be asked.
            let ended = self.end_daemon();
            self.shared.let_go();
            let End::Lost(error) = end else { break };
            if let Some((last_words, how)) = ended {
                if !self.served {
                    self.fail(last_words.unwrap_or_else(|| match error {
                        Error::Closed | Error::Protocol { .. } => how,
                        error => error.to_string(),
                    }));
                    break;
                }
                tracing::warn!(device = self.shared.id(), "{how}");
            }
            self.say_lost(&error);
            self.shared.set_session(SessionState::Lost);
            let rest = self.rest(start.elapsed(), &error);
            if !self.pause(rest) {
                break;
            }
        }
        self.shared.leave();
    }

    /// How long to wait after a backend that lived so long.
    fn rest(&mut self, lived: Duration, error: &Error) -> Duration {
        let failed = FAILED_PAUSE.min(self.limit);
        if lived > failed && matches!(error, Error::Closed) {
            self.short_lived = 0;
            return FIRST_PAUSE;
        }
        let Dialer::Start(..) = self.dialer else {
            return failed;
        };
        let rest = failed * (1 << self.short_lived.min(8));
        self.short_lived += 1;
        rest.min(LONGEST_REST)
    }

    /// Waits for the daemon whose connection is closed; its last words, and how it ended.
    fn end_daemon(&mut self) -> Option<(Option<String>, String)> {
        let daemon = self.daemon.take()?;
        Some(daemon.end(DAEMON_GRACE))
    }

    /// The daemon will not be started again.
    fn fail(&self, reason: String) {
        self.shared.state().failure = Some(reason);
    }

    /// Connects, however long that takes; `None` to end.
    fn dial(&mut self) -> Option<UnixStream> {
        let mut pause = FIRST_PAUSE;
        let start = Instant::now();
        loop {
            match self.dialer.dial(&self.shared.kind) {
                Ok(Dialled { stream, daemon }) => {
                    self.daemon = daemon;
                    return Some(stream);
                }
                Err(error) if !self.served && matches!(self.dialer, Dialer::Start(..)) => {
                    self.fail(format!("cannot ask for a daemon: {error}"));
                    return None;
                }
                Err(error) => {
                    self.say_waiting(&error);
                    // One that listens and lets others queue is as silent as one that accepts.
                    if error.kind() == ErrorKind::WouldBlock && start.elapsed() > self.limit {
                        self.shared.settle();
                    }
                }
            }
            if !self.pause_unless_called(pause) {
                return None;
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// The same, where somebody who connects to our socket ends the pause.
    fn pause_unless_called(&self, pause: Duration) -> bool {
        let Some(listener) = self.dialer.event() else {
            return self.pause(pause);
        };
        if let Err(error) = self.idle.watch(listener, SOCKET) {
            tracing::error!(device = self.shared.id(), %error, "cannot wait");
            return false;
        }
        let goes_on = self.pause(pause);
        self.idle.forget(listener);
        goes_on
    }

    /// Waits; returns false to end.
    fn pause(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        loop {
            if self.shared.state().quit {
                return false;
            }
            if Instant::now() >= until {
                return true;
            }
            match self.idle.wait(Some(until)) {
                Ok(ready) if ready.iter().any(|ready| ready.token == SOCKET) => return true,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(device = self.shared.id(), %error, "cannot wait");
                    return false;
                }
            }
            let _ = self.shared.wake_event().read();
        }
    }

    /// A connection from its handshake to its end.
    fn connection(&mut self, stream: UnixStream) -> End {
        let connected = self.connect(stream);
        let served = connected.and_then(|mut connection| connection.serve(self));
        match served {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    /// What a driver left that is gone does not concern the next.
    pub(super) fn forget_driver(&mut self) {
        self.begun = None;
        self.inflight = None;
        self.written.clear();
    }

    fn connect(&mut self, stream: UnixStream) -> Result<Connection, End> {
        let wanted = self.shared.state().wanted.clone();
        if let Some(begun) = &self.begun
            && !wanted
                .as_ref()
                .is_some_and(|wanted| Arc::ptr_eq(begun, wanted))
        {
            self.forget_driver();
        }
        let kind = &self.shared.kind;
        let (mut peer, mut found) =
            Peer::handshake(stream, kind, &self.deadlines, self.limit, self.discards)?;
        if let Some(config) = &mut found.config {
            for (offset, data) in self.written.iter() {
                peer.write_config(offset, data)?;
                config[offset..offset + data.len()].copy_from_slice(data);
            }
        }
        let offer = kind.offer(&found).map_err(Error::Unfit)?;
        let offer = self.shared.reach.limit(kind, offer);
        if let Some(rings) = wanted {
            offer.fits(&rings).map_err(Error::Unfit)?;
        }
        let waiter = Waiter::new().map_err(waiting)?;
        waiter
            .watch(self.shared.wake_event(), WAKE)
            .map_err(waiting)?;
        waiter.watch(&peer, SOCKET).map_err(waiting)?;
        if let Some(daemon) = &self.daemon {
            waiter
                .watch(&daemon.log_event(), DAEMON_LOG)
                .map_err(waiting)?;
        }
        if let Some(requests) = &peer.requests {
            waiter.watch(requests, REQUESTS).map_err(waiting)?;
        }
        Ok(Connection {
            peer,
            found,
            offer,
            waiter,
            running: None,
            deaf_until: None,
        })
    }

    fn say_waiting(&mut self, error: &io::Error) {
        let text = format!("{:?}", error.kind());
        if self.said.as_ref() != Some(&text) {
            tracing::info!(
                device = self.shared.id(),
                socket = %self.shared.socket(),
                %error,
                "waiting for the backend"
            );
            self.said = Some(text);
        }
        self.shared.set_session(SessionState::Waiting);
    }

    fn say_lost(&mut self, error: &Error) {
        let text = error.to_string();
        if self.said.as_ref() != Some(&text) {
            tracing::warn!(
                device = self.shared.id(),
                socket = %self.shared.socket(),
                reason = %error,
                "the backend is lost; {}",
                match self.dialer {
                    Dialer::Start(..) => "starting it again",
                    _ => "dialling it again",
                }
            );
            self.said = Some(text);
        }
    }
}

pub(super) fn waiting(source: io::Error) -> Error {
    Error::Io {
        what: "cannot watch the connection",
        source,
    }
}
