//! Getting a connection to a backend without ever waiting for it: by its socket, or by ours.
//!
//! `connect` on a unix socket blocks while the listener's backlog is full, as it is when a stopped
//! backend was dialled often enough; std offers no other way, so the call is made here.

#![allow(
    unsafe_code,
    reason = "socket(2) and connect(2) with SOCK_NONBLOCK, which std does not offer"
)]

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
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
use crate::socket::{self, Listener};

/// How long a socket that somebody else listens on is tried, and how often.
const LISTEN_PATIENCE: Duration = Duration::from_secs(2);
const LISTEN_PAUSE: Duration = Duration::from_millis(20);
/// Longest path of a unix socket, its final NUL not counted.
pub(super) const MAX_PATH: usize = 107;

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
    /// For that device.
    pub(super) fn new(kind: &Kind, launcher: Option<&Launcher>) -> Result<Self, Error> {
        match kind.link() {
            Link::Connect(path) => {
                check_socket(path)?;
                Ok(Self::Connect(path.clone()))
            }
            Link::Listen(path) => Ok(Self::Listen(listen(path)?)),
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
fn listen(path: &Path) -> Result<Listener, Error> {
    let until = Instant::now() + LISTEN_PATIENCE;
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

/// Connects to `path` if somebody takes the connection at once.
///
/// # Errors
/// `NotFound` and `ConnectionRefused` where nobody listens (yet), `WouldBlock` where the listener does
/// not keep up, `InvalidInput` for a path that no socket can have.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (address, len) = address(path)?;
    // SAFETY: no pointers are involved.
    let fd = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        libc::socket(libc::AF_UNIX, kind, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `address` is an initialised sockaddr_un that outlives the call, and `len` is not longer.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as libc::sa_family_t,
        sun_path: [0; 108],
    };
    for (to, &from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::config::{NetConfig, VhostUserConfig};

    #[test]
    fn nobody_there_is_said_at_once() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        assert_eq!(connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(
            connect(&path).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
    }

    #[test]
    fn a_listener_that_never_accepts_does_not_block() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut taken = Vec::new();
        let error = loop {
            match connect(&path) {
                Ok(stream) => taken.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert!(!taken.is_empty());
    }

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
            },
            mac: None,
        });
        let mut dialer = Dialer::new(&card, None).unwrap();
        assert_eq!(
            dialer.dial(&card).unwrap_err().kind(),
            ErrorKind::NotConnected
        );
        let _both = [connect(&path).unwrap(), connect(&path).unwrap()];
        dialer.dial(&card).unwrap();
        dialer.dial(&card).unwrap();
        // The next session's, which begins before this one is over.
        let next = thread::spawn(move || Dialer::new(&card, None).map(drop));
        drop(dialer);
        next.join().unwrap().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let long = "x".repeat(MAX_PATH + 1);
        assert_eq!(
            connect(Path::new(&long)).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(
            connect(Path::new("")).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    }
}
