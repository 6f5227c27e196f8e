//! The launcher's own side: one thread, one `poll`, and the daemons that it has started.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::{FIXED_FDS, MAX_MESSAGE, Policy, Report, Request, sys};
use crate::config::validate::MAX_EXTERNAL_DEVICES;
use crate::socket;

/// How long a daemon that was told to end has for it.
const GRACE: Duration = Duration::from_secs(2);

/// Most daemons at a time: one for each device that there can be, and one that it had before. A VMM that
/// somebody has taken over may ask for more.
const MAX_DAEMONS: usize = 2 * MAX_EXTERNAL_DEVICES;

/// A daemon that runs.
pub(super) struct Running {
    child: Child,
    pidfd: OwnedFd,
    lease: UnixDatagram,
    /// When it is killed, if it was told to end.
    kill_at: Option<Instant>,
}

/// Serves requests until the channel ends and the last daemon has ended.
pub(super) fn run(channel: UnixDatagram, policy: &Policy) -> ! {
    sys::set_apart(channel.as_raw_fd(), c"berth-launcher");
    // What cannot be reported cannot be helped: the leases end with this process, and the daemons' sockets
    // with the VMM.
    let _ = serve(&channel, policy);
    sys::exit()
}

fn serve(channel: &UnixDatagram, policy: &Policy) -> io::Result<()> {
    let mut daemons: Vec<Running> = Vec::new();
    let mut open = true;
    while open || !daemons.is_empty() {
        let now = Instant::now();
        let kill_at = daemons.iter().filter_map(|daemon| daemon.kill_at).min();
        let timeout = kill_at.map(|at| at.saturating_duration_since(now));
        let mut fds = Vec::new();
        for daemon in &daemons {
            fds.push(daemon.pidfd.as_raw_fd());
            // poll(2) passes over negative numbers; a lease that is over stays readable.
            let told = daemon.kill_at.is_some();
            fds.push(if told { -1 } else { daemon.lease.as_raw_fd() });
        }
        fds.push(if open { channel.as_raw_fd() } else { -1 });
        let ready = sys::poll(&fds, timeout)?;
        let mut flags = ready.chunks_exact(2);
        daemons.retain_mut(|daemon| match flags.next() {
            Some(&[ended, lease]) => daemon.goes_on(ended, lease),
            _ => true,
        });
        if ready.last() == Some(&true) {
            open = receive(channel, policy, &mut daemons)?;
        }
    }
    Ok(())
}

/// Takes one request; returns whether there may be more.
pub(super) fn receive(
    channel: &UnixDatagram,
    policy: &Policy,
    daemons: &mut Vec<Running>,
) -> io::Result<bool> {
    let mut message = vec![0; MAX_MESSAGE];
    let (len, mut fds) = socket::receive(channel, &mut message)?;
    if len == 0 {
        return Ok(false);
    }
    if fds.len() < FIXED_FDS {
        return Ok(true);
    }
    let taps = fds.split_off(FIXED_FDS);
    let (Some(lease), Some(stderr), Some(socket)) = (fds.pop(), fds.pop(), fds.pop()) else {
        return Ok(true);
    };
    let lease = UnixDatagram::from(lease);
    // Whoever sent it may not read what is said on it, which is not waited for.
    if lease.set_nonblocking(true).is_err() {
        return Ok(true);
    }
    let request = serde_json::from_slice::<Request>(&message[..len]);
    let started = request
        .map_err(|error| format!("not a request: {error}"))
        .and_then(|request| policy.check(&request).map(|()| request))
        .and_then(|request| match daemons.len() {
            MAX_DAEMONS.. => Err(format!("{MAX_DAEMONS} daemons run already")),
            _ => Ok(request),
        })
        .and_then(|request| start(&request, &socket, stderr, &taps));
    match started {
        Ok((child, pidfd)) => daemons.push(Running {
            child,
            pidfd,
            lease,
            kill_at: None,
        }),
        Err(reason) => report(&lease, &Report::Failed(reason)),
    }
    Ok(true)
}

fn start(
    request: &Request,
    socket: &OwnedFd,
    stderr: OwnedFd,
    taps: &[OwnedFd],
) -> Result<(Child, OwnedFd), String> {
    let name = request.name();
    let failed = |error: io::Error| format!("cannot start {name}: {error}");
    // All others close by themselves, and these are closed here before the next program is run.
    for fd in taps.iter().chain([socket]) {
        sys::let_inherit(fd.as_fd()).map_err(failed)?;
    }
    let numbers: Vec<_> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    let program = match &request.program {
        Some(program) => program.clone(),
        None => find(request.ours()),
    };
    let mut command = Command::new(program);
    command
        .args(request.arguments(socket.as_raw_fd(), &numbers))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(stderr));
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if request.program.is_none() => {
            format!("cannot start {name}: it is neither next to berth-vmm nor in PATH")
        }
        _ => failed(error),
    })?;
    match sys::pidfd_open(child.id() as i32) {
        Ok(pidfd) => Ok((child, pidfd)),
        Err(error) => {
            // It was started a moment ago, and nothing would hear of its end.
            let _ = child.kill();
            let _ = child.wait();
            Err(failed(error))
        }
    }
}

/// A program next to this one, else in PATH.
fn find(name: &str) -> PathBuf {
    let here = std::env::current_exe().ok();
    let beside = here.and_then(|path| path.parent().map(|folder| folder.join(name)));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| name.into())
}

impl Running {
    /// Does what is due; returns false when the daemon is gone.
    fn goes_on(&mut self, ended: bool, lease_over: bool) -> bool {
        if ended && let Ok(Some(status)) = self.child.try_wait() {
            report(&self.lease, &Report::Ended(how(status)));
            return false;
        }
        // There is nothing to be said on a lease but that it is over.
        if lease_over {
            sys::signal(&self.pidfd, libc::SIGTERM);
            self.kill_at = Some(Instant::now() + GRACE);
        }
        if self.kill_at.is_some_and(|at| at <= Instant::now()) {
            sys::signal(&self.pidfd, libc::SIGKILL);
            // Nothing survives that; its end is waited for.
            self.kill_at = Some(Instant::now() + GRACE);
        }
        true
    }
}

fn report(lease: &UnixDatagram, report: &Report) {
    if let Ok(message) = serde_json::to_vec(report) {
        // Whoever held it may be gone.
        let _ = lease.send(&message);
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}
