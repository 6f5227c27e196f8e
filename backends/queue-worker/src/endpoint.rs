//! Where frontends come from: a socket path, an inherited fd, or systemd's LISTEN_FDS.
//!
//! A path is taken only where nothing of anybody's is lost: a stale socket (nobody listens) is
//! replaced, anything else is refused. The socket is removed again on a clean end, if it is still
//! the one we made.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;

/// Why an endpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The path is something else.
    #[error("socket path {0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// Another process listens there.
    #[error("socket path {0} is in use: a process listens on it")]
    InUse(PathBuf),
    /// The path cannot be looked at, replaced or bound.
    #[error("cannot listen on {path}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The number is no open socket.
    #[error("file descriptor {fd} is not a socket this process inherited")]
    BadFd {
        /// The number.
        fd: RawFd,
        /// What the kernel said.
        source: io::Error,
    },
    /// No flag, no LISTEN_FDS.
    #[error("nothing to serve on: give --socket-path=PATH or --fd=N")]
    None,
}

/// Where frontends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// One after the other, for as long as the process runs.
    Listening(Listener),
    /// One session.
    Connected(UnixStream),
}

impl Endpoint {
    /// From the command line: a path, an fd number, or else LISTEN_FDS of the environment.
    pub fn open(path: Option<&Path>, fd: Option<RawFd>) -> Result<Endpoint, EndpointError> {
        match (path, fd.or_else(systemd_fd)) {
            (Some(path), _) => Ok(Endpoint::Listening(Listener::bind(path)?)),
            (None, Some(fd)) => Endpoint::from_fd(fd),
            (None, None) => Err(EndpointError::None),
        }
    }

    /// The socket that frontends connect to, where there is one.
    pub fn listener(&self) -> Option<&Listener> {
        match self {
            Endpoint::Listening(listener) => Some(listener),
            Endpoint::Connected(_) => None,
        }
    }

    fn from_fd(fd: RawFd) -> Result<Endpoint, EndpointError> {
        let bad = |source| EndpointError::BadFd { fd, source };
        if fd <= 2 {
            return Err(bad(io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let owned = sys::adopt_fd(fd).map_err(bad)?;
        if sys::is_listening(owned.as_fd()).map_err(bad)? {
            Ok(Endpoint::Listening(
                Listener::inherited(owned).map_err(bad)?,
            ))
        } else {
            Ok(Endpoint::Connected(UnixStream::from(owned)))
        }
    }
}

/// The first fd that systemd passes, if its variables are meant for this process.
fn systemd_fd() -> Option<RawFd> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    let ours = number("LISTEN_PID")? == std::process::id() && number("LISTEN_FDS")? >= 1;
    ours.then_some(3)
}

/// A listening socket that cleans up after itself.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// Path, device and inode of a socket we made.
    made: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    /// Listens on `path`; replaces a stale socket there and nothing else.
    pub fn bind(path: &Path) -> Result<Listener, EndpointError> {
        remove_stale_socket(path)?;
        let error = |source| EndpointError::Bind {
            path: path.to_owned(),
            source,
        };
        let socket = UnixListener::bind(path).map_err(error)?;
        socket.set_nonblocking(true).map_err(error)?;
        let meta = std::fs::symlink_metadata(path).map_err(error)?;
        Ok(Listener {
            socket,
            made: Some((path.to_owned(), meta.dev(), meta.ino())),
        })
    }

    fn inherited(fd: OwnedFd) -> io::Result<Listener> {
        let socket = UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, made: None })
    }

    /// The path of a socket that was made here, and is to be removed.
    pub fn made_path(&self) -> Option<&Path> {
        self.made.as_ref().map(|(path, _, _)| path.as_path())
    }

    /// The next connection, if one waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The peer gave up while it waited.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, dev, ino)) = &self.made
            && let Ok(meta) = std::fs::symlink_metadata(path)
            && (meta.dev(), meta.ino()) == (*dev, *ino)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn remove_stale_socket(path: &Path) -> Result<(), EndpointError> {
    let error = |source| EndpointError::Bind {
        path: path.to_owned(),
        source,
    };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(error(e)),
    };
    if !meta.file_type().is_socket() {
        return Err(EndpointError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(EndpointError::InUse(path.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(error)
        }
        Err(e) => Err(error(e)),
    }
}
