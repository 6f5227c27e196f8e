//! What the kernel does with a file's I/O in a ring: tries it at once, or hands it to a worker.
//!
//! io_uring(7), "io-wq": what cannot be done without blocking, or cannot be tried that way, is
//! handed over. Whether it can be tried is a property of the file.
#![expect(unsafe_code, reason = "preadv2 and fstatfs")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::uring::UringEngine;
use super::{DiskEngine, Io, Plan};
use crate::image::Disk;

/// Aligned for any direct I/O.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Whether `[reads, writes]` of the disk's file are handed over each time.
pub(crate) fn handed_over(disk: &Disk) -> [bool; 2] {
    let file = disk.file();
    let reads = !knows_nowait(file);
    let buffered = disk.direct().is_none() && !disk.is_block_device();
    [
        reads,
        reads || (buffered && !writes_buffered_without_wait(file)),
    ]
}

/// Reads the first bytes of the disk with the engine of `plan`.
pub(crate) fn read(disk: &Disk, plan: &Plan) -> io::Result<()> {
    let mut page = Page([0; 4096]);
    let iovecs = [libc::iovec {
        iov_base: page.0.as_mut_ptr().cast(),
        iov_len: disk.blocks().logical.min(4096) as usize,
    }];
    let mut engine = UringEngine::new(disk, 1, plan)?;
    let io = Io::Read {
        offset: 0,
        iovecs: &iovecs,
    };
    // SAFETY: iovecs and page outlive the engine, whose drop waits.
    if !unsafe { engine.start(0, &io) } {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    engine.wait()?;
    let mut result = 0;
    engine.take_completions(1, &mut |_, bytes| result = bytes)?;
    match result {
        0.. => Ok(()),
        error if -error == libc::EAGAIN => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Whether reads that must not block can be tried (RWF_NOWAIT).
fn knows_nowait(file: &File) -> bool {
    let mut page = Page([0; 4096]);
    let iovec = libc::iovec {
        iov_base: page.0.as_mut_ptr().cast(),
        iov_len: page.0.len(),
    };
    // SAFETY: one iovec over `page`, which outlives the call.
    let result = unsafe { libc::preadv2(file.as_raw_fd(), &iovec, 1, 0, libc::RWF_NOWAIT) };
    result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP)
}

/// Whether io_uring tries buffered writes of a regular file (FOP_BUFFER_WASYNC). No interface
/// tells; these do.
fn writes_buffered_without_wait(file: &File) -> bool {
    const BTRFS: i64 = 0x9123_683e;
    const XFS: i64 = 0x5846_5342;
    // SAFETY: statfs is plain data, filled by the call.
    let magic = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        match libc::fstatfs(file.as_raw_fd(), &mut stat) {
            // Signed with glibc, unsigned with musl.
            0 => i64::from_ne_bytes(stat.f_type.to_ne_bytes()),
            _ => 0,
        }
    };
    matches!(magic, BTRFS | XFS)
}
