//! Connecting to a backend's socket without ever waiting for it.
//!
//! `connect` on a unix socket blocks while the listener's backlog is full, as it is when a stopped
//! backend was dialled often enough; std offers no other way, so the call is made here.

#![allow(
    unsafe_code,
    reason = "socket(2) and connect(2) with SOCK_NONBLOCK, which std does not offer"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Longest path of a unix socket, its final NUL not counted.
pub(super) const MAX_PATH: usize = 107;

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
    use std::io::ErrorKind;
    use std::os::unix::net::UnixListener;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

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
