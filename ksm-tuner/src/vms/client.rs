//! HTTP/1.1 over a unix socket, as much of it as the VMM's API speaks. One request a connection.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// More than the largest answer: the hashes of 1 GiB.
const MOST_BYTES: u64 = 16 << 20;

/// Why a VM gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("{}", .socket.display())]
    Socket {
        /// Which.
        socket: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It refused.
    #[error("{request}: {status}: {reason}")]
    Refused {
        /// What was asked.
        request: String,
        /// HTTP's code.
        status: u16,
        /// In its words.
        reason: String,
    },
    /// It is not the API that we know.
    #[error("{request}: not an answer of the API: {reason}")]
    Answer {
        /// What was asked.
        request: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The API of one VM.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
    patience: Duration,
}

impl Api {
    /// The API behind a socket; a request as a whole may take `patience`.
    pub fn new(socket: &Path, patience: Duration) -> Self {
        Self {
            socket: socket.to_owned(),
            patience,
        }
    }

    /// GET.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let answer = self.ask("GET", name, "")?;
        parse(&format!("GET {name}"), &answer)
    }

    /// PUT that is answered with something.
    pub fn put<T: DeserializeOwned>(&self, name: &str, body: &impl Serialize) -> Result<T, Error> {
        let answer = self.put_bytes(name, body)?;
        parse(&format!("PUT {name}"), &answer)
    }

    /// PUT that is answered with nothing.
    pub fn tell(&self, name: &str, body: &impl Serialize) -> Result<(), Error> {
        self.put_bytes(name, body).map(drop)
    }

    fn put_bytes(&self, name: &str, body: &impl Serialize) -> Result<Vec<u8>, Error> {
        let body = serde_json::to_string(body).map_err(|error| Error::Answer {
            request: format!("PUT {name}"),
            reason: error.to_string(),
        })?;
        self.ask("PUT", name, &body)
    }

    /// The process that listens on the socket, as the kernel says.
    pub fn peer_pid(&self) -> Option<u32> {
        let stream = self.connect().ok()?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    fn ask(&self, method: &str, name: &str, body: &str) -> Result<Vec<u8>, Error> {
        let bytes = self
            .exchange(method, name, body)
            .map_err(|source| Error::Socket {
                socket: self.socket.clone(),
                source,
            })?;
        let request = || format!("{method} {name}");
        let bad = |reason: &str| Error::Answer {
            request: request(),
            reason: reason.to_owned(),
        };
        let end = bytes
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .ok_or_else(|| bad("it has no end of its head"))?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let status: u16 = head
            .split_whitespace()
            .nth(1)
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| bad("it has no status"))?;
        let body = &bytes[end + 4..];
        if !(200..300).contains(&status) {
            let reasons: Vec<String> = serde_json::from_slice(body).unwrap_or_default();
            return Err(Error::Refused {
                request: request(),
                status,
                reason: reasons.join(": "),
            });
        }
        Ok(body.to_vec())
    }

    /// Fails at once where the VMM takes no clients, instead of waiting in its backlog.
    fn connect(&self) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        net::connect(&socket, &SocketAddrUnix::new(&self.socket)?)?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    fn exchange(&self, method: &str, name: &str, body: &str) -> io::Result<Vec<u8>> {
        let until = Instant::now() + self.patience;
        let mut stream = self.connect()?;
        stream.set_write_timeout(Some(self.patience))?;
        let len = body.len();
        let request = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes())?;
        let mut bytes = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || bytes.len() as u64 > MOST_BYTES {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn parse<T: DeserializeOwned>(request: &str, body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| Error::Answer {
        request: request.to_owned(),
        reason: error.to_string(),
    })
}
