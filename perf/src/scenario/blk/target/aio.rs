//! The file by the kernel's older asynchronous interface (libaio's), without the library.
#![allow(unsafe_code, reason = "io_submit takes buffers by address")]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;

use super::{Direction, Load, Request, Target};
use crate::sys::SharedMemory;

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;

/// linux/aio_abi.h, struct iocb (little endian).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// linux/aio_abi.h, struct io_event.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

/// An aio context and its control blocks.
pub struct AioTarget {
    file: File,
    load: Load,
    memory: SharedMemory,
    context: usize,
    /// One per slot; the kernel copies them at submission.
    blocks: Vec<Iocb>,
    queued: Vec<usize>,
    /// Addresses of the blocks of `queued`, as the kernel wants them.
    pointers: Vec<usize>,
    events: Vec<IoEvent>,
}

fn call(result: libc::c_long) -> Result<usize> {
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

impl AioTarget {
    /// A context for `load` on `file`.
    pub fn new(file: File, load: &Load, memory: SharedMemory) -> Result<AioTarget> {
        let mut context: usize = 0;
        // SAFETY: the kernel writes one word.
        call(unsafe { libc::syscall(libc::SYS_io_setup, load.depth, &raw mut context) })?;
        Ok(AioTarget {
            file,
            load: *load,
            memory,
            context,
            blocks: vec![Iocb::default(); load.depth],
            queued: Vec::with_capacity(load.depth),
            pointers: Vec::with_capacity(load.depth),
            events: vec![IoEvent::default(); load.depth],
        })
    }
}

impl Target for AioTarget {
    fn queue(&mut self, request: Request) -> Result<()> {
        let Request { slot, offset } = request;
        self.blocks[slot] = Iocb {
            data: slot as u64,
            opcode: match self.load.direction {
                Direction::Read => IOCB_CMD_PREAD,
                Direction::Write => IOCB_CMD_PWRITE,
            },
            fd: self.file.as_raw_fd().cast_unsigned(),
            buffer: self.memory.at(slot * self.load.block) as u64,
            len: self.load.block as u64,
            offset: offset.cast_signed(),
            ..Iocb::default()
        };
        self.queued.push(slot);
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        while !self.queued.is_empty() {
            self.pointers.clear();
            for &slot in &self.queued {
                self.pointers.push(&raw mut self.blocks[slot] as usize);
            }
            // SAFETY: the pointers name blocks that live through the call; the buffers they name
            // are each one slot's own and stay mapped until the context is destroyed.
            let taken = call(unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    self.pointers.len(),
                    self.pointers.as_mut_ptr(),
                )
            })?;
            self.queued.drain(..taken);
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> Result<()> {
        // SAFETY: the kernel writes at most `events.len()` events; no timeout is given.
        let got = call(unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1usize,
                self.events.len(),
                self.events.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        })
        .map_err(super::unanswered)?;
        for event in &self.events[..got] {
            if event.result != self.load.block as i64 {
                let code = i32::try_from(-event.result).unwrap_or(0);
                return Err(Error::from_raw_os_error(code));
            }
            done.push(event.data as usize);
        }
        Ok(())
    }
}

impl Drop for AioTarget {
    fn drop(&mut self) {
        // SAFETY: our context; the call waits for what is in flight, and the buffers are dropped
        // after this.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
