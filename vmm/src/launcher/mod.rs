//! Daemons that are started for the guest's disks and network cards, and end with it.
//!
//! A small process, forked before the sandbox closes and before there is a thread, does the starting; the
//! VMM asks it. So the VMM itself can run no program, and the data path still has its own process.
//!
//! ```text
//!   berth-vmm                                       berth-launcher                   berth-blk
//!   vu-_disk0: socketpair ×3
//!     Request {disk, /d.raw} + 3 fds ── channel ──▶ arguments, exec ──────────────▶ --fd=N
//!     vhost-user ◀════════════════════════════════════════════════════════════════▶ N
//!     log lines  ◀────────────────────────────────────────────────────────────────── stderr
//!     Report: Failed | Ended     ◀───── lease ───── pidfd
//!     lease shut or closed: end it ────────────────▶ SIGTERM, 2 s later SIGKILL
//! ```
//!
//! * **Requests are typed** ([`request`]): which program and what it serves. The launcher forms the arguments
//!   itself, and runs nothing but berth-blk, berth-net, and what `backend=` named on the command line
//!   ([`Policy`]). Where there is no API, it starts only what the command line asked for; where there is one and
//!   `--landlock-rules` say which files it may name, images are among them.
//! * **Each daemon has a lease**, a socketpair between the session and the launcher. The daemon's end is
//!   reported on it; when the VMM lets go of it, or of its life, the daemon is ended. The channel's end ends
//!   the launcher, after its last daemon.
//! * The launcher has one thread, opens no file, and waits in one `poll`. It is in a process group of its own,
//!   so that Ctrl-C on a terminal is for the VMM, which ends the daemons in order. SIGTERM to it does
//!   nothing: it goes when the VMM goes.
//! * Both ends of the channel and of the leases are SOCK_SEQPACKET, messages are JSON of at most 64 KiB;
//!   descriptors come by SCM_RIGHTS.

mod daemon;
mod log;
mod process;
mod request;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub use self::daemon::Daemon;
pub use self::request::{Request, Serve};
use crate::config::VmConfig;
use crate::config::shared_fd::SharedFd;
use crate::sandbox::FileRule;
use crate::vhost_user::Kind;

/// Longest message.
const MAX_MESSAGE: usize = 64 << 10;
/// Descriptors that come with every request: vhost-user, log, lease.
const FIXED_FDS: usize = 3;
/// Most descriptors of a tap.
const MAX_TAPS: usize = 32;
/// How long the end of the VMM waits for the launcher, which ends its daemons within 2 s.
const PATIENCE: Duration = Duration::from_secs(4);

/// What the launcher may start.
#[derive(Debug, Default)]
pub struct Policy {
    /// What the command line asks for.
    named: Vec<Request>,
    /// Whether others may come by the API: of the same kinds, with programs that are named.
    others: bool,
    /// Images of others are these or below these; none, any.
    files: Vec<FileRule>,
}

impl Policy {
    /// For a guest of the command line, and an API or none; `files` are those that the API may name.
    pub fn new(config: Option<&VmConfig>, has_api: bool, files: &[FileRule]) -> Self {
        let devices = config.into_iter().flat_map(Kind::all);
        let real = |rule: &FileRule| FileRule {
            // One that is not there is an error elsewhere.
            path: rule.path.canonicalize().unwrap_or(rule.path.clone()),
            access: rule.access,
        };
        Self {
            named: devices.filter_map(|kind| Request::of(&kind)).collect(),
            others: has_api,
            files: files.iter().map(real).collect(),
        }
    }

    /// Whether there is nothing that could ever be started.
    pub fn is_empty(&self) -> bool {
        !self.others && self.named.is_empty()
    }

    fn check(&self, request: &Request) -> Result<(), String> {
        if let Some(program) = &request.program
            && !self
                .named
                .iter()
                .any(|named| named.program == request.program)
        {
            let program = program.display();
            return Err(format!("{program} was not named on the command line"));
        }
        match (self.named.contains(request), self.others) {
            (true, _) => Ok(()),
            (false, true) => self.check_image(&request.serve),
            (false, false) => Err("the command line has no such device".to_owned()),
        }
    }

    /// Where the operator has said which files the API may name, images are among them.
    fn check_image(&self, serve: &Serve) -> Result<(), String> {
        let Serve::Disk { path, readonly, .. } = serve else {
            return Ok(());
        };
        if self.files.is_empty() {
            return Ok(());
        }
        let shown = path.display();
        let real = path
            .canonicalize()
            .map_err(|error| format!("cannot open {shown}: {error}"))?;
        let allows = |rule: &FileRule| {
            let FileRule { path, access } = rule;
            real.starts_with(path) && access.read && (*readonly || access.write)
        };
        match self.files.iter().any(allows) {
            true => Ok(()),
            false => Err(format!("no --landlock-rules allows {shown}")),
        }
    }
}

/// What the launcher says of a daemon, on its lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Report {
    /// It could not be started; why.
    Failed(String),
    /// It ended; how.
    Ended(String),
}

/// The way to the launcher. Copies are the same way.
#[derive(Debug, Clone)]
pub struct Launcher(Arc<UnixDatagram>);

impl Launcher {
    /// Has a daemon started for the device `id`; returns the connection to it at once. That it could not be
    /// started is said by the [`Daemon`], as its end is. `taps` are the descriptors that it asks for.
    ///
    /// # Errors
    /// Where the launcher is gone, or the system refuses descriptors.
    pub fn start(
        &self,
        id: &str,
        request: &Request,
        taps: &[SharedFd],
    ) -> io::Result<(UnixStream, Daemon)> {
        let (ours, theirs) = UnixStream::pair()?;
        let (log, stderr) = UnixStream::pair()?;
        let (lease, held) = sys::seqpacket_pair()?;
        log.set_nonblocking(true)?;
        lease.set_nonblocking(true)?;
        let message = serde_json::to_vec(request)?;
        if message.len() > MAX_MESSAGE || taps.len() > MAX_TAPS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut fds = vec![theirs.as_raw_fd(), stderr.as_raw_fd(), held.as_raw_fd()];
        fds.extend(taps.iter().map(|tap| tap.as_fd().as_raw_fd()));
        self.0
            .send_with_fds(&[&message[..]], &fds)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok((ours, Daemon::new(id, request.name(), lease, log)))
    }
}

/// The launcher's process, as its parent has it. Dropped, the launcher and all daemons end.
#[derive(Debug)]
pub struct LauncherProcess {
    launcher: Launcher,
    pidfd: OwnedFd,
}

impl LauncherProcess {
    /// Forks it. To be called before any other thread is started, before signals are blocked, and before
    /// the sandbox closes.
    pub fn fork(policy: &Policy) -> io::Result<Self> {
        let (ours, theirs) = sys::seqpacket_pair()?;
        match sys::fork()? {
            sys::Fork::Parent { pidfd } => Ok(Self {
                launcher: Launcher(Arc::new(ours)),
                pidfd,
            }),
            sys::Fork::Child => {
                drop(ours);
                process::run(theirs, policy)
            }
        }
    }

    /// The way to it.
    pub fn launcher(&self) -> Launcher {
        self.launcher.clone()
    }
}

impl Drop for LauncherProcess {
    fn drop(&mut self) {
        // Whoever still has a copy has no way to the launcher from now on.
        let _ = self.launcher.0.shutdown(std::net::Shutdown::Both);
        if !sys::wait_for_end(&self.pidfd, PATIENCE) {
            tracing::warn!("a daemon that was started for the guest does not end");
        }
    }
}
