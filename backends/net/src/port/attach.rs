//! How a queue of a tap comes to be ours.
//!
//! A tap with one queue whose last owner was killed is busy for some more milliseconds: an
//! io_uring lets go of its files when the kernel takes it apart, which is after the process has
//! been waited for. So a busy tap is tried again for a while, each time something happens to a
//! link (the tap loses its carrier when it is let go).

#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use libc::c_int;

use super::sys;
use super::tap::TapError;
use crate::device::MAX_PAIRS;

const TUN_DEVICE: &str = "/dev/net/tun";
const TAP_FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// How long a busy tap is waited for.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// How long at most until it is tried again.
const BUSY_RETRY: Duration = Duration::from_millis(100);

/// Interface names that the kernel takes literally.
pub(super) fn check_name(name: &str) -> Result<(), TapError> {
    let forbidden = |b: u8| b == b'/' || b == b'%' || b == b':' || !b.is_ascii_graphic();
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    if !fits || name == "." || name == ".." || name.bytes().any(forbidden) {
        return Err(TapError::Name(name.to_string()));
    }
    Ok(())
}

/// Why one queue could not be attached.
pub(super) enum AttachError {
    Open(io::Error),
    Refused(io::Error),
}

impl AttachError {
    /// The kernel says EINVAL for a wrong kind of interface and for a wrong IFF_MULTI_QUEUE.
    fn is_mismatch(&self) -> bool {
        matches!(self, Self::Refused(e) if e.raw_os_error() == Some(libc::EINVAL))
    }

    fn is_busy(&self) -> bool {
        matches!(self, Self::Refused(e) if e.raw_os_error() == Some(libc::EBUSY))
    }

    pub(super) fn explain(self, name: &str) -> TapError {
        let source = match self {
            Self::Open(e) => return TapError::Device(e),
            Self::Refused(e) => e,
        };
        match source.raw_os_error() {
            Some(libc::EINVAL) => TapError::NotTap(name.to_string()),
            Some(libc::EBUSY) => TapError::Busy(name.to_string()),
            Some(libc::EPERM) => TapError::NotOurs(name.to_string()),
            _ => TapError::Setup {
                name: name.to_string(),
                action: "attach to",
                source,
            },
        }
    }
}

pub(super) fn attach(name: &str, extra_flags: c_int) -> Result<OwnedFd, AttachError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN_DEVICE)
        .map_err(AttachError::Open)?;
    sys::set_iff(file.as_fd(), name, TAP_FLAGS | extra_flags).map_err(AttachError::Refused)?;
    Ok(file.into())
}

/// Attaches one queue; where the tap is busy, when it is free, if that is soon.
fn attach_when_free(name: &str, extra_flags: c_int) -> Result<OwnedFd, AttachError> {
    let deadline = Instant::now() + BUSY_PATIENCE;
    let mut events = None;
    loop {
        let error = match attach(name, extra_flags) {
            Err(error) if error.is_busy() && Instant::now() < deadline => error,
            result => return result,
        };
        // The first time round there may have been an event already: try again at once.
        let Some(socket) = &events else {
            let Ok(socket) = sys::link_socket() else {
                return Err(error);
            };
            events = Some(UnixDatagram::from(socket));
            continue;
        };
        // At most 100.
        let timeout_ms = BUSY_RETRY.as_millis() as c_int;
        if sys::wait_readable(socket.as_fd(), timeout_ms).is_ok_and(|readable| readable) {
            // What it says does not matter.
            let _ = socket.recv(&mut [0; 4096]);
        }
    }
}

/// Attaches the first queue; says whether the tap is a multi-queue one. IFF_MULTI_QUEUE must be
/// given exactly if the tap was made with it, and there is no way to ask without attaching.
pub(super) fn attach_first(
    name: &str,
    pairs: u16,
    exists: bool,
) -> Result<(OwnedFd, bool), TapError> {
    debug_assert!((1..=MAX_PAIRS).contains(&pairs));
    let wanted = pairs > 1;
    let flag = |multi_queue| {
        if multi_queue {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        }
    };
    let error = match attach_when_free(name, flag(wanted)) {
        Ok(fd) => return Ok((fd, wanted)),
        Err(e) => e,
    };
    if !exists || !error.is_mismatch() {
        return Err(error.explain(name));
    }
    match attach_when_free(name, flag(!wanted)) {
        Ok(_) if wanted => Err(TapError::SingleQueue(name.to_string(), pairs)),
        Ok(fd) => Ok((fd, true)),
        Err(e) if wanted && e.is_busy() => Err(TapError::SingleQueue(name.to_string(), pairs)),
        Err(e) => Err(e.explain(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be() {
        for bad in [
            "",
            "0123456789abcdef",
            "a/b",
            "tap%d",
            "a b",
            "a:1",
            ".",
            "..",
            "t\u{e4}p",
        ] {
            assert!(matches!(check_name(bad), Err(TapError::Name(_))), "{bad}");
        }
        for good in ["tap0", "0123456789abcde", "vm-1.net_0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
    }
}
