//! The fallback engine: preadv, pwritev2, fdatasync, fallocate, each done when `start` returns.
#![expect(unsafe_code, reason = "vectored I/O at an offset, by address")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::{DiskEngine, Io};
use crate::image::Disk;

/// I/O by blocking system calls.
#[derive(Debug)]
pub struct SyncEngine {
    /// Open for as long as the disk, which the worker holds.
    fd: RawFd,
    done: Vec<(u64, i32)>,
}

impl SyncEngine {
    /// I/O on the disk's file.
    pub fn new(disk: &Disk) -> SyncEngine {
        SyncEngine {
            fd: disk.file().as_raw_fd(),
            done: Vec::new(),
        }
    }
}

/// Does `io` on `fd` with one system call, repeated after a signal; bytes or -errno.
///
/// # Safety
///
/// The iovecs name memory that may be accessed.
pub(crate) unsafe fn run(fd: RawFd, io: &Io) -> i32 {
    loop {
        // Offsets and lengths are within a file, so they fit.
        // SAFETY: the caller vouches for the iovecs; a bad fd is an error.
        let result = unsafe {
            match *io {
                Io::Read { offset, iovecs } => libc::preadv(
                    fd,
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    offset as libc::off_t,
                ),
                Io::Write {
                    offset,
                    iovecs,
                    durable,
                } => libc::pwritev2(
                    fd,
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    offset as libc::off_t,
                    if durable { libc::RWF_DSYNC } else { 0 },
                ),
                Io::Sync => libc::fdatasync(fd) as isize,
                Io::Allocate { mode, offset, len } => {
                    let (offset, len) = (offset as libc::off_t, len as libc::off_t);
                    libc::fallocate(fd, mode, offset, len) as isize
                }
            }
        };
        if result >= 0 {
            return i32::try_from(result).unwrap_or(i32::MAX);
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            errno => return -errno.unwrap_or(libc::EIO),
        }
    }
}

impl DiskEngine for SyncEngine {
    unsafe fn start(&mut self, tag: u64, io: &Io) -> bool {
        // SAFETY: the caller's promise.
        let result = unsafe { run(self.fd, io) };
        self.done.push((tag, result));
        true
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn take_completions(&mut self, limit: usize, each: &mut dyn FnMut(u64, i32)) -> io::Result<()> {
        for (tag, result) in self.done.drain(..limit.min(self.done.len())) {
            each(tag, result);
        }
        Ok(())
    }

    fn done_here(&self) -> usize {
        self.done.len()
    }

    fn is_ready(&mut self) -> bool {
        !self.done.is_empty()
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completion_fd(&self) -> Option<RawFd> {
        None
    }
}
