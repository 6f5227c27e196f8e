//! The few system calls that std does not have: poll, eventfd access that cannot block, signalfd,
//! and taking over inherited file descriptors.
#![expect(unsafe_code, reason = "system calls without a safe wrapper in std")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A slot of [`poll`] that waits for `events` of `fd`; a negative fd is ignored.
pub(crate) fn poll_slot(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits until a slot is ready, `timeout_ms` (-1: for ever) has passed, or a signal came (all
/// slots are then not ready).
pub(crate) fn poll(slots: &mut [libc::pollfd], timeout_ms: i32) -> io::Result<()> {
    for slot in &mut *slots {
        slot.revents = 0;
    }
    // SAFETY: slots is a valid array of its own length.
    let n = unsafe { libc::poll(slots.as_mut_ptr(), slots.len() as libc::nfds_t, timeout_ms) };
    match n {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            e => Err(e),
        },
    }
}

/// Reads an eventfd without ever blocking, whatever the flags of the fd (its file description
/// belongs to the frontend, so the flags are not ours to change). 0 where there is nothing.
pub(crate) fn read_event(fd: BorrowedFd) -> io::Result<u64> {
    let mut value = [0u8; 8];
    let iov = libc::iovec {
        iov_base: value.as_mut_ptr().cast(),
        iov_len: value.len(),
    };
    // SAFETY: one iovec over `value`, which outlives the call.
    let got = unsafe { libc::preadv2(fd.as_raw_fd(), &iov, 1, -1, libc::RWF_NOWAIT) };
    if got == 8 {
        return Ok(u64::from_ne_bytes(value));
    }
    if got >= 0 {
        return Ok(0);
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        e if e.kind() == io::ErrorKind::Interrupted => Ok(0),
        e => Err(e),
    }
}

/// Adds 1 to an eventfd. A counter that is full on a non-blocking fd is a success: it is readable.
pub(crate) fn write_event(fd: BorrowedFd) -> io::Result<()> {
    let value = 1u64.to_ne_bytes();
    // SAFETY: value is 8 readable bytes.
    let sent = unsafe { libc::write(fd.as_raw_fd(), value.as_ptr().cast(), value.len()) };
    if sent >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        // It blocked, so it is full, until the control thread lost patience (see `interrupt`).
        e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
        e => Err(e),
    }
}

/// Blocks `signals` for this thread and those it starts, and returns an fd that reads them.
pub(crate) fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data that sigemptyset initialises; the new fd is ours alone.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Takes over an fd that this process inherited and that the operator named by number.
pub(crate) fn adopt_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl checks the number. Once checked, the fd is open; it was named on the command
    // line (or by LISTEN_FDS) to be handed over, and mains adopt each number once.
    unsafe {
        if libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Whether a socket listens (SO_ACCEPTCONN). An error where `fd` is no socket.
pub(crate) fn is_listening(fd: BorrowedFd) -> io::Result<bool> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and len are valid for the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value != 0)
}

/// A memfd of `len` bytes.
pub(crate) fn memfd(name: &std::ffi::CStr, len: u64) -> io::Result<OwnedFd> {
    // SAFETY: name is a C string; the new fd is ours alone.
    let fd = unsafe {
        match libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    std::fs::File::from(fd.try_clone()?).set_len(len)?;
    Ok(fd)
}

/// A memfd of `len` bytes that nobody can resize any more.
pub(crate) fn sealed_memfd(name: &std::ffi::CStr, len: u64) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: name is a C string; the new fd is ours alone.
    let fd = unsafe {
        match libc::memfd_create(name.as_ptr(), flags) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    std::fs::File::from(fd.try_clone()?).set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: fcntl on an fd that is open.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A new eventfd, close-on-exec and non-blocking.
pub(crate) fn event() -> io::Result<OwnedFd> {
    // SAFETY: no preconditions; the new fd is ours alone.
    unsafe {
        match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// The signal that gets a worker thread out of a system call that blocks on a frontend's fd.
fn interrupt_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn ignore_signal(_signal: libc::c_int) {}

/// Makes [`interrupt`] end blocking system calls with EINTR in this process, and do nothing else.
pub(crate) fn prepare_interrupts() -> io::Result<()> {
    // SAFETY: sigaction is plain data; the handler does nothing, so it is async-signal-safe. No
    // SA_RESTART: that the call ends is the point.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore_signal as *const () as libc::sighandler_t;
        libc::sigaction(interrupt_signal(), &action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gets a thread out of a blocking system call. It may come at any time: whoever makes such calls
/// retries those that must not be lost.
pub(crate) fn interrupt<T>(thread: &std::thread::JoinHandle<T>) {
    use std::os::unix::thread::JoinHandleExt;
    // SAFETY: the handle has not been joined, so the pthread_t is valid.
    unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, interrupt_signal()) };
}
