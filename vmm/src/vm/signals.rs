//! The signals that end the process in order, as a file for the event loop.
#![expect(unsafe_code, reason = "signalfd has no safe wrapper")]

use std::fs::File;
use std::io::{self, Error, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

/// SIGTERM and its kin, blocked in every thread that is started later.
pub struct Signals {
    file: File,
}

impl Signals {
    /// Blocks the signals and opens the file. To be called before any thread is started.
    pub fn new() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset writes the set, which is complete from then on; the signal numbers are
        // valid, and the pointers live through the calls.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if error != 0 {
                return Err(Error::from_raw_os_error(error));
            }
            // A background process must be able to set its terminal back.
            libc::signal(libc::SIGTTOU, libc::SIG_IGN);
            libc::signal(libc::SIGTTIN, libc::SIG_IGN);
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: signalfd made the fd for us.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// Takes one signal that has come.
    pub fn take(&self) -> Option<i32> {
        // struct signalfd_siginfo has 128 bytes and begins with the signal's number.
        let mut info = [0; 128];
        (&self.file).read_exact(&mut info).ok()?;
        Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
