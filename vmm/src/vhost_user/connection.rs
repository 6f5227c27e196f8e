//! A backend that is connected: what it runs, and what is asked of it until the connection ends.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config_writes::ConfigWrites;
use super::kind::{Found, Offer};
use super::peer::{Error, Peer};
use super::session::{DAEMON_LOG, End, REQUESTS, RING_ERROR, SOCKET, Session, WAKE, waiting};
use super::shared::{Rings, SessionState, Shared};
use super::vring::Running;
use super::wait::{Ready, Waiter};
use crate::telemetry::LogLimit;

/// A guest can break its rings, and write what is refused, as often as it likes.
static RING_ERRORS: LogLimit = LogLimit::new(Duration::from_secs(10));
static REFUSED_WRITES: LogLimit = LogLimit::new(Duration::from_secs(10));
/// And a backend can send requests.
static FLOODS: LogLimit = LogLimit::new(Duration::from_secs(10));

pub(super) struct Connection {
    pub(super) peer: Peer,
    pub(super) found: Found,
    pub(super) offer: Offer,
    pub(super) waiter: Waiter,
    pub(super) running: Option<(Arc<Rings>, Running)>,
    /// Until when the backend's requests are not looked at, as there were too many.
    pub(super) deaf_until: Option<Instant>,
}

/// What is to be done, taken from the wish all at once.
struct Work {
    quit: bool,
    wanted: Option<Arc<Rings>>,
    config_writes: ConfigWrites,
    new_calls: BTreeSet<u16>,
}

impl Connection {
    /// Serves the device until the connection ends.
    pub(super) fn serve(&mut self, session: &mut Session) -> Result<Infallible, End> {
        self.publish(&session.shared);
        session.live(self.offer.queues);
        loop {
            while self.reconcile(session)? {}
            for ready in self.waiter.wait(self.deaf_until).map_err(waiting)? {
                self.handle(&ready, session)?;
            }
            self.listen_again()?;
        }
    }

    fn handle(&mut self, ready: &Ready, session: &mut Session) -> Result<(), End> {
        match ready.token {
            WAKE => {
                let _ = session.shared.wake_event().read();
            }
            SOCKET if ready.hung_up => return Err(Error::Closed.into()),
            SOCKET => return Err(Error::Unfit("it spoke without being asked".to_owned()).into()),
            DAEMON_LOG => {
                if let Some(daemon) = &mut session.daemon
                    && !daemon.process_log()
                {
                    self.waiter.forget(&daemon.log_event());
                }
            }
            REQUESTS => self.backend_requests(session)?,
            token => self.ring_error((token - RING_ERROR) as usize, &session.shared),
        }
        Ok(())
    }

    fn backend_requests(&mut self, session: &Session) -> Result<(), End> {
        let Some(requests) = &mut self.peer.requests else {
            return Ok(());
        };
        let received = requests.receive();
        if received.is_ok() {
            self.deaf_until = requests.spend(Instant::now());
        }
        if self.deaf_until.is_some() {
            self.waiter.forget(requests);
            if let Some(suppressed) = FLOODS.pass() {
                let device = session.shared.id();
                tracing::warn!(device, suppressed, "the backend floods its request channel");
            }
        }
        match received {
            Ok(false) => Ok(()),
            Ok(true) => self.refresh(session),
            Err(error) => {
                let device = session.shared.id();
                tracing::warn!(device, %error, "the backend's request channel is of no more use");
                if let Some(requests) = self.peer.requests.take() {
                    self.waiter.forget(&requests);
                }
                Ok(())
            }
        }
    }

    /// Turns to the backend's requests again when it is time.
    fn listen_again(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if self.deaf_until.take_if(|until| *until <= now).is_some()
            && let Some(requests) = &self.peer.requests
        {
            self.waiter.watch(requests, REQUESTS).map_err(waiting)?;
        }
        Ok(())
    }

    /// Reads configuration space again and shows it to the guest.
    fn refresh(&mut self, session: &Session) -> Result<(), End> {
        let kind = &session.shared.kind;
        self.peer.begin(session.limit);
        self.found.config = self.peer.read_config(kind)?;
        let offer = kind.offer(&self.found).map_err(Error::Unfit)?;
        self.offer = session.shared.reach.limit(kind, offer);
        self.publish(&session.shared);
        Ok(())
    }

    fn publish(&self, shared: &Shared) {
        let mut state = shared.state();
        let old = state.offer.replace(self.offer.clone());
        if old.is_some_and(|old| old.config != self.offer.config)
            && let Some(notify) = &state.notify
        {
            notify.config_changed();
        }
    }

    fn ring_error(&self, index: usize, shared: &Shared) {
        let Some((rings, running)) = &self.running else {
            return;
        };
        let queue = rings.rings.get(index).map(|ring| ring.index);
        if let (Some(err), Some(queue)) = (running.errors().nth(index), queue) {
            let _ = err.read();
            if let Some(suppressed) = RING_ERRORS.pass() {
                let device = shared.id();
                let suspicion = shared.reach.suspicion(rings);
                tracing::warn!(
                    device,
                    queue,
                    suppressed,
                    "the backend gave the queue up{suspicion}"
                );
            }
            shared.reach.gave_up(rings);
            if let Some(notify) = &shared.state().notify {
                notify.needs_reset();
            }
        }
    }

    /// Does one thing that is wished for; returns whether there may be more.
    fn reconcile(&mut self, session: &mut Session) -> Result<bool, End> {
        let running = self.running.as_ref().map(|(rings, _)| rings);
        let work = Work::take(&session.shared, running);
        let limit = session.limit;
        if work.quit {
            self.stop(limit)?;
            return Err(End::Quit);
        }
        let as_wished = match (running, &work.wanted) {
            (Some(running), Some(wanted)) => Arc::ptr_eq(running, wanted),
            (None, None) => true,
            _ => false,
        };
        if !as_wished {
            if running.is_some() {
                self.stop(limit)?;
                session.shared.let_go();
                session.forget_driver();
            } else if let Some(rings) = work.wanted {
                self.start(rings, session)?;
            }
            return Ok(true);
        }
        let mut writes = work.config_writes.into_iter();
        while let Some((offset, data)) = writes.next() {
            let written = self.write_config(offset, data, session);
            if written.is_err() {
                // The successor has to hear of the others too.
                for (offset, data) in writes.by_ref() {
                    session.written.push(offset, data);
                }
            }
            written?;
        }
        if let Some((rings, running)) = &self.running {
            for queue in work.new_calls {
                self.peer.begin(limit);
                running.set_call(&mut self.peer, rings, queue)?;
            }
        }
        Ok(false)
    }

    fn write_config(
        &mut self,
        offset: usize,
        data: Vec<u8>,
        session: &mut Session,
    ) -> Result<(), End> {
        self.peer.begin(session.limit);
        let written = self.peer.write_config(offset, &data);
        // Also where the backend went before it answered: its successor has to hear of it.
        if !matches!(written, Err(Error::Refused { .. })) {
            session.written.push(offset, data);
        }
        match written {
            Ok(()) => Ok(()),
            Err(error @ Error::Refused { .. }) => {
                if let Some(suppressed) = REFUSED_WRITES.pass() {
                    let device = session.shared.id();
                    tracing::warn!(device, offset, suppressed, %error, "a driver's write");
                }
                self.refresh(session)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn start(&mut self, rings: Arc<Rings>, session: &mut Session) -> Result<(), End> {
        if let Err(reason) = self.offer.fits(&rings) {
            session.shared.refuse(&rings, &reason);
            session.shared.let_go();
            return Ok(());
        }
        let resume = session
            .begun
            .as_ref()
            .is_some_and(|begun| Arc::ptr_eq(begun, &rings));
        if !resume {
            session.inflight = None;
        }
        session.begun = Some(Arc::clone(&rings));
        self.peer.begin(session.limit);
        let inflight = &mut session.inflight;
        let started = Running::start(&mut self.peer, &rings, &self.offer, inflight, resume);
        let running = started.inspect_err(|error| {
            // What one refuses that never had the rings it will refuse again, such as their size. One
            // that comes back may only need time.
            if !resume && matches!(error, Error::Refused { .. }) {
                session.shared.refuse(&rings, &error.to_string());
            }
        })?;
        for (err, token) in running.errors().zip(RING_ERROR..) {
            self.waiter.watch(err, token).map_err(waiting)?;
        }
        self.running = Some((rings, running));
        Ok(())
    }

    fn stop(&mut self, limit: Duration) -> Result<(), Error> {
        let Some((_, running)) = self.running.take() else {
            return Ok(());
        };
        for err in running.errors() {
            self.waiter.forget(err);
        }
        self.peer.begin(limit);
        running.stop(&mut self.peer)
    }
}

impl Work {
    fn take(shared: &Shared, running: Option<&Arc<Rings>>) -> Self {
        let mut state = shared.state();
        if running.is_none() && state.wanted.is_some() {
            state.held = true;
        }
        let wanted = state.wanted.clone();
        let as_wished = running.map(Arc::as_ptr) == wanted.as_ref().map(Arc::as_ptr);
        let mut work = Self {
            quit: state.quit,
            wanted,
            config_writes: ConfigWrites::default(),
            new_calls: BTreeSet::new(),
        };
        if as_wished {
            work.config_writes = std::mem::take(&mut state.config_writes);
            work.new_calls = std::mem::take(&mut state.new_calls);
        }
        work
    }
}

impl Session {
    fn live(&mut self, queues: u16) {
        tracing::info!(
            device = self.shared.id(),
            socket = %self.shared.socket(),
            "the backend is connected"
        );
        let configured = self.shared.kind.configured_queues();
        if queues < configured {
            let device = self.shared.id();
            tracing::warn!(
                device,
                configured,
                served = queues,
                "the backend has fewer queues"
            );
        }
        self.said = None;
        self.served = true;
        if let Some(daemon) = &mut self.daemon {
            daemon.serves();
        }
        self.shared.set_session(SessionState::Live);
    }
}
