//! The thread `api`: all clients in one epoll set, so that a slow one holds up nobody.
//!
//! Only the driver's own answer is waited for, which it gives at once whatever a backend does.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Fate};
use super::handlers::{Route, answer, route};
use super::http::{Request, Response, Status};
use crate::socket::Listener;
use crate::vm::requests::{Command, RequestSender};

/// Clients at a time; one more takes the place of the one that has been idle for longest.
const MAX_CLIENTS: usize = 32;
/// How long the driver may take; longer than its longest wait, that for vCPUs.
const DRIVER_PATIENCE: Duration = Duration::from_secs(10);

const LISTENER: u64 = 0;
const STOP: u64 = 1;
const FIRST_CLIENT: u64 = 2;

/// Everything that the thread owns.
pub(super) struct Server {
    epoll: Epoll,
    listener: Listener,
    stop: EventFd,
    requests: RequestSender,
    clients: BTreeMap<u64, Connection>,
    next_client: u64,
}

impl Server {
    /// A server on a socket, which ends when `stop` is signalled.
    pub(super) fn new(
        listener: Listener,
        stop: EventFd,
        requests: RequestSender,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let readable = |token| EpollEvent::new(EventSet::IN, token);
        epoll.ctl(
            ControlOperation::Add,
            listener.as_raw_fd(),
            readable(LISTENER),
        )?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), readable(STOP))?;
        Ok(Self {
            epoll,
            listener,
            stop,
            requests,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
        })
    }

    /// Serves until told to stop.
    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(self.timeout_ms(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the API has stopped");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept(),
                    STOP => {
                        // Reset only for order's sake.
                        let _ = self.stop.read();
                        return;
                    }
                    client => self.process_client(client),
                }
            }
            self.drop_late();
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot take a client of the API");
                return;
            }
        };
        if self.clients.len() >= MAX_CLIENTS {
            self.drop_longest_idle();
        }
        let token = self.next_client;
        self.next_client += 1;
        let added = Connection::new(stream).and_then(|connection| {
            let event = EpollEvent::new(EventSet::IN, token);
            self.epoll
                .ctl(ControlOperation::Add, connection.as_raw_fd(), event)?;
            Ok(connection)
        });
        match added {
            Ok(connection) => drop(self.clients.insert(token, connection)),
            Err(error) => tracing::warn!(%error, "cannot serve a client of the API"),
        }
    }

    fn process_client(&mut self, token: u64) {
        let Some(connection) = self.clients.get_mut(&token) else {
            return;
        };
        let requests = &self.requests;
        let mut fate = connection.process(|request| serve(requests, request));
        let wanted = if connection.wants_to_write() {
            EventSet::OUT
        } else {
            EventSet::IN
        };
        let event = EpollEvent::new(wanted, token);
        let fd = connection.as_raw_fd();
        if self.epoll.ctl(ControlOperation::Modify, fd, event).is_err() {
            fate = Fate::Closed;
        }
        if fate == Fate::Closed {
            // Closing the stream takes it out of the epoll set.
            self.clients.remove(&token);
        }
    }

    fn drop_longest_idle(&mut self) {
        let longest = self
            .clients
            .iter()
            .min_by_key(|(_, connection)| (connection.deadline().is_some(), connection.since()))
            .map(|(token, _)| *token);
        if let Some(token) = longest {
            self.clients.remove(&token);
        }
    }

    fn drop_late(&mut self) {
        let now = Instant::now();
        self.clients
            .retain(|_, connection| connection.deadline().is_none_or(|deadline| deadline > now));
    }

    /// Until the next deadline; -1 without one.
    fn timeout_ms(&self) -> i32 {
        let next = self.clients.values().filter_map(Connection::deadline).min();
        next.map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that it has passed when the wait is over.
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }
}

fn serve(requests: &RequestSender, request: &Request) -> Response {
    let command = match route(request) {
        Route::Answer(response) => return response,
        Route::Ask(command) => command,
    };
    tracing::debug!(method = request.method, path = request.path, "API request");
    ask(requests, command)
}

fn ask(requests: &RequestSender, command: Command) -> Response {
    let (reply, answered) = sync_channel(1);
    requests.send(crate::vm::requests::Request::Command(command, reply));
    match answered.recv_timeout(DRIVER_PATIENCE) {
        Ok(reply) => answer(reply),
        Err(RecvTimeoutError::Timeout) => Response::error(
            Status::InternalServerError,
            &["the VMM did not answer in time"],
        ),
        Err(RecvTimeoutError::Disconnected) => {
            Response::error(Status::InternalServerError, &["the VMM is ending"])
        }
    }
}
