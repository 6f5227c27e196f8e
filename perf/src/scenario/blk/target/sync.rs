//! The file by pread and pwrite: one request after the other, whatever the depth.
#![allow(unsafe_code, reason = "pread into a buffer that is not a slice")]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;

use super::{Direction, Load, Request, Target};
use crate::sys::SharedMemory;

/// System calls on a file.
pub struct SyncTarget {
    file: File,
    load: Load,
    memory: SharedMemory,
    queued: std::collections::VecDeque<Request>,
}

impl SyncTarget {
    /// For `load` on `file`.
    pub fn new(file: File, load: &Load, memory: SharedMemory) -> SyncTarget {
        SyncTarget {
            file,
            load: *load,
            memory,
            queued: std::collections::VecDeque::with_capacity(load.depth),
        }
    }
}

impl Target for SyncTarget {
    fn queue(&mut self, request: Request) -> Result<()> {
        self.queued.push_back(request);
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> Result<()> {
        let Some(Request { slot, offset }) = self.queued.pop_front() else {
            return Err(Error::other("nothing is in flight"));
        };
        let len = self.load.block;
        let buffer = self.memory.at(slot * len).cast();
        let (fd, at) = (self.file.as_raw_fd(), offset.cast_signed());
        // SAFETY: the buffer is mapped, `len` long, and this slot's own.
        let result = unsafe {
            match self.load.direction {
                Direction::Read => libc::pread(fd, buffer, len, at),
                Direction::Write => libc::pwrite(fd, buffer, len, at),
            }
        };
        match usize::try_from(result) {
            Ok(moved) if moved == len => done.push(slot),
            Ok(moved) => return Err(Error::other(format!("short transfer of {moved} bytes"))),
            Err(_) => return Err(Error::last_os_error()),
        }
        Ok(())
    }
}
