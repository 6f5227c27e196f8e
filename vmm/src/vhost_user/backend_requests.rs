//! Requests that a backend sends of its own accord (vhost-user, "Back-end message types").
//!
//! One is served: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. Others are refused, with a reply if one is
//! wanted. `vhost`'s own handler waits for the rest of a message that has begun; this one takes what is
//! there and never waits, so a backend that stops in the middle holds nothing up.
//!
//! A backend may send as fast as it can: what is read of the channel has a [`Budget`], and once that is spent
//! the session turns to it again later. What comes meanwhile fills the socket, and then the backend waits.
//!
//! Descriptors that come along are dropped by the kernel: they are not asked for.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes of a header: request, flags, size of the payload.
const HEADER: usize = 12;
/// Most bytes of a payload.
const MAX_PAYLOAD: usize = 0x1000;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// Header flags: protocol version, reply, reply wanted.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// How often the channel is read in how long, each time with at most one look at configuration space.
const READS: u32 = 16;
pub(super) const WINDOW: Duration = Duration::from_millis(100);

/// Our end of the channel.
pub(super) struct BackendRequests {
    stream: UnixStream,
    /// Bytes of a message that is not whole yet.
    buffer: Vec<u8>,
    budget: Budget,
}

/// What a backend may take of the session's time.
#[derive(Default)]
struct Budget {
    /// When the window began, and what was spent in it.
    window: Option<(Instant, u32)>,
}

impl Budget {
    /// Spends one; returns when there is more, if that was the last.
    fn spend(&mut self, now: Instant) -> Option<Instant> {
        let (since, spent) = self
            .window
            .filter(|(since, _)| now < *since + WINDOW)
            .unwrap_or((now, 0));
        self.window = Some((since, spent + 1));
        (spent + 1 >= READS).then_some(since + WINDOW)
    }
}

impl BackendRequests {
    /// A channel, and the end that the backend gets.
    pub(super) fn new() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let channel = Self {
            stream: ours,
            buffer: Vec::new(),
            budget: Budget::default(),
        };
        Ok((channel, theirs))
    }

    /// Takes what has come; returns whether the configuration changed.
    ///
    /// # Errors
    /// The channel is closed, or what came is not a message; it is of no more use then.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        let mut bytes = [0; MAX_PAYLOAD];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.buffer.extend_from_slice(&bytes[..len]),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        let mut changed = false;
        while let Some(message) = self.take()? {
            changed |= self.serve(message)?;
        }
        Ok(changed)
    }

    /// Takes note of a [`Self::receive`]; returns until when there is to be no other, if that was too many.
    pub(super) fn spend(&mut self, now: Instant) -> Option<Instant> {
        self.budget.spend(now)
    }

    /// The next whole message's request, flags and size; its payload is skipped.
    fn take(&mut self) -> io::Result<Option<[u32; 3]>> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|byte| header[4 * i + byte]));
        let message = [word(0), word(1), word(2)];
        let len = message[2] as usize;
        if len > MAX_PAYLOAD || message[1] & (VERSION_MASK | REPLY) != VERSION {
            return Err(ErrorKind::InvalidData.into());
        }
        if self.buffer.len() < HEADER + len {
            return Ok(None);
        }
        self.buffer.drain(..HEADER + len);
        Ok(Some(message))
    }

    fn serve(&mut self, [request, flags, size]: [u32; 3]) -> io::Result<bool> {
        let served = request == CONFIG_CHANGE && size == 0;
        if flags & NEED_REPLY != 0 {
            let result = if served {
                0
            } else {
                u64::from(libc::ENOSYS.unsigned_abs())
            };
            let mut reply = Vec::with_capacity(HEADER + 8);
            for word in [request, VERSION | REPLY, 8] {
                reply.extend(word.to_le_bytes());
            }
            reply.extend(result.to_le_bytes());
            self.stream.write_all(&reply)?;
        }
        Ok(served)
    }
}

/// Serves a backend that sends these bytes; for the fuzz targets.
pub(super) fn fuzz(bytes: &[u8]) {
    let Ok((mut channel, theirs)) = BackendRequests::new() else {
        return;
    };
    for chunk in bytes.chunks(777) {
        if (&theirs).write_all(chunk).is_err() || channel.receive().is_err() {
            return;
        }
        assert!(channel.buffer.len() < HEADER + MAX_PAYLOAD);
    }
}

impl AsRawFd for BackendRequests {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [request, flags, payload.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    fn reply(theirs: &mut UnixStream) -> ([u8; HEADER], u64) {
        let (mut header, mut value) = ([0; HEADER], [0; 8]);
        theirs.read_exact(&mut header).unwrap();
        theirs.read_exact(&mut value).unwrap();
        (header, u64::from_le_bytes(value))
    }

    #[test]
    fn a_change_is_noticed_and_answered_if_an_answer_is_wanted() {
        let (mut ours, mut theirs) = BackendRequests::new().unwrap();
        theirs
            .write_all(&message(CONFIG_CHANGE, VERSION, &[]))
            .unwrap();
        assert!(ours.receive().unwrap());
        assert!(!ours.receive().unwrap());
        theirs
            .write_all(&message(CONFIG_CHANGE, VERSION | NEED_REPLY, &[]))
            .unwrap();
        assert!(ours.receive().unwrap());
        assert_eq!(
            reply(&mut theirs),
            ([2, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0], 0)
        );
    }

    #[test]
    fn a_window_has_so_many_reads_and_the_next_as_many() {
        let mut budget = Budget::default();
        let start = Instant::now();
        for window in 0..3 {
            let begin = start + 2 * WINDOW * window;
            for _ in 1..READS {
                assert_eq!(budget.spend(begin + WINDOW / 2 * (window % 2)), None);
            }
            let last = budget.spend(begin + WINDOW / 2).unwrap();
            assert!(last > begin + WINDOW / 2 && last <= begin + 2 * WINDOW);
        }
        // One that sends now and then never rests.
        for read in 0..10 * READS {
            let now = start + 10 * WINDOW + WINDOW / (READS - 2) * read;
            assert_eq!(budget.spend(now), None, "read {read}");
        }
    }

    #[test]
    fn a_message_in_pieces_waits_for_nobody() {
        let (mut ours, mut theirs) = BackendRequests::new().unwrap();
        let bytes = message(CONFIG_CHANGE, VERSION, &[]);
        theirs.write_all(&bytes[..5]).unwrap();
        assert!(!ours.receive().unwrap());
        assert!(!ours.receive().unwrap());
        theirs.write_all(&bytes[5..]).unwrap();
        assert!(ours.receive().unwrap());
    }

    #[test]
    fn others_are_refused_and_skipped_whole() {
        let (mut ours, mut theirs) = BackendRequests::new().unwrap();
        let mut bytes = message(6, VERSION | NEED_REPLY, &[0x55; 16]);
        bytes.extend(message(CONFIG_CHANGE, VERSION, &[]));
        theirs.write_all(&bytes).unwrap();
        assert!(ours.receive().unwrap());
        assert_eq!(reply(&mut theirs).1, 38);
    }

    #[test]
    fn nonsense_and_the_end_are_errors() {
        for bytes in [
            message(CONFIG_CHANGE, 0, &[]),
            message(CONFIG_CHANGE, VERSION | REPLY, &[]),
            vec![0xff; HEADER],
        ] {
            let (mut ours, mut theirs) = BackendRequests::new().unwrap();
            theirs.write_all(&bytes).unwrap();
            assert_eq!(ours.receive().unwrap_err().kind(), ErrorKind::InvalidData);
        }
        let (mut ours, theirs) = BackendRequests::new().unwrap();
        drop(theirs);
        assert_eq!(ours.receive().unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
