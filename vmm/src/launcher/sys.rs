//! The launcher's system calls that std has no name for.

#![expect(
    unsafe_code,
    reason = "fork, pidfds, poll over many descriptors, descriptors that a program inherits"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// Which of the two this is.
pub(super) enum Fork {
    Parent { pidfd: OwnedFd },
    Child,
}

/// Makes a second process of this one. The child has the calling thread only.
pub(super) fn fork() -> io::Result<Fork> {
    // SAFETY: called before any other thread is started (LauncherProcess::fork), so that the child finds no
    // lock held and its memory whole.
    let pid = unsafe { libc::fork() };
    match pid {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent {
            pidfd: pidfd_open(pid)?,
        }),
    }
}

/// A descriptor that becomes readable when that child ends.
pub(super) fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Two ends that carry whole messages, and know when the other end is gone.
pub(super) fn seqpacket_pair() -> io::Result<(UnixDatagram, UnixDatagram)> {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for the two descriptors and outlives the call.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors were just made and nobody else has them.
    let [one, other] = fds.map(|fd| UnixDatagram::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    Ok((one, other))
}

/// Sets a new process apart: a group of its own, a name, SIGTERM and its kin blocked (programs that it runs
/// get them back), and no descriptor but the standard ones and `kept`.
pub(super) fn set_apart(kept: RawFd, name: &std::ffi::CStr) {
    // SAFETY: the calls touch no memory but the set, which sigemptyset makes complete, and the name, which
    // outlives the call. Nothing in this process uses the descriptors that are closed: it has no other
    // thread, and goes on to `process::run`, which knows `kept` only.
    unsafe {
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        let mut set = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        let kept = kept as libc::c_uint;
        if kept > 3 {
            libc::syscall(libc::SYS_close_range, 3, kept - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, kept + 1, libc::c_uint::MAX, 0);
    }
}

/// Has the programs that are run from here on inherit a descriptor.
pub(super) fn let_inherit(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open, and F_SETFD touches no memory.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to a child that was not waited for yet.
pub(super) fn signal(pidfd: &OwnedFd, signal: libc::c_int) {
    // SAFETY: the null pointer stands for the signal's default information. It fails only for a child that
    // has ended, which is as well.
    unsafe {
        let none = std::ptr::null::<libc::siginfo_t>();
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            none,
            0,
        );
    }
}

/// Waits until one of the descriptors is readable or hung up, or for a time; returns which are.
pub(super) fn poll(fds: &[RawFd], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let poll = |&fd| libc::pollfd {
        fd,
        events: libc::POLLIN | libc::POLLRDHUP,
        revents: 0,
    };
    let mut polled: Vec<_> = fds.iter().map(poll).collect();
    // Rounded up, so as not to wake before the time.
    let millis = |time: Duration| i32::try_from(time.as_millis() + 1).unwrap_or(i32::MAX);
    // SAFETY: `polled` has that many entries and outlives the call.
    let ready = unsafe {
        libc::poll(
            polled.as_mut_ptr(),
            polled.len() as libc::nfds_t,
            timeout.map_or(-1, millis),
        )
    };
    if ready < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok(vec![false; fds.len()]);
    }
    Ok(polled.iter().map(|fd| fd.revents != 0).collect())
}

/// Waits for a child to end and takes note of it; returns whether it did in time.
pub(super) fn wait_for_end(pidfd: &OwnedFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match poll(&[pidfd.as_raw_fd()], Some(left)) {
            Ok(ready) if ready[0] => break,
            Ok(_) if !left.is_zero() => {}
            _ => return false,
        }
    }
    // SAFETY: `info` is written by the call and outlives it; the child is this process's.
    unsafe {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        let id = pidfd.as_raw_fd() as libc::id_t;
        libc::waitid(
            libc::P_PIDFD,
            id,
            info.as_mut_ptr(),
            libc::WEXITED | libc::WNOHANG,
        );
    }
    true
}

/// Ends the process at once.
pub(super) fn exit() -> ! {
    // SAFETY: nothing comes after it; what the parent's copies of objects would do at their end is the
    // parent's to do.
    unsafe { libc::_exit(0) }
}
