//! The thread `api`: all clients in one epoll set, so that a slow one holds up nobody.
//!
//! Nothing is waited for here: a request goes to the driver, and its answer comes back by an event, at once
//! or when a boot or a new device has come to something. Meanwhile the client's next requests wait, and
//! other clients are served.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Fate, Served};
use super::handlers::{Route, answer, route};
use super::http::Request;
use crate::event_loop::rest::{self, Rest};
use crate::socket::Listener;
use crate::telemetry::LogLimit;
use crate::vm::requests::{self, Answer, ReplyTo, RequestSender};

/// Clients at a time. One more waits in the socket's queue, until one leaves or has been idle for
/// [`IDLE_PATIENCE`]: a client that waits for an answer is never sent away.
pub(super) const MAX_CLIENTS: usize = 32;
const IDLE_PATIENCE: Duration = Duration::from_secs(1);

static NOT_TAKEN: LogLimit = LogLimit::new(Duration::from_secs(10));

const LISTENER: u64 = 0;
const STOP: u64 = 1;
const ANSWERS: u64 = 2;
const FIRST_CLIENT: u64 = 3;

/// Everything that the thread owns.
pub(super) struct Server {
    epoll: Epoll,
    listener: Listener,
    stop: EventFd,
    driver: Driver,
    answers: Receiver<Answer>,
    clients: BTreeMap<u64, Connection>,
    next_client: u64,
    /// Whether no client is taken.
    rest: Rest,
}

/// The way to the driver and back.
struct Driver {
    requests: RequestSender,
    answers: Sender<Answer>,
    answered: Arc<EventFd>,
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
        let answered = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        epoll.ctl(
            ControlOperation::Add,
            answered.as_raw_fd(),
            readable(ANSWERS),
        )?;
        let (sender, answers) = channel();
        Ok(Self {
            epoll,
            listener,
            stop,
            driver: Driver {
                requests,
                answers: sender,
                answered,
            },
            answers,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            rest: Rest::default(),
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
                    ANSWERS => self.process_answers(),
                    STOP => {
                        // The last answer is that to the request which ended the VMM.
                        self.process_answers();
                        // Reset only for order's sake.
                        let _ = self.stop.read();
                        return;
                    }
                    client => self.process_client(client),
                }
            }
            self.drop_late();
            let listener = self.listener.as_raw_fd();
            self.rest.end_if_due(&self.epoll, listener, LISTENER);
        }
    }

    fn accept(&mut self) {
        if self.clients.len() >= MAX_CLIENTS
            && let Err(until) = self.drop_longest_idle()
        {
            return self.rest(until);
        }
        let stream = match self.listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(error) => {
                if let Some(suppressed) = NOT_TAKEN.pass() {
                    tracing::warn!(%error, suppressed, "cannot take a client of the API");
                }
                return self.rest(Some(Instant::now() + rest::AFTER_A_FAILURE));
            }
        };
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

    /// Takes no client until then, or until one leaves.
    fn rest(&mut self, until: Option<Instant>) {
        let listener = self.listener.as_raw_fd();
        self.rest.begin(&self.epoll, listener, LISTENER, until);
    }

    /// Lets go of a client: closing its stream takes it out of the epoll set, and makes room for another.
    fn remove(&mut self, token: u64) {
        self.clients.remove(&token);
        let listener = self.listener.as_raw_fd();
        self.rest.end(&self.epoll, listener, LISTENER);
    }

    fn process_client(&mut self, token: u64) {
        let Some(connection) = self.clients.get_mut(&token) else {
            return;
        };
        let driver = &self.driver;
        let fate = connection.process(|request| driver.serve(token, request));
        self.settle(token, fate);
    }

    fn process_answers(&mut self) {
        // Reset before they are taken, so that one that comes meanwhile signals anew.
        let _ = self.driver.answered.read();
        while let Ok((token, reply)) = self.answers.try_recv() {
            // The client may have gone.
            if let Some(connection) = self.clients.get_mut(&token) {
                let driver = &self.driver;
                let fate =
                    connection.answer(&answer(reply), |request| driver.serve(token, request));
                self.settle(token, fate);
            }
        }
    }

    /// Waits for what the connection waits for now, or lets go of it.
    fn settle(&mut self, token: u64, fate: Fate) {
        let Some(connection) = self.clients.get(&token) else {
            return;
        };
        let event = EpollEvent::new(connection.interest(), token);
        let fd = connection.as_raw_fd();
        let lost = self.epoll.ctl(ControlOperation::Modify, fd, event).is_err();
        if lost || fate == Fate::Closed {
            self.remove(token);
        }
    }

    /// Makes room for a client, or says when there may be some, which is `None` while all are busy.
    fn drop_longest_idle(&mut self) -> Result<(), Option<Instant>> {
        let idle = self.clients.iter().filter(|(_, client)| client.is_idle());
        let longest = idle.map(|(&token, client)| (client.since(), token)).min();
        let (since, token) = longest.ok_or(None)?;
        let until = since + IDLE_PATIENCE;
        if until > Instant::now() {
            return Err(Some(until));
        }
        self.remove(token);
        Ok(())
    }

    fn drop_late(&mut self) {
        let now = Instant::now();
        let deadlines = self.clients.iter();
        let late: Vec<_> = deadlines
            .filter(|(_, client)| client.deadline().is_some_and(|deadline| deadline <= now))
            .map(|(&token, _)| token)
            .collect();
        for token in late {
            self.remove(token);
        }
    }

    /// Until the next deadline; -1 without one.
    fn timeout_ms(&self) -> i32 {
        let deadlines = self.clients.values().filter_map(Connection::deadline);
        rest::timeout_ms(deadlines.chain(self.rest.deadline()).min())
    }
}

impl Driver {
    fn serve(&self, client: u64, request: &mut Request) -> Served {
        let command = match route(request) {
            Route::Answer(response) => return Served::Now(response),
            Route::Ask(command) => command,
        };
        tracing::debug!(method = request.method, path = request.path, "API request");
        let reply = ReplyTo::new(client, self.answers.clone(), Arc::clone(&self.answered));
        self.requests
            .send(requests::Request::Command(command, reply));
        Served::Later
    }
}
