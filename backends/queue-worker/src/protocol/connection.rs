//! A vhost-user socket that never blocks the control thread on a slow or silent peer.
//!
//! The stream is read in two steps, header and payload, each as far as bytes are there; fds that
//! arrive with any of them belong to the message under way (the kernel never merges bytes across
//! an SCM_RIGHTS boundary into one read, and we never read past a message's end). Threads: used by
//! the control thread only. Spec: vhost-user, "Communication".
#![expect(unsafe_code, reason = "recvmsg and sendmsg with SCM_RIGHTS")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::message::{CodecError, HEADER_SIZE, Header, MAX_FDS, Request};

/// How long a peer may leave our reply unread before the session ends.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer closed between two messages: the normal end.
    #[error("the frontend disconnected")]
    Closed,
    /// The peer closed in the middle of a message.
    #[error("the frontend disconnected in the middle of a message")]
    Truncated,
    /// Bytes that are no vhost-user message.
    #[error("the frontend broke the protocol")]
    Codec(#[from] CodecError),
    /// More fds than a message may carry.
    #[error("the frontend sent more than {MAX_FDS} file descriptors in one message")]
    TooManyFds,
    /// The peer does not read.
    #[error("the frontend did not take a reply within {} s", SEND_TIMEOUT.as_secs())]
    SendTimeout,
    /// The socket failed.
    #[error("vhost-user socket")]
    Io(#[from] io::Error),
}

/// One complete request.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its content.
    pub request: Request,
    /// Its fds, as many as the request wants.
    pub fds: Vec<OwnedFd>,
}

/// A connected vhost-user socket.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    header: [u8; HEADER_SIZE],
    payload: Vec<u8>,
    /// Bytes of header and payload that have come.
    have: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Takes over a connected socket and makes it non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        Ok(Connection {
            stream,
            header: [0; HEADER_SIZE],
            payload: Vec::new(),
            have: 0,
            fds: Vec::new(),
        })
    }

    /// The next message, or `None` where it has not come completely yet: poll and call again.
    pub fn receive(&mut self) -> Result<Option<Message>, ConnectionError> {
        while self.have < HEADER_SIZE {
            let mut header = self.header;
            let Some(got) = self.read_some(&mut header[self.have..])? else {
                return Ok(None);
            };
            self.header = header;
            self.have += got;
        }
        let header = Header::parse(&self.header)?;
        self.payload.resize(header.size, 0);
        while self.have < HEADER_SIZE + header.size {
            let mut payload = std::mem::take(&mut self.payload);
            let got = self.read_some(&mut payload[self.have - HEADER_SIZE..]);
            self.payload = payload;
            match got? {
                Some(got) => self.have += got,
                None => return Ok(None),
            }
        }
        self.have = 0;
        let fds = std::mem::take(&mut self.fds);
        let request = Request::parse(&header, &self.payload, fds.len())?;
        Ok(Some(Message {
            header,
            request,
            fds,
        }))
    }

    /// Reads what is there, `None` where there is nothing.
    fn read_some(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ConnectionError> {
        match receive_with_fds(self.stream.as_fd(), buf, &mut self.fds) {
            Ok(0) if self.have == 0 => Err(ConnectionError::Closed),
            Ok(0) => Err(ConnectionError::Truncated),
            Ok(_) if self.fds.len() > MAX_FDS => Err(ConnectionError::TooManyFds),
            Ok(got) => Ok(Some(got)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(ConnectionError::Closed),
            // The kernel dropped fds that did not fit.
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => Err(ConnectionError::TooManyFds),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends a reply; waits for room, but not for ever.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        self.send_with(bytes, &[])
    }

    /// Sends a reply with fds; waits for room, but not for ever.
    pub fn send_with(
        &mut self,
        mut bytes: &[u8],
        mut fds: &[BorrowedFd],
    ) -> Result<(), ConnectionError> {
        while !bytes.is_empty() {
            match send_with_fds(self.stream.as_fd(), bytes, fds) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    // They went with the first byte.
                    fds = &[];
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait_writable()?,
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(ConnectionError::Closed);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn wait_writable(&self) -> Result<(), ConnectionError> {
        let mut poll = libc::pollfd {
            fd: self.stream.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        let timeout_ms = i32::try_from(SEND_TIMEOUT.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, on our stack.
        match unsafe { libc::poll(&mut poll, 1, timeout_ms) } {
            0 => Err(ConnectionError::SendTimeout),
            n if n > 0 => Ok(()),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
                e => Err(e.into()),
            },
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Room for MAX_FDS fds and one more, so that "too many" can be seen; aligned for cmsghdr.
#[repr(C, align(8))]
struct ControlBuffer([u8; 16 + 4 * (MAX_FDS + 2)]);

/// One `recvmsg`: bytes into `buf`, fds (close-on-exec) appended to `fds`. EMSGSIZE where the
/// peer sent more fds than we have room for; those that fitted are in `fds`.
pub fn receive_with_fds(
    socket: BorrowedFd,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut control = ControlBuffer([0; 16 + 4 * (MAX_FDS + 2)]);
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: msghdr is plain data; all zeros is a valid one.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = (&raw mut control).cast();
    msg.msg_controllen = size_of::<ControlBuffer>() as _;
    let got = loop {
        // SAFETY: msg points to one iovec over `buf` and to `control`, which outlive the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC) };
        if got >= 0 {
            break got as usize;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    // SAFETY: the kernel filled msg and control; CMSG_* walk within msg_controllen, and every fd
    // found there is new and ours alone. Fds are read unaligned because only the header is aligned.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
        while !cmsg.is_null() {
            if ((*cmsg).cmsg_level, (*cmsg).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = (*cmsg).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(cmsg).cast::<i32>();
                for n in 0..bytes / size_of::<i32>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(n).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&msg, cmsg);
        }
    }
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok(got)
}

/// One `sendmsg` of `buf` with `fds`; says how many bytes went. Never raises SIGPIPE.
pub fn send_with_fds(socket: BorrowedFd, buf: &[u8], fds: &[BorrowedFd]) -> io::Result<usize> {
    let mut control = ControlBuffer([0; 16 + 4 * (MAX_FDS + 2)]);
    if fds.len() > MAX_FDS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut iov = libc::iovec {
        iov_base: buf.as_ptr().cast_mut().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: msghdr is plain data; all zeros is a valid one.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = (fds.len() * size_of::<i32>()) as u32;
        msg.msg_control = (&raw mut control).cast();
        // SAFETY: CMSG_SPACE only computes; control has room for MAX_FDS (checked above), so
        // FIRSTHDR is not null and the data fits behind it.
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(bytes) as _;
            let cmsg = libc::CMSG_FIRSTHDR(&msg);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let data = libc::CMSG_DATA(cmsg).cast::<i32>();
            for (n, fd) in fds.iter().enumerate() {
                data.add(n).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    loop {
        // SAFETY: msg points to one iovec over `buf` and to `control`, which outlive the call.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(sent as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
