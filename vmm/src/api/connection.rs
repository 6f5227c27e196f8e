//! One client of the API: bytes in, bytes out, and how long it may take. Knows nothing of epoll.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::http::{self, MAX_BODY, MAX_HEAD, Parsed, Request, Response, Status};
use crate::socket;

/// How long a client may take to send a request it has begun, or to take its answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Most descriptors of a request; a network card has one for each pair of queues.
const MAX_FDS: usize = 64;

/// Whether a connection goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It does.
    Open,
    /// It has ended, or is to.
    Closed,
}

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Served {
    /// It is answered.
    Now(Response),
    /// Its answer will be brought with [`Connection::answer`]; nothing is read before.
    Later,
}

/// A connection.
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    /// Descriptors that came with the input so far.
    fds: Vec<OwnedFd>,
    output: Vec<u8>,
    /// A request is with the driver.
    awaiting: bool,
    /// No more requests: to be closed when the output is out.
    closing: bool,
    /// When it last began something or finished it.
    since: Instant,
}

impl Connection {
    /// A client that was just taken.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            fds: Vec::new(),
            output: Vec::new(),
            awaiting: false,
            closing: false,
            since: Instant::now(),
        })
    }

    /// What it waits for. While a request is with the driver that is only the end of the client, which is
    /// always reported.
    pub(super) fn interest(&self) -> EventSet {
        match (self.awaiting, self.wants_to_write()) {
            (true, _) => EventSet::empty(),
            (false, true) => EventSet::OUT,
            (false, false) => EventSet::IN,
        }
    }

    fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether it has nothing under way.
    pub(super) fn is_idle(&self) -> bool {
        !self.awaiting && !self.wants_to_write() && self.input.is_empty()
    }

    /// When it has been unfinished for too long; `None` while the client is waited for by nobody.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.awaiting && !self.is_idle()).then(|| self.since + PATIENCE)
    }

    /// When it last began something or finished it.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// The stream is ready: reads, has complete requests answered by `serve`, writes.
    pub(super) fn process(&mut self, serve: impl FnMut(&mut Request) -> Served) -> Fate {
        if self.awaiting {
            // Nothing else is reported.
            return Fate::Closed;
        }
        let read = match self.wants_to_write() {
            true => Ok(Fate::Open),
            false => self.fill(),
        };
        self.end(read, serve)
    }

    /// The driver has answered.
    pub(super) fn answer(
        &mut self,
        response: &Response,
        serve: impl FnMut(&mut Request) -> Served,
    ) -> Fate {
        self.awaiting = false;
        self.put(response);
        self.end(Ok(Fate::Open), serve)
    }

    fn end(&mut self, read: io::Result<Fate>, serve: impl FnMut(&mut Request) -> Served) -> Fate {
        match read.and_then(|read| self.exchange(read == Fate::Closed, serve)) {
            Ok(fate) => fate,
            Err(error) => {
                tracing::debug!(%error, "a client of the API is gone");
                Fate::Closed
            }
        }
    }

    /// Answers what has come. A client that has `ended` takes no more than what is written now.
    fn exchange(
        &mut self,
        ended: bool,
        mut serve: impl FnMut(&mut Request) -> Served,
    ) -> io::Result<Fate> {
        self.flush()?;
        while !self.wants_to_write()
            && !self.awaiting
            && !self.closing
            && self.serve_one(&mut serve)
        {
            self.flush()?;
        }
        self.closing |= ended;
        let done = self.closing && !self.awaiting && !self.wants_to_write();
        Ok(if done { Fate::Closed } else { Fate::Open })
    }

    /// Reads what is there, as long as it may be part of a request.
    fn fill(&mut self) -> io::Result<Fate> {
        let mut buffer = [0; 4096];
        while self.input.len() < MAX_HEAD + MAX_BODY && self.fds.len() <= MAX_FDS {
            match socket::receive(&self.stream, &mut buffer).map(|(count, fds)| {
                self.fds.extend(fds);
                count
            }) {
                Ok(0) => return Ok(Fate::Closed),
                Ok(count) => {
                    if self.input.is_empty() {
                        self.since = Instant::now();
                    }
                    self.input.extend_from_slice(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Fate::Open)
    }

    fn serve_one(&mut self, serve: &mut impl FnMut(&mut Request) -> Served) -> bool {
        let served = match http::parse(&self.input) {
            _ if self.fds.len() > MAX_FDS => {
                self.closing = true;
                Served::Now(Response::error(
                    Status::BadRequest,
                    &["too many descriptors"],
                ))
            }
            Parsed::Incomplete => return false,
            Parsed::Bad(status, reason) => {
                self.closing = true;
                Served::Now(Response::error(status, &[reason]))
            }
            Parsed::Complete(mut request, len) => {
                self.input.drain(..len);
                request.fds = std::mem::take(&mut self.fds);
                self.closing = !request.keep_alive;
                serve(&mut request)
            }
        };
        match served {
            Served::Now(response) => self.put(&response),
            Served::Later => self.awaiting = true,
        }
        true
    }

    fn put(&mut self, response: &Response) {
        self.output = response.to_bytes(!self.closing);
        self.since = Instant::now();
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\n\r\n";

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Connection::new(ours).unwrap(), theirs)
    }

    fn serve(request: &mut Request) -> Served {
        Served::Now(Response {
            status: Status::Ok,
            body: Some(format!("\"{}\"", request.path)),
        })
    }

    fn received(client: &mut UnixStream) -> String {
        let mut text = String::new();
        match client.read_to_string(&mut text) {
            Ok(_) => text,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => text,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn requests_may_come_in_pieces_and_several_at_once() {
        let (mut connection, mut client) = pair();
        for byte in REQUEST {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(connection.process(serve), Fate::Open);
        }
        client.write_all(REQUEST).unwrap();
        client.write_all(REQUEST).unwrap();
        assert_eq!(connection.process(serve), Fate::Open);
        assert_eq!(received(&mut client).matches("200 OK").count(), 3);
        assert_eq!(connection.deadline(), None);
    }

    #[test]
    fn a_half_request_has_a_deadline() {
        let (mut connection, mut client) = pair();
        client.write_all(&REQUEST[..5]).unwrap();
        assert_eq!(connection.process(serve), Fate::Open);
        assert!(connection.deadline().is_some());
    }

    #[test]
    fn a_client_that_sends_nonsense_is_told_and_dropped() {
        let (mut connection, mut client) = pair();
        client.write_all(b"\x01\x02\r\n\r\n").unwrap();
        assert_eq!(connection.process(serve), Fate::Closed);
        drop(connection);
        assert!(received(&mut client).starts_with("HTTP/1.1 400"));
    }

    #[test]
    fn an_answer_that_nobody_takes_is_kept_but_not_for_ever() {
        let (mut connection, mut client) = pair();
        let big = |_: &mut Request| {
            Served::Now(Response {
                status: Status::Ok,
                body: Some("x".repeat(4 << 20)),
            })
        };
        client.write_all(REQUEST).unwrap();
        assert_eq!(connection.process(big), Fate::Open);
        assert!(connection.wants_to_write());
        assert!(connection.deadline().is_some());
    }

    #[test]
    fn a_client_that_hangs_up_is_let_go() {
        let (mut connection, client) = pair();
        drop(client);
        assert_eq!(connection.process(serve), Fate::Closed);
    }

    #[test]
    fn an_answer_that_comes_later_goes_before_the_next_request() {
        let (mut connection, mut client) = pair();
        client.write_all(REQUEST).unwrap();
        client.write_all(REQUEST).unwrap();
        assert_eq!(connection.process(|_| Served::Later), Fate::Open);
        assert_eq!(connection.interest(), EventSet::empty());
        assert_eq!(connection.deadline(), None, "it may take its time");
        assert_eq!(received(&mut client), "");
        let late = Response::error(Status::Conflict, &["late"]);
        assert_eq!(connection.answer(&late, serve), Fate::Open);
        let text = received(&mut client);
        let (first, second) = (text.find("409").unwrap(), text.find("200 OK").unwrap());
        assert!(first < second, "{text}");
        assert_eq!(connection.interest(), EventSet::IN);
    }

    #[test]
    fn a_client_that_says_no_more_still_gets_its_answer() {
        let (mut connection, mut client) = pair();
        client.write_all(REQUEST).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(connection.process(|_| Served::Later), Fate::Open);
        let late = Response::error(Status::Conflict, &["late"]);
        assert_eq!(connection.answer(&late, serve), Fate::Closed);
        assert!(received(&mut client).contains("late"));
    }

    #[test]
    fn descriptors_go_to_the_request_that_they_came_with() {
        let (mut connection, mut client) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = [file.as_raw_fd(); 2];
        // They come with the first bytes, the rest of the request later.
        client.send_with_fds(&[&REQUEST[..4]], &fds).unwrap();
        let mut counts = Vec::new();
        let mut count = |request: &mut Request| {
            counts.push(request.fds.len());
            serve(request)
        };
        assert_eq!(connection.process(&mut count), Fate::Open);
        client.write_all(&REQUEST[4..]).unwrap();
        assert_eq!(connection.process(&mut count), Fate::Open);
        client.write_all(REQUEST).unwrap();
        assert_eq!(connection.process(&mut count), Fate::Open);
        assert_eq!(counts, [2, 0]);
    }

    #[test]
    fn a_client_that_sends_descriptors_without_end_is_dropped() {
        let (mut connection, client) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![file.as_raw_fd(); MAX_FDS + 1];
        client.send_with_fds(&[&REQUEST[..4]], &fds).unwrap();
        assert_eq!(connection.process(serve), Fate::Closed);
    }
}
