//! Where serial output ends.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::event_loop::{Interest, poll_one};

/// How long a reader of a pty or socket may take for one chunk before it is dropped.
const CHUNK_PATIENCE_MS: i32 = 1000;

/// A place for bytes; clones are the same place.
#[derive(Clone, Default)]
pub enum Sink {
    /// No reader.
    #[default]
    Nobody,
    /// A file or the VMM's standard output: as long as it takes.
    File(Arc<File>),
    /// Master side of a pseudo-terminal, non-blocking.
    Pty(Arc<File>),
    /// The client of a socket, non-blocking.
    Socket(Arc<UnixStream>),
}

/// What became of a chunk.
#[derive(Debug)]
pub enum Written {
    /// All of it is written.
    All,
    /// So many bytes of it; the reader is too slow or absent.
    Part(usize),
    /// The place is gone.
    Failed(io::Error),
}

impl Sink {
    /// The client of a socket.
    pub fn socket(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::Socket(Arc::new(stream)))
    }

    /// Whether nobody can be reading.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Nobody)
    }

    /// Whether both are the same open file.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Nobody, Self::Nobody) => true,
            (Self::File(a), Self::File(b)) | (Self::Pty(a), Self::Pty(b)) => Arc::ptr_eq(a, b),
            (Self::Socket(a), Self::Socket(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Writes a chunk; blocks as the variants say.
    pub fn write(&self, chunk: &[u8]) -> Written {
        match self {
            Self::Nobody => Written::Part(0),
            Self::File(file) => match (&**file).write_all(chunk) {
                Ok(()) => Written::All,
                Err(error) => Written::Failed(error),
            },
            Self::Pty(master) => write_patiently(&**master, master.as_fd(), chunk),
            Self::Socket(stream) => write_patiently(&**stream, stream.as_fd(), chunk),
        }
    }
}

fn write_patiently(mut to: impl Write, fd: BorrowedFd<'_>, chunk: &[u8]) -> Written {
    let mut done = 0;
    while done < chunk.len() {
        match to.write(&chunk[done..]) {
            Ok(0) => return Written::Part(done),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match poll_one(fd, Interest::Write, CHUNK_PATIENCE_MS) {
                    Ok(true) => {}
                    Ok(false) => return Written::Part(done),
                    Err(error) => return Written::Failed(error),
                }
            }
            Err(error) => return Written::Failed(error),
        }
    }
    Written::All
}
