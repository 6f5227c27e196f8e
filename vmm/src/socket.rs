//! Unix sockets: those on which this process listens, which are made, guarded against what is in the way,
//! and removed; connections to others; descriptors that come over one. Nothing here waits for another process.

#![expect(
    unsafe_code,
    reason = "descriptors that are inherited or come by a message are only numbers, and std does not offer \
              connect(2) with SOCK_NONBLOCK"
)]

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest path of a unix socket, its final NUL not counted.
pub const MAX_PATH: usize = 107;

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
    /// A descriptor that was inherited is not what it should be.
    #[error("fd={fd} is not a unix socket that listens")]
    NotListening {
        /// Its number.
        fd: RawFd,
    },
}

/// Where the API's socket comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiSocket {
    /// Made at this path.
    Path(PathBuf),
    /// Inherited, listening; whoever made it removes its path.
    Fd(RawFd),
}

impl ApiSocket {
    /// Its path, where this process makes it.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Fd(_) => None,
        }
    }
}

/// A listening socket; dropped, its path is removed.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: Option<PathBuf>,
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
            Ok(_) => remove_if_dead(path)?,
        }
        let listener = UnixListener::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Ok(Self {
            listener,
            path: Some(path.to_owned()),
        })
    }

    /// Listens on a socket that this process inherited as descriptor `fd`. To be called once for it, before
    /// anything else could be opened in its place.
    pub fn inherit(fd: RawFd) -> Result<Self, Error> {
        let not_listening = || Error::NotListening { fd };
        let option = |name| {
            let (mut value, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
            // SAFETY: an int is written to an int, of whose size the system is told; any number may be asked
            // about.
            let result = unsafe {
                libc::getsockopt(
                    fd,
                    libc::SOL_SOCKET,
                    name,
                    (&raw mut value).cast(),
                    &raw mut len,
                )
            };
            (result == 0).then_some(value)
        };
        if option(libc::SO_DOMAIN) != Some(libc::AF_UNIX) || option(libc::SO_ACCEPTCONN) != Some(1)
        {
            return Err(not_listening());
        }
        // SAFETY: it is open, as the system just answered for it, and whoever started this process gave it
        // away by naming it; nothing here has opened or claimed it.
        let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let ready = listener.set_nonblocking(true);
        ready.map_err(|_| not_listening())?;
        Ok(Self {
            listener,
            path: None,
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
        if let Some(path) = &self.path {
            // It may be gone already; nothing depends on it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Connects to `path` if somebody takes the connection at once.
///
/// # Errors
/// `NotFound` and `ConnectionRefused` where nobody listens (yet), `WouldBlock` where the listener does
/// not keep up, `InvalidInput` for a path that no socket can have.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
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

/// Removes a socket that nobody listens on any more.
fn remove_if_dead(path: &Path) -> Result<(), Error> {
    let error = |source| Error::Bind {
        path: path.to_owned(),
        source,
    };
    let removed = match connect(path) {
        Err(source) if source.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        // A queue that is full is somebody's, too.
        Err(source) if source.kind() != ErrorKind::WouldBlock => Err(source),
        _ => return Err(Error::InUse { path: path.into() }),
    };
    match removed {
        // Its owner removed it meanwhile.
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(error),
    }
}

/// Takes a message with its descriptors, which no program inherits.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iovec = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // As u64, so that it is aligned as a cmsghdr; room for more descriptors than a message may carry.
    let mut control = [0_u64; 256];
    // SAFETY: all zeros is a msghdr without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: `message` points to `buffer` and `control`, with their lengths, which outlive the call.
    let len =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` with as many headers as `msg_controllen` says, which the macros
    // walk; a header of SCM_RIGHTS is followed by as many descriptors as fit its length, made for us.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let part = &*header;
            if (part.cmsg_level, part.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(header);
                let bytes = part.cmsg_len as usize - (data.addr() - header.addr());
                for index in 0..bytes / size_of::<RawFd>() {
                    let fd = data.cast::<RawFd>().add(index).read_unaligned();
                    fds.push(OwnedFd::from_raw_fd(fd));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((len as usize, fds))
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
    fn only_a_socket_that_listens_is_inherited() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        let made = UnixListener::bind(&path).unwrap();
        let listener = Listener::inherit(std::os::fd::IntoRawFd::into_raw_fd(made)).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(path.exists(), "it is not ours to remove");

        let (one, _other) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for fd in [one.as_raw_fd(), file.as_raw_fd(), 12345] {
            assert!(Listener::inherit(fd).is_err(), "{fd}");
        }
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

    #[test]
    fn a_socket_whose_owner_does_not_take_connections_is_in_use_and_waited_for_by_nobody() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        let _stuck = UnixListener::bind(&path).unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) = connect(&path) {
            queue.push(stream);
        }
        assert!(matches!(Listener::bind(&path), Err(Error::InUse { .. })));
    }

    #[test]
    fn a_socket_that_cannot_be_asked_is_left_alone() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("socket");
        // EPROTOTYPE: it is alive and of another type.
        let _other = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(Error::Bind { .. })));
        assert!(path.exists());
    }
}
