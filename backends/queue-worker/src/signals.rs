//! The signals that a daemon acts on, read by its control thread: SIGTERM and SIGINT end it,
//! SIGHUP makes a device that wants to look again at what it is made of.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, RawFd};

use crate::sys;

/// Bytes of `struct signalfd_siginfo`, which begins with the signal's number.
const SIGINFO_SIZE: usize = 128;

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Nothing,
    Reload,
    Stop,
}

/// Blocked signals, to be polled for.
#[derive(Debug)]
pub(crate) struct Signals(File);

impl Signals {
    /// Blocks the signals for this thread and those that it starts. SIGHUP ends the process as
    /// ever where it does not mean `reload`.
    pub(crate) fn new(reload: bool) -> io::Result<Signals> {
        let all = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        let wanted = if reload { &all[..] } else { &all[..2] };
        Ok(Signals(File::from(sys::signal_fd(wanted)?)))
    }

    /// To be polled for input: then call [`take`](Signals::take).
    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Takes every signal that has come. To stop outweighs the rest.
    pub(crate) fn take(&self) -> Wish {
        let mut wish = Wish::Nothing;
        let mut info = [0; SIGINFO_SIZE];
        loop {
            match (&self.0).read(&mut info) {
                Ok(SIGINFO_SIZE) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return wish,
                // Without signals there would be no way to end us in order.
                Ok(_) | Err(_) => return Wish::Stop,
            }
            let [s0, s1, s2, s3, ..] = info;
            if u32::from_ne_bytes([s0, s1, s2, s3]) != libc::SIGHUP as u32 {
                return Wish::Stop;
            }
            wish = Wish::Reload;
        }
    }
}
