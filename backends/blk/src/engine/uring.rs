//! The io_uring engine: every operation is one submission on a registered file.
#![expect(unsafe_code, reason = "submissions name buffers by address")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use berth_queue_worker::uring::{IoRing, Setup};
use io_uring::{opcode, squeue, types};

use super::{DiskEngine, Io};
use crate::image::Disk;

/// The disk's file in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// All that the ring may do.
const OPCODES: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// I/O through one io_uring.
#[derive(Debug)]
pub struct UringEngine {
    ring: IoRing,
}

impl UringEngine {
    /// A ring with room for `depth` operations, on the thread that will use it.
    pub fn new(disk: &Disk, depth: u16) -> io::Result<UringEngine> {
        let ring = IoRing::new(&Setup {
            entries: u32::from(depth),
            files: &[disk.file().as_raw_fd()],
            opcodes: &OPCODES,
            ..Setup::default()
        })?;
        Ok(UringEngine { ring })
    }
}

fn entry(io: &Io) -> squeue::Entry {
    match *io {
        // One buffer: the plain opcodes spare the kernel the copy of an iovec array.
        Io::Read {
            offset,
            iovecs: [one],
        } => opcode::Read::new(FILE, one.iov_base.cast(), clamp(one.iov_len))
            .offset(offset)
            .build(),
        Io::Read { offset, iovecs } => {
            opcode::Readv::new(FILE, iovecs.as_ptr(), iovecs.len() as u32)
                .offset(offset)
                .build()
        }
        Io::Write {
            offset,
            iovecs: [one],
            durable,
        } => opcode::Write::new(FILE, one.iov_base.cast(), clamp(one.iov_len))
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        Io::Write {
            offset,
            iovecs,
            durable,
        } => opcode::Writev::new(FILE, iovecs.as_ptr(), iovecs.len() as u32)
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        Io::Sync => opcode::Fsync::new(FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Io::Allocate { mode, offset, len } => opcode::Fallocate::new(FILE, len)
            .offset(offset)
            .mode(mode)
            .build(),
    }
}

/// What is cut off here comes back as a short transfer and is continued.
fn clamp(len: usize) -> u32 {
    len.min(1 << 30) as u32
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

impl DiskEngine for UringEngine {
    unsafe fn start(&mut self, tag: u64, io: &Io) -> bool {
        let entry = entry(io).user_data(tag);
        // SAFETY: the caller keeps iovecs and buffers until the completion is taken, or until this
        // engine, and with it the ring, is dropped.
        unsafe { self.ring.push(&entry) }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    fn take_completions(&mut self, each: &mut dyn FnMut(u64, i32)) -> io::Result<()> {
        self.ring
            .take_completions(|done| each(done.user_data, done.result))
    }

    fn is_ready(&mut self) -> bool {
        self.ring.is_ready()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.ring.wait()
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ring.completion_fd())
    }

    fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    fn clear_event(&self) {
        self.ring.clear_event();
    }
}
