//! Unix sockets on which this process listens: made, guarded against what is in the way, and removed.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why nothing listens at a path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some other file is there.
    #[error("cannot listen on {}: it exists and is not a socket", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error("cannot listen on {}: another process listens there", .path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The system's answer.
    #[error("cannot listen on {}", .path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A listening socket; dropped, its path is removed.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, non-blocking. A socket that a dead process left there is replaced.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let error = |source| Error::Bind {
            path: path.to_owned(),
            source,
        };
        match std::fs::symlink_metadata(path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(error(source)),
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(Error::NotASocket { path: path.into() });
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(Error::InUse { path: path.into() });
            }
            Ok(_) => std::fs::remove_file(path).map_err(error)?,
        }
        let listener = UnixListener::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Takes a client, if one waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may be gone already; nothing depends on it.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn a_file_and_a_live_socket_are_left_alone() {
        let dir = TempDir::new().unwrap();
        let file = dir.as_path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(
            Listener::bind(&file),
            Err(Error::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");

        let path = dir.as_path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(Error::InUse { .. })));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&path).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
    }
}
