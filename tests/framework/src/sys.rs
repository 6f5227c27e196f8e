//! The system calls that std does not offer, each behind a safe function. All `unsafe` of this crate is here.
#![allow(
    unsafe_code,
    reason = "namespaces, pidfds, inotify, packet sockets and perf events have no std API"
)]

use std::ffi::{CStr, CString};
use std::io::{Error, Result};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Turns -1 into the thread's errno.
fn check(result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes ownership of a file descriptor that a system call has just returned.
fn owned(fd: libc::c_int) -> Result<OwnedFd> {
    let fd = check(fd)?;
    // SAFETY: `fd` is open, was returned to this caller alone, and nothing else closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Anonymous memory that can be passed on.
pub(crate) fn memfd(name: &CStr) -> Result<OwnedFd> {
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) })
}

/// Gives the calling thread, and what it spawns, an empty network namespace.
pub(crate) fn unshare_network() -> Result<()> {
    // SAFETY: no pointers; affects only the namespace of the calling thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// Makes the child die with the thread that spawns it, and lets the signals through that ask it to end.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let ending = ending_signals();
    let hook = move || {
        // SAFETY: prctl, getppid and sigprocmask are async-signal-safe; the one pointer is to a live set.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::getppid().cast_unsigned() != parent {
                return Err(Error::from_raw_os_error(libc::ESRCH));
            }
            let old = std::ptr::null_mut();
            check(libc::sigprocmask(libc::SIG_UNBLOCK, &raw const ending, old))?;
        }
        Ok(())
    };
    // SAFETY: the hook makes three async-signal-safe calls and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

/// A file descriptor that becomes readable when the process ends.
pub(crate) fn pidfd_open(pid: u32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(libc::c_int::try_from(fd).unwrap_or(-1))
}

/// Sends a signal to the process behind a pidfd; a number used again by another process is never hit.
pub(crate) fn pidfd_send_signal(pidfd: &OwnedFd, signal: libc::c_int) -> Result<()> {
    let null = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means the one that kill() would send.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            null,
            0,
        )
    };
    check(libc::c_int::try_from(result).unwrap_or(-1)).map(drop)
}

/// Whether all threads of a child stand still after SIGSTOP.
pub(crate) fn is_stopped(pidfd: &OwnedFd) -> Result<bool> {
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = pidfd.as_raw_fd().cast_unsigned();
    let how = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is live; WNOWAIT leaves the child's state to whoever waits for its end.
    check(unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, how) })?;
    Ok(info.si_signo == libc::SIGCHLD)
}

/// Waits until one of `fds` is readable or hung up; the index of the first that is, or none in time.
pub(crate) fn poll_readable(fds: &[RawFd], timeout: Duration) -> Result<Option<usize>> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let end = std::time::Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(std::time::Instant::now());
        let millis = libc::c_int::try_from(left.as_millis() + 1).unwrap_or(libc::c_int::MAX);
        // SAFETY: `polled` is a live array of exactly the length given.
        let ready =
            unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, millis) };
        match check(ready) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(polled.iter().position(|fd| fd.revents != 0)),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// An inotify descriptor that becomes readable when an entry appears in `directory`.
pub(crate) fn watch_directory(directory: &Path) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let inotify = owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })?;
    let path = CString::new(directory.as_os_str().as_bytes())?;
    let events = libc::IN_CREATE | libc::IN_MOVED_TO | libc::IN_ATTRIB;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), events) })?;
    Ok(inotify)
}

/// Reads and drops what is queued on a non-blocking descriptor.
pub(crate) fn drain(fd: &OwnedFd) {
    let mut buffer = [0u8; 4096];
    loop {
        // SAFETY: `buffer` is live and of the length given.
        let read = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        if read <= 0 {
            return;
        }
    }
}

/// A raw packet socket on `interface` in the thread's network namespace: for every frame, or for those of
/// `ethertype` that come in.
pub(crate) fn packet_socket(interface: &str, ethertype: Option<u16>) -> Result<OwnedFd> {
    let protocol = ethertype.unwrap_or(libc::ETH_P_ALL.cast_unsigned() as u16);
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // Nothing comes before it is bound. SAFETY: no pointers.
    let socket = owned(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    let name = CString::new(interface)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a live sockaddr_ll of the length given.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// The next frame, cut to `buffer`: its full length, and whether this host sent it; none when nothing came
/// in time.
pub(crate) fn receive_frame(
    socket: &OwnedFd,
    buffer: &mut [u8],
    timeout: Duration,
) -> Result<Option<(usize, bool)>> {
    if poll_readable(&[socket.as_raw_fd()], timeout)?.is_none() {
        return Ok(None);
    }
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `buffer` and `from` are live and of the lengths given. MSG_TRUNC asks for the frame's real
    // length and writes no more than the buffer holds.
    let received = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_TRUNC | libc::MSG_DONTWAIT,
            (&raw mut from).cast(),
            &raw mut length,
        )
    };
    match usize::try_from(received) {
        Ok(size) => Ok(Some((size, from.sll_pkttype == libc::PACKET_OUTGOING))),
        Err(_) => Err(Error::last_os_error()),
    }
}

/// Sends one frame.
pub(crate) fn send_frame(socket: &OwnedFd, frame: &[u8]) -> Result<()> {
    // SAFETY: `frame` is live and of the length given.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
        )
    };
    if sent < 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}

/// Opens a counter of tracepoint `id` for thread `tid`; read it as one little-endian u64.
pub(crate) fn count_tracepoint(id: u64, tid: i32) -> Result<OwnedFd> {
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    const PERF_ATTR_SIZE_VER0: u32 = 64;
    // struct perf_event_attr as of its first version: type, size, config, then all zero.
    let mut attr = [0u64; PERF_ATTR_SIZE_VER0 as usize / 8];
    attr[0] = u64::from(PERF_TYPE_TRACEPOINT) | u64::from(PERF_ATTR_SIZE_VER0) << 32;
    attr[1] = id;
    let cloexec: libc::c_ulong = 8;
    // SAFETY: `attr` is live and as long as its size field says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attr.as_ptr(),
            tid,
            -1,
            -1,
            cloexec,
        )
    };
    owned(libc::c_int::try_from(fd).unwrap_or(-1))
}

/// Sets a filter such as `reason == 2` on a counter of [`count_tracepoint`].
pub(crate) fn filter_tracepoint(counter: &OwnedFd, filter: &str) -> Result<()> {
    const PERF_EVENT_IOC_SET_FILTER: libc::c_ulong = 0x4008_2406;
    let filter = CString::new(filter)?;
    // SAFETY: `filter` is a NUL-terminated string that outlives the call.
    check(unsafe {
        libc::ioctl(
            counter.as_raw_fd(),
            PERF_EVENT_IOC_SET_FILTER,
            filter.as_ptr(),
        )
    })
    .map(drop)
}

/// The signals that ask a run to end.
fn ending_signals() -> libc::sigset_t {
    // SAFETY: all zeroes is a valid sigset_t, and the set is only written by these calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Blocks SIGINT, SIGTERM and SIGHUP in this thread and those it starts; [`die_with_parent`] undoes it for children.
pub(crate) fn block_ending_signals() {
    let set = ending_signals();
    // SAFETY: `set` is initialised and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Waits for one of the signals of [`block_ending_signals`]; its number.
pub(crate) fn wait_ending_signal() -> libc::c_int {
    let set = ending_signals();
    let mut signal = 0;
    // SAFETY: both are live; a failure leaves `signal` at 0 and is tried again.
    while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
    signal
}
