//! What a session's thread shares with the device that the transport calls and with the VM's driver.
//!
//! It is a wish and an answer, not a queue of commands: the device sets what the driver of the guest
//! wants now, and the session's thread makes it so when it can. One lock, held for a few assignments;
//! the transport's notifications are made under it, which take no lock but the interrupt's.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::config_writes::ConfigWrites;
use super::kind::{Kind, Offer};
use super::reach::Reach;
use crate::devices::virtio::device::{QueueSetup, TransportNotify};
use crate::telemetry::LogLimit;
use crate::telemetry::events::event;

/// A driver can have its rings refused as often as it sets them up.
static REFUSED: LogLimit = LogLimit::new(Duration::from_secs(10));

/// Where a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// Nobody listens on the socket; it is dialled again and again.
    Waiting,
    /// Connected; the backend has not answered everything yet.
    Connecting,
    /// The backend serves the device.
    Live,
    /// The session ended: the backend is gone, silent or refused. It is dialled again.
    Lost,
    /// The VM let go of it.
    Closed,
}

/// Rings that the driver of the guest set up, and where their events are.
pub(super) struct Rings {
    /// Features that the driver chose, of those that a backend may hear of.
    pub(super) features: u64,
    pub(super) rings: Vec<Ring>,
    /// What the backend maps.
    pub(super) memory: GuestMemoryMmap,
    /// Whether they are in a DMA window, and their device could have shadow queues.
    pub(super) can_be_shadowed: bool,
}

pub(super) struct Ring {
    pub(super) index: u16,
    pub(super) size: u16,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) kick: EventFd,
    /// Where interrupts go; the driver may change it.
    call: Mutex<EventFd>,
}

impl Ring {
    pub(super) fn new(setup: QueueSetup) -> Self {
        Self {
            index: setup.index,
            size: setup.size,
            desc: setup.desc,
            avail: setup.avail,
            used: setup.used,
            kick: setup.kick,
            call: Mutex::new(setup.call),
        }
    }

    pub(super) fn call(&self) -> MutexGuard<'_, EventFd> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Shared {
    pub(super) kind: Kind,
    /// How it reaches guest memory.
    pub(super) reach: Reach,
    /// Wakes the session's thread.
    wake: EventFd,
    state: Mutex<State>,
    roster: Arc<Roster>,
}

pub(super) struct State {
    pub(super) session: SessionState,
    /// What the guest is offered; kept while the backend is away.
    pub(super) offer: Option<Offer>,
    /// What the driver wants to run.
    pub(super) wanted: Option<Arc<Rings>>,
    /// Whether a backend that is connected may be using rings.
    pub(super) held: bool,
    /// Writes to configuration space that the backend has not seen.
    pub(super) config_writes: ConfigWrites,
    /// Queues that got another interrupt while they ran. A set: a driver may change it as often as it likes
    /// while the backend is stopped.
    pub(super) new_calls: BTreeSet<u16>,
    pub(super) notify: Option<Arc<dyn TransportNotify>>,
    pub(super) quit: bool,
    /// Why the daemon that was started for the device will not be started again.
    pub(super) failure: Option<String>,
    settled: bool,
}

impl Shared {
    pub(super) fn new(kind: Kind, wake: EventFd, reach: Reach, roster: Arc<Roster>) -> Self {
        let state = State {
            session: SessionState::Waiting,
            offer: None,
            wanted: None,
            held: false,
            config_writes: ConfigWrites::default(),
            new_calls: BTreeSet::new(),
            notify: None,
            quit: false,
            failure: None,
            settled: false,
        };
        Self {
            kind,
            reach,
            wake,
            state: Mutex::new(state),
            roster,
        }
    }

    pub(super) fn id(&self) -> &str {
        self.kind.id()
    }

    /// Where the backend is, for the log.
    pub(super) fn socket(&self) -> impl Display {
        let socket = self.kind.link().socket();
        socket.map_or(Path::new("(started)"), |path| path).display()
    }

    pub(super) fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything here could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the session's thread look at the state.
    pub(super) fn wake(&self) {
        // Full is as good as written.
        let _ = self.wake.write(1);
    }

    pub(super) fn set_session(&self, session: SessionState) {
        let before = std::mem::replace(&mut self.state().session, session);
        if before != session {
            match session {
                SessionState::Live => event("vhost-user", "connected", &[("id", self.id())]),
                SessionState::Lost => event("vhost-user", "lost", &[("id", self.id())]),
                _ => {}
            }
        }
        if matches!(session, SessionState::Live | SessionState::Lost) {
            self.settle();
        }
    }

    /// The rings are with no backend that is connected.
    pub(super) fn let_go(&self) {
        self.state().held = false;
    }

    /// Rings that no backend can run: the driver is told to start over.
    pub(super) fn refuse(&self, rings: &Arc<Rings>, reason: &str) {
        if let Some(suppressed) = REFUSED.pass() {
            let device = self.id();
            tracing::warn!(device, reason, suppressed, "the device needs a reset");
        }
        let mut state = self.state();
        state.wanted.take_if(|wanted| Arc::ptr_eq(wanted, rings));
        if let Some(notify) = &state.notify {
            notify.needs_reset();
        }
    }

    /// The VM may boot as far as this device is concerned.
    pub(super) fn settle(&self) {
        if !std::mem::replace(&mut self.state().settled, true) {
            self.roster.change(|counts| counts.unsettled -= 1);
        }
    }

    /// Whether the VM waits for it no more.
    pub(super) fn is_settled(&self) -> bool {
        self.state().settled
    }

    /// The session's thread is about to end.
    pub(super) fn leave(&self) {
        self.set_session(SessionState::Closed);
        self.settle();
        self.roster.change(|counts| counts.threads -= 1);
    }
}

/// Counts sessions, for those who wait for all of them.
#[derive(Default)]
pub(super) struct Roster {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Default)]
pub(super) struct Counts {
    /// Threads that run.
    pub(super) threads: usize,
    /// Sessions that have neither been live nor failed yet.
    pub(super) unsettled: usize,
}

impl Roster {
    pub(super) fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until the counts are as asked; returns whether they are.
    pub(super) fn wait(&self, timeout: Duration, done: impl Fn(&Counts) -> bool) -> bool {
        let until = Instant::now() + timeout;
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        while !done(&counts) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(counts, left);
            counts = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
