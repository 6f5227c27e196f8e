//! The file by io_uring: what a daemon with this engine could reach without virtio.
#![allow(unsafe_code, reason = "io_uring takes buffers by address")]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use super::{Direction, Load, Request, Target, Wait};
use crate::sys::SharedMemory;

/// One ring with the file registered; a batch is one system call.
pub struct UringTarget {
    ring: IoUring,
    load: Load,
    memory: SharedMemory,
    queued: usize,
}

impl UringTarget {
    /// A ring for `load` on `file`.
    pub fn new(file: &File, load: &Load, memory: SharedMemory) -> Result<UringTarget> {
        let entries = u32::try_from(load.depth).map_err(Error::other)?;
        let mut builder = IoUring::builder();
        if load.wait == Wait::Sleep {
            // Completions are delivered when we ask for them, which saves interruptions. A client
            // that only looks at memory would never see one.
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        let ring = builder.build(entries.next_power_of_two())?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(UringTarget {
            ring,
            load: *load,
            memory,
            queued: 0,
        })
    }

    fn take(&mut self, done: &mut Vec<usize>) -> Result<()> {
        for completion in self.ring.completion() {
            let result = completion.result();
            if result < 0 {
                return Err(Error::from_raw_os_error(-result));
            }
            if result.cast_unsigned() as usize != self.load.block {
                return Err(Error::other(format!("short transfer of {result} bytes")));
            }
            done.push(completion.user_data() as usize);
        }
        Ok(())
    }
}

impl Target for UringTarget {
    fn queue(&mut self, request: Request) -> Result<()> {
        let Request { slot, offset } = request;
        let buffer = self.memory.at(slot * self.load.block);
        let len = self.load.block as u32;
        let entry = match self.load.direction {
            Direction::Read => opcode::Read::new(types::Fixed(0), buffer, len)
                .offset(offset)
                .build(),
            Direction::Write => opcode::Write::new(types::Fixed(0), buffer, len)
                .offset(offset)
                .build(),
        };
        // SAFETY: the buffer is this slot's own and stays mapped until the ring has been dropped.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }
            .map_err(Error::other)?;
        self.queued += 1;
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        // One that sleeps submits when it waits, in one call.
        while self.queued > 0 && self.load.wait == Wait::Poll {
            self.queued -= self.ring.submit()?.min(self.queued);
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> Result<()> {
        let mut looks = 0;
        loop {
            if self.load.wait == Wait::Sleep
                && (self.queued > 0 || self.ring.completion().is_empty())
            {
                let submitted = self.ring.submit_and_wait(1).map_err(super::unanswered)?;
                self.queued -= submitted.min(self.queued);
            }
            self.take(done)?;
            if !done.is_empty() {
                return Ok(());
            }
            looks = super::look_again(looks)?;
        }
    }
}
