//! The VMM's own terminal in raw mode, and its way back on every exit.
//!
//! Raw mode hands every key to the guest, Ctrl-C too. The terminal is set back when [`RawMode`] is
//! dropped, and by a handler of the signals that end the process without unwinding (a panic aborts).
#![expect(
    unsafe_code,
    reason = "termios and signal handlers have no safe wrapper"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Signals that kill a process from inside.
const CRASHES: [i32; 6] = [
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
];

/// What the handler needs: written once, before the handler is installed.
static SAVED: OnceLock<(RawFd, libc::termios)> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);
/// One raw terminal at a time.
static OWNER: Mutex<()> = Mutex::new(());

/// A terminal in raw mode; dropped, it is as it was.
pub struct RawMode {
    _private: (),
}

impl RawMode {
    /// Puts the terminal `fd` into raw mode, or returns `None` where it is not a terminal.
    pub fn enter(fd: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let _owner = OWNER.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = attributes(fd)? else {
            return Ok(None);
        };
        SAVED.get_or_init(|| (fd.as_raw_fd(), saved));
        for signal in CRASHES {
            on_crash_restore(signal)?;
        }
        let mut raw = saved;
        // SAFETY: `raw` is a complete termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Output keeps its newline translation: our own log shares the screen.
        raw.c_oflag = saved.c_oflag;
        set(fd.as_raw_fd(), &raw)?;
        RAW.store(true, Ordering::SeqCst);
        Ok(Some(Self { _private: () }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn attributes(fd: BorrowedFd<'_>) -> io::Result<Option<libc::termios>> {
    let mut termios = MaybeUninit::uninit();
    // SAFETY: the call writes a termios at the pointer or fails.
    if unsafe { libc::tcgetattr(fd.as_raw_fd(), termios.as_mut_ptr()) } == 0 {
        // SAFETY: the call succeeded, so it is written.
        return Ok(Some(unsafe { termios.assume_init() }));
    }
    match io::Error::last_os_error() {
        error
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOTTY | libc::EINVAL | libc::ENODEV)
            ) =>
        {
            Ok(None)
        }
        error => Err(error),
    }
}

fn set(fd: RawFd, termios: &libc::termios) -> io::Result<()> {
    // SAFETY: the pointer is to a complete termios that lives through the call.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, termios) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Async-signal-safe: an atomic, a read of a set OnceLock, and tcsetattr.
pub(crate) fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some((fd, saved)) = SAVED.get()
    {
        // Nothing can be done about an error on the way out.
        let _ = set(*fd, saved);
    }
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    restore();
    // SAFETY: both calls are async-signal-safe; the default action of these signals ends the process.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn on_crash_restore(signal: i32) -> io::Result<()> {
    // SAFETY: the handler calls only async-signal-safe functions; SIGSEGV's former handler (Rust's
    // stack overflow message) is given up for it.
    let old = unsafe {
        libc::signal(
            signal,
            restore_and_die as extern "C" fn(libc::c_int) as libc::sighandler_t,
        )
    };
    if old == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
