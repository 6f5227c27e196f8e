//! Getting a connection to a backend without ever waiting for it: by its socket, or by ours.
//!
//! `connect` on a unix socket blocks while the listener's backlog is full, as it is when a stopped
//! backend was dialled often enough: [`socket::connect`] does not.

#![forbid(unsafe_code)]

use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::Error;
use super::kind::Kind;
use crate::config::Link;
use crate::launcher::{Daemon, Launcher, Request};
use crate::socket::{self, Listener, MAX_PATH, connect};

/// How long a socket that somebody else listens on is tried, and how often.
pub(super) const LISTEN_PATIENCE: Duration = Duration::from_secs(2);
const LISTEN_PAUSE: Duration = Duration::from_millis(20);

/// How a session gets its connections.
pub(super) enum Dialer {
    /// The backend listens.
    Connect(PathBuf),
    /// We do.
    Listen(Listener),
    /// It is started.
    Start(Launcher, Request),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Dialled {
    pub(super) stream: UnixStream,
    /// The backend, where it was started for this.
    pub(super) daemon: Option<Daemon>,
}

impl From<UnixStream> for Dialled {
    fn from(stream: UnixStream) -> Self {
        Self {
            stream,
            daemon: None,
        }
    }
}

impl Dialer {
    /// For that device; a socket that is to be ours may be somebody else's for so long.
    pub(super) fn new(
        kind: &Kind,
        launcher: Option<&Launcher>,
        patience: Duration,
    ) -> Result<Self, Error> {
        match kind.link() {
            Link::Connect(path) => {
                check_socket(path)?;
                Ok(Self::Connect(path.clone()))
            }
            Link::Listen(path) => Ok(Self::Listen(listen(path, patience)?)),
            Link::Start(_) => match (launcher, Request::of(kind)) {
                (Some(launcher), Some(request)) => Ok(Self::Start(launcher.clone(), request)),
                _ => Err(Error::NoLauncher {
                    device: kind.id().to_owned(),
                }),
            },
        }
    }

    /// A connection, if there is one to have at once.
    ///
    /// # Errors
    /// As [`connect`]; `NotConnected` where nobody connected to our socket yet.
    pub(super) fn dial(&mut self, kind: &Kind) -> io::Result<Dialled> {
        match self {
            Self::Connect(path) => connect(path).map(Dialled::from),
            Self::Listen(listener) => {
                let stream = listener.accept()?.ok_or(ErrorKind::NotConnected)?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Self::Start(launcher, request) => {
                let taps = Request::taps(kind);
                let (stream, daemon) = launcher.start(kind.id(), request, taps)?;
                let daemon = Some(daemon);
                Ok(Dialled { stream, daemon })
            }
        }
    }

    /// What is readable when there is a connection to have.
    pub(super) fn event(&self) -> Option<&Listener> {
        match self {
            Self::Connect(_) | Self::Start(..) => None,
            Self::Listen(listener) => Some(listener),
        }
    }
}

/// Listens; a session of the boot before, whose backend is silent, may have the socket for a moment longer.
fn listen(path: &Path, patience: Duration) -> Result<Listener, Error> {
    let until = Instant::now() + patience;
    loop {
        match Listener::bind(path) {
            Err(socket::Error::InUse { .. }) if Instant::now() < until => {
                thread::sleep(LISTEN_PAUSE);
            }
            bound => return Ok(bound?),
        }
    }
}

/// Refuses what will never be a socket; one that does not exist yet is fine.
fn check_socket(path: &Path) -> Result<(), Error> {
    let path_buf = || path.to_owned();
    if path.as_os_str().as_bytes().len() > MAX_PATH {
        return Err(Error::PathTooLong { path: path_buf() });
    }
    match path.metadata() {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(Error::NotASocket { path: path_buf() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::config::{Dma, NetConfig, VhostUserConfig};

    #[test]
    fn who_comes_to_our_socket_is_taken_one_after_the_other() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        let card = Kind::Net(NetConfig {
            id: "_net0".to_owned(),
            backend: VhostUserConfig {
                link: Link::Listen(path.clone()),
                num_queues: 2,
                queue_size: 64,
                dma: Dma::Auto,
            },
            mac: None,
        });
        let mut dialer = Dialer::new(&card, None, LISTEN_PATIENCE).unwrap();
        assert_eq!(
            dialer.dial(&card).unwrap_err().kind(),
            ErrorKind::NotConnected
        );
        let _both = [connect(&path).unwrap(), connect(&path).unwrap()];
        dialer.dial(&card).unwrap();
        dialer.dial(&card).unwrap();
        // The next session's, which begins before this one is over.
        let next = thread::spawn(move || Dialer::new(&card, None, LISTEN_PATIENCE).map(drop));
        drop(dialer);
        next.join().unwrap().unwrap();
        assert!(!path.exists());
    }
}
