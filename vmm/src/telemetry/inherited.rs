//! A descriptor that this process inherited and was told the number of.
#![expect(unsafe_code, reason = "taking a descriptor by its number")]

use std::fs::File;
use std::io::{self, Error};
use std::os::fd::FromRawFd;

/// Takes `fd` over for writing that does not block. To be called once for it, before anything else could be opened in
/// its place.
pub(super) fn writable(fd: i32) -> io::Result<File> {
    // SAFETY: integers only; any number may be asked about.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(Error::last_os_error());
    }
    if flags & libc::O_ACCMODE == libc::O_RDONLY {
        return Err(Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: as above.
    unsafe {
        if libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0
            || libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) < 0
        {
            return Err(Error::last_os_error());
        }
    }
    // SAFETY: it is open, and whoever started this process gave it away by naming it.
    Ok(unsafe { File::from_raw_fd(fd) })
}
