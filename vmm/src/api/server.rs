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
use crate::socket::Listener;
use crate::telemetry::LogLimit;
use crate::vm::requests::{self, Answer, ReplyTo, RequestSender};

/// Clients at a time; one more takes the place of the one that has been idle for longest.
const MAX_CLIENTS: usize = 32;

/// How long no client is taken after one could not be, as where there are no descriptors: it waits in the
/// socket's queue, and this thread is not to do nothing but try.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
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
    /// Until then no client is taken.
    deaf_until: Option<Instant>,
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
            deaf_until: None,
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
            if self.deaf_until.is_some_and(|until| until <= Instant::now()) {
                self.hear(None);
            }
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(error) => {
                if let Some(suppressed) = NOT_TAKEN.pass() {
                    tracing::warn!(%error, suppressed, "cannot take a client of the API");
                }
                self.hear(Some(Instant::now() + ACCEPT_PAUSE));
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

    /// Takes clients from now on, or none before that time.
    fn hear(&mut self, not_before: Option<Instant>) {
        let interest = match not_before {
            None => EventSet::IN,
            Some(_) => EventSet::empty(),
        };
        let event = EpollEvent::new(interest, LISTENER);
        let fd = self.listener.as_raw_fd();
        // It is in the set, and changing that takes nothing that could be missing.
        let _ = self.epoll.ctl(ControlOperation::Modify, fd, event);
        self.deaf_until = not_before;
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
            // Closing the stream takes it out of the epoll set.
            self.clients.remove(&token);
        }
    }

    fn drop_longest_idle(&mut self) {
        let longest = self
            .clients
            .iter()
            .min_by_key(|(_, connection)| (!connection.is_idle(), connection.since()))
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
        let deadlines = self.clients.values().filter_map(Connection::deadline);
        let next = deadlines.chain(self.deaf_until).min();
        next.map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that it has passed when the wait is over.
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
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
