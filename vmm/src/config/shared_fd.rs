//! A file descriptor in a configuration, which is copied about and compared.

#![expect(
    unsafe_code,
    reason = "a descriptor that was inherited by number has to be duplicated"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// A descriptor that lives as long as the last copy. Two are equal if they are the same descriptor.
#[derive(Debug, Clone)]
pub struct SharedFd(Arc<OwnedFd>);

impl SharedFd {
    /// A duplicate of the descriptor of this number, which the process was started with.
    ///
    /// # Errors
    /// Where there is no such descriptor.
    pub fn inherited(number: RawFd) -> io::Result<Self> {
        // SAFETY: fcntl takes any number, and F_DUPFD_CLOEXEC touches no memory.
        let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        Ok(Self::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl From<OwnedFd> for SharedFd {
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

impl AsFd for SharedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl PartialEq for SharedFd {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_raw_fd() == other.0.as_raw_fd()
    }
}

impl Eq for SharedFd {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_no_descriptor_is_refused() {
        assert!(SharedFd::inherited(-1).is_err());
        assert!(SharedFd::inherited(1 << 20).is_err());
        let fd = SharedFd::inherited(0).unwrap();
        assert!(fd.as_fd().as_raw_fd() > 2);
        assert_eq!(fd, fd.clone());
        assert_ne!(fd, SharedFd::inherited(0).unwrap());
    }
}
