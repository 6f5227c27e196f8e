//! The vhost-user frontend: virtio devices that other processes serve.
//!
//! ```text
//!  transport ─▶ Device ──wish──▶ Shared ◀──▶ vu-<id> thread: Session ─▶ Connection ─▶ Peer ─▶ backend
//!                                   ▲             dial, deadline            vring        (vhost::Frontend)
//!  VM's driver ─▶ Frontends ────────┘             kind: what the guest is offered of what is there
//!
//!  frontend                                             backend
//!    SET_OWNER, GET_FEATURES, GET/SET_PROTOCOL_FEATURES ─▶
//!    GET_QUEUE_NUM, SET_BACKEND_REQ_FD, GET_CONFIG ──────▶        live: the guest may find the device
//!    SET_FEATURES, SET_MEM_TABLE ────────────────────────▶        DRIVER_OK
//!    GET_INFLIGHT_FD (once), SET_INFLIGHT_FD ────────────▶
//!    SET_VRING_* ────────────────────────────────────────▶
//!    ◀─ CONFIG_CHANGE_MSG     GET_CONFIG ────────────────▶        config interrupt
//!    SET_VRING_ENABLE 0, GET_VRING_BASE ─────────────────▶        device reset
//! ```
//!
//! The data path is none of this: the guest's doorbells reach the backend by ioeventfd, its interrupts
//! the guest by irqfd, and guest memory is mapped there.
//!
//! Threads: one for each session, so that a backend that is silent or stopped delays nobody else, and
//! one for all deadlines. The transport and the VM's driver never wait for a backend, except where
//! [`Frontends::wait_settled`] and [`Frontends::stop`] say so, and these for a bounded time.
//!
//! Reference: vhost-user protocol, QEMU docs/interop/vhost-user.rst; virtio 1.3, 5.1 and 5.2.

mod backend_requests;
mod config_writes;
mod connection;
mod deadline;
mod device;
mod dial;
mod inflight;
mod kind;
mod peer;
mod reach;
mod session;
mod shadow;
mod shared;
#[cfg(test)]
mod tests;
mod vring;
mod wait;
mod window;

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::deadline::Deadlines;
use self::device::Device;
use self::dial::Dialer;
pub use self::kind::Kind;
use self::reach::Reach;
pub use self::reach::Way;
use self::session::Session;
pub use self::shared::SessionState;
use self::shared::{Roster, Shared};
use self::window::Window;
use crate::devices::virtio::device::VirtioDevice;
use crate::launcher::Launcher;
use crate::memory::{self, GuestRam, Mode};
use crate::sandbox::{self, ThreadKind};
use crate::socket;

/// Time after which a backend counts as silent.
const OPERATION_LIMIT: Duration = Duration::from_secs(5);
/// Longest name that a thread may have.
const THREAD_NAME: usize = 15;

/// A backend that has said all that `bytes` are before it was asked, and then closes; for the fuzz targets. The first
/// byte picks whether these are replies, to whom, or requests of its own.
pub(crate) fn fuzz_backend(bytes: &[u8]) {
    let Some((&first, bytes)) = bytes.split_first() else {
        return;
    };
    let Ok((ours, theirs)) = UnixStream::pair() else {
        return;
    };
    if first & 1 == 0 {
        backend_requests::fuzz(bytes);
        return;
    }
    // What does not fit the socket is not said.
    let _ = theirs
        .set_nonblocking(true)
        .and_then(|()| (&theirs).write_all(bytes));
    let _ = theirs.shutdown(Shutdown::Write);
    let kind = kind::fuzz(first >> 1);
    let Ok(deadlines) = FUZZ_DEADLINES.as_ref().map(Arc::clone) else {
        return;
    };
    if let Ok((_, found)) = peer::Peer::handshake(ours, &kind, &deadlines, OPERATION_LIMIT, true) {
        // Unfit is an answer too.
        let _ = kind.offer(&found);
    }
}

/// What a guest puts into a ring that has a shadow, and what a backend makes of it; for the fuzz targets.
pub(crate) fn fuzz_shadow(bytes: &[u8]) {
    shadow::guest_ring(bytes);
}

static FUZZ_DEADLINES: LazyLock<io::Result<Arc<Deadlines>>> =
    LazyLock::new(|| Deadlines::new().map(Arc::new));

/// Why a device could not be set up. A backend that is not there is no error: it is waited for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is longer than a socket's can be.
    #[error("{path}: a socket's path has at most {} bytes", socket::MAX_PATH)]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Something else is at the path.
    #[error("{path} is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// There is no launcher, which is made when the process starts.
    #[error("{device}: nothing here can start its daemon")]
    NoLauncher {
        /// The device's name.
        device: String,
    },
    /// The daemon that was started for it ended, or will not do, before it ever served.
    #[error("{device}: {reason}")]
    Daemon {
        /// The device's name.
        device: String,
        /// Its last words, or how it ended.
        reason: String,
    },
    /// It cannot reach guest memory as asked.
    #[error("{0}")]
    NoWay(String),
    /// No memory for its shadow queues.
    #[error(transparent)]
    Bounce(#[from] memory::Error),
    /// A socket of ours.
    #[error(transparent)]
    Listen(#[from] socket::Error),
    /// The system refused a thread or a descriptor.
    #[error("cannot start a session for {device}")]
    Start {
        /// The device's name.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A session as `vm.info` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// The device's name.
    pub id: String,
    /// The socket, if it has a path.
    pub socket: Option<PathBuf>,
    /// Where the session is.
    pub state: SessionState,
    /// What its shadow queues have done, where it may have some.
    pub shadow: Option<Vec<(&'static str, u64)>>,
}

/// One session, for a thread that waits for it.
pub struct Watch {
    shared: Arc<Shared>,
    roster: Arc<Roster>,
}

impl Watch {
    /// Waits until the backend serves its device or has failed to, or for `timeout`.
    ///
    /// # Errors
    /// Why it does not serve it.
    pub fn wait(&self, timeout: Duration) -> Result<(), String> {
        self.roster.wait(timeout, |_| self.shared.is_settled());
        let state = self.shared.state();
        match (state.session, &state.failure) {
            (SessionState::Live, _) => Ok(()),
            (_, Some(reason)) => Err(reason.clone()),
            (SessionState::Waiting, None) => Err("nobody is at its socket".to_owned()),
            (SessionState::Connecting, None) => Err("it does not answer".to_owned()),
            _ => Err("it refuses, as the log says".to_owned()),
        }
    }
}

/// All sessions of a VM; the VM's own handle on them.
pub struct Frontends {
    deadlines: Arc<Deadlines>,
    roster: Arc<Roster>,
    sessions: Vec<Arc<Shared>>,
    operation_limit: Duration,
    launcher: Option<Launcher>,
    guest: reach::Guest,
    /// Whether the guest runs already.
    late: bool,
    discards: bool,
}

impl Frontends {
    /// No sessions yet.
    pub fn new() -> io::Result<Self> {
        Self::with_operation_limit(OPERATION_LIMIT)
    }

    /// The same, with another time after which a backend counts as silent: a handshake, a start or a
    /// stop has to be over by then.
    pub fn with_operation_limit(operation_limit: Duration) -> io::Result<Self> {
        Ok(Self {
            operation_limit,
            deadlines: Arc::new(Deadlines::new()?),
            roster: Arc::default(),
            sessions: Vec::new(),
            launcher: None,
            guest: reach::Guest::Shared,
            late: false,
            discards: false,
        })
    }

    /// The same, where devices reach what of guest memory is shared: all, a window, or nothing.
    #[must_use]
    pub fn reaching(mut self, ram: &GuestRam) -> Self {
        self.guest = match (ram.window(), ram.mode()) {
            (Some(window), _) => reach::Guest::Window(Window::new(window.clone())),
            (None, Mode::Private) => reach::Guest::Private,
            (None, _) => reach::Guest::Shared,
        };
        self
    }

    /// From here on devices are added to a guest that runs.
    pub fn guest_runs(&mut self) {
        self.late = true;
    }

    /// How a device would reach guest memory.
    ///
    /// # Errors
    /// Where there is no way as asked.
    pub fn way(&self, kind: &Kind) -> Result<Way, Error> {
        self.guest.way(kind, self.late).map_err(Error::NoWay)
    }

    /// The same, of a guest whose pages may be discarded while devices use them: a backend that says that it pins
    /// guest memory is refused.
    #[must_use]
    pub fn discarding(mut self, discards: bool) -> Self {
        self.discards = discards;
        self
    }

    /// The same, with somebody who starts daemons.
    #[must_use]
    pub fn starting(mut self, launcher: Option<Launcher>) -> Self {
        self.launcher = launcher;
        self
    }

    /// Makes a device and starts to dial its backend, in the background. May wait for the boot before to let
    /// go of a socket of ours.
    pub fn connect(&mut self, kind: Kind) -> Result<Box<dyn VirtioDevice>, Error> {
        self.connect_within(kind, dial::LISTEN_PATIENCE)
    }

    /// The same without a wait, for the thread that must not.
    pub fn connect_at_once(&mut self, kind: Kind) -> Result<Box<dyn VirtioDevice>, Error> {
        self.connect_within(kind, Duration::ZERO)
    }

    fn connect_within(
        &mut self,
        kind: Kind,
        patience: Duration,
    ) -> Result<Box<dyn VirtioDevice>, Error> {
        let reach = self.guest.reach(&kind, self.way(&kind)?)?;
        let dialer = Dialer::new(&kind, self.launcher.as_ref(), patience)?;
        let device = kind.id().to_owned();
        let shared = self
            .start(kind, dialer, reach)
            .map_err(|source| Error::Start { device, source })?;
        self.sessions.push(Arc::clone(&shared));
        Ok(Box::new(Device::new(shared)))
    }

    fn start(&self, kind: Kind, dialer: Dialer, reach: Reach) -> io::Result<Arc<Shared>> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let name: String = format!("vu-{}", kind.id())
            .chars()
            .take(THREAD_NAME)
            .collect();
        let shared = Arc::new(Shared::new(kind, wake, reach, Arc::clone(&self.roster)));
        let deadlines = Arc::clone(&self.deadlines);
        let mut session =
            Session::new(Arc::clone(&shared), dialer, deadlines, self.operation_limit)?;
        // Bounce memory is never discarded.
        session.discards = self.discards && !matches!(shared.reach, Reach::Shadow(_));
        // Counted before the thread can leave.
        self.roster.change(|counts| {
            counts.threads += 1;
            counts.unsettled += 1;
        });
        let spawned = sandbox::spawn(ThreadKind::VhostUser, &name, move || session.run());
        spawned.map(drop).inspect_err(|_| shared.leave())?;
        Ok(shared)
    }

    /// Waits until each backend either serves its device or has failed to once; a backend that nobody
    /// started yet is waited for. Returns whether all are there; call it again, or do something else
    /// in between.
    ///
    /// A device whose backend failed does not keep the guest from booting: its driver is refused until
    /// there is one that answers.
    pub fn wait_settled(&self, timeout: Duration) -> bool {
        self.roster.wait(timeout, |counts| counts.unsettled == 0)
    }

    /// Whether a daemon that was to be started for a device never served; then why.
    ///
    /// # Errors
    /// The first of these.
    pub fn check_started(&self) -> Result<(), Error> {
        for shared in &self.sessions {
            if let Some(reason) = shared.state().failure.clone() {
                let device = shared.id().to_owned();
                return Err(Error::Daemon { device, reason });
            }
        }
        Ok(())
    }

    /// Whether there is a session of that name that was not forgotten.
    pub fn has(&self, id: &str) -> bool {
        self.sessions.iter().any(|shared| shared.id() == id)
    }

    /// The session of one device, to wait for it alone.
    pub fn watch(&self, id: &str) -> Option<Watch> {
        let shared = self.sessions.iter().find(|shared| shared.id() == id)?;
        Some(Watch {
            shared: Arc::clone(shared),
            roster: Arc::clone(&self.roster),
        })
    }

    /// Forgets a session, which ends with its device or has ended.
    pub fn forget(&mut self, id: &str) {
        let gone = self.sessions.extract_if(.., |shared| shared.id() == id);
        for shared in gone {
            shared.state().quit = true;
            shared.wake();
        }
    }

    /// Where each session is, in the order they were made.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let info = |shared: &Arc<Shared>| SessionInfo {
            id: shared.id().to_owned(),
            socket: shared.kind.link().socket().map(Into::into),
            state: shared.state().session,
            shadow: shared.reach.counters(),
        };
        self.sessions.iter().map(info).collect()
    }

    /// Ends all sessions: rings are taken back from backends that give them back in time, then the
    /// connections are closed. Returns the names of the devices whose backends did not.
    pub fn stop(&self, timeout: Duration) -> Vec<String> {
        for shared in &self.sessions {
            shared.state().quit = true;
            shared.wake();
        }
        if self.roster.wait(timeout, |counts| counts.threads == 0) {
            return Vec::new();
        }
        let closed = |info: &SessionInfo| info.state != SessionState::Closed;
        let late = self
            .sessions()
            .into_iter()
            .filter(closed)
            .map(|info| info.id);
        let late = late.collect();
        self.deadlines.expire_all();
        late
    }
}

impl Drop for Frontends {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}
