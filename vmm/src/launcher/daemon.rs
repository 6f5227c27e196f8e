//! A daemon that was started, as the session has it that it serves.

#![forbid(unsafe_code)]

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use super::log::Log;
use super::{MAX_MESSAGE, Report, sys};

/// How long the launcher takes at most to end a daemon: it kills one that does not end by itself.
const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// A daemon. Dropped, it is told to end.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    lease: UnixDatagram,
    log: Log,
    has_log: bool,
    /// How it ended, or why it could not be started.
    ended: Option<String>,
}

/// What can be watched of a daemon.
#[derive(Debug)]
pub struct Watched(RawFd);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Daemon {
    pub(super) fn new(id: &str, name: String, lease: UnixDatagram, log: UnixStream) -> Self {
        Self {
            name,
            lease,
            log: Log::new(id, log),
            has_log: true,
            ended: None,
        }
    }

    /// What is readable when it has written to its log.
    pub fn log_event(&self) -> Watched {
        Watched(self.log.as_raw_fd())
    }

    /// Passes on what it has written; returns false when there will be no more.
    pub fn process_log(&mut self) -> bool {
        self.has_log = self.has_log && self.log.read();
        self.has_log
    }

    /// It serves: from now on its log is passed on as it comes.
    pub fn serves(&mut self) {
        self.process_log();
        self.log.release();
    }

    /// Waits for the end of a daemon whose connection is closed; one that has not ended by itself after
    /// `grace` is ended. Returns its last words, if it never served, and how it ended.
    pub fn end(mut self, grace: Duration) -> (Option<String>, String) {
        if !self.wait(grace) {
            // Fails only where the launcher is gone.
            let _ = self.lease.shutdown(Shutdown::Write);
            if !self.wait(KILLED_WITHIN) {
                tracing::warn!(daemon = self.name, "it was told to end and does not");
            }
        }
        while self.process_log() && self.ended.is_some() {
            if !self.log_is_ready() {
                break;
            }
        }
        let how = self.ended.take();
        let how = how.unwrap_or_else(|| format!("{} does not end", self.name));
        (self.log.last_words(), how)
    }

    fn log_is_ready(&self) -> bool {
        let ready = sys::poll(&[self.log.as_raw_fd()], Some(Duration::ZERO));
        ready.is_ok_and(|ready| ready[0])
    }

    /// Waits for its end, passing on its log; returns whether it has ended.
    fn wait(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.ended.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let log = if self.has_log {
                self.log.as_raw_fd()
            } else {
                -1
            };
            match sys::poll(&[self.lease.as_raw_fd(), log], Some(left)) {
                Ok(ready) => {
                    if ready[1] {
                        self.process_log();
                    }
                    if ready[0] {
                        self.process_lease();
                    }
                }
                Err(error) => {
                    tracing::warn!(daemon = self.name, %error, "cannot wait for its end");
                    return false;
                }
            }
        }
        true
    }

    fn process_lease(&mut self) {
        let mut message = vec![0; MAX_MESSAGE];
        let len = match self.lease.recv(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => 0,
            Ok(len) => len,
        };
        self.ended = Some(match serde_json::from_slice(&message[..len]) {
            Ok(Report::Failed(reason)) => reason,
            Ok(Report::Ended(how)) => format!("{} {how}", self.name),
            // It ends with the connection, and nobody will say so.
            Err(_) => format!("{}: the launcher is gone", self.name),
        });
    }
}
