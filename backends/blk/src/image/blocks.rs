//! The units in which a medium likes to be used, for the guest: BLK_SIZE, TOPOLOGY, DISCARD.
//!
//! A block device is asked by ioctl; what only sysfs knows (discards) is read there, before the
//! sandbox closes it. A file has none of this: it takes any sector, in pages.
//! Spec: virtio 1.3, 5.2.4. Kernel: Documentation/ABI/stable/sysfs-block.
#![expect(unsafe_code, reason = "block device ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use crate::request::SECTOR_SIZE;

/// Where the first physical block begins (linux/fs.h).
const BLKALIGNOFF: libc::Ioctl = 0x127a;

/// What a medium likes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Smallest unit of I/O.
    pub logical: u32,
    /// Unit that the medium writes at once; at least `logical`.
    pub physical: u32,
    /// Where the first physical block begins, less than `physical`.
    pub alignment_offset: u32,
    /// Smallest I/O that costs no read and write back; 0 for unknown.
    pub min_io: u32,
    /// Largest I/O that is worth while; 0 for unknown.
    pub opt_io: u32,
    /// Unit of discards; none where the medium has none.
    pub discard: Option<u32>,
}

impl Blocks {
    /// Of a regular file.
    pub fn of_file() -> Blocks {
        Blocks {
            logical: SECTOR_SIZE as u32,
            physical: 4096,
            alignment_offset: 0,
            min_io: 0,
            opt_io: 0,
            discard: Some(4096),
        }
    }

    /// Of a block device.
    pub fn of_device(file: &File) -> io::Result<Blocks> {
        let logical = ioctl_u32(file, libc::BLKSSZGET)?;
        Ok(Blocks {
            logical,
            physical: ioctl_u32(file, libc::BLKPBSZGET)?.max(logical),
            // -1, which is none, for devices whose parts are not aligned with each other.
            alignment_offset: ioctl_u32(file, BLKALIGNOFF)?,
            min_io: ioctl_u32(file, libc::BLKIOMIN)?,
            opt_io: ioctl_u32(file, libc::BLKIOOPT)?,
            discard: discard_unit(file)?,
        })
    }

    /// The same for somebody who has to use blocks of `size` at least.
    pub fn at_least(self, size: u32) -> Blocks {
        let logical = self.logical.max(size);
        Blocks {
            logical,
            physical: self.physical.max(logical),
            ..self
        }
    }
}

/// A number of an ioctl that gives an int; 0 for one below that.
fn ioctl_u32(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: each of these requests writes one int.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) } {
        0 => Ok(u32::try_from(value).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The unit of a device's discards, none where it has none. A host without sysfs: as if it had, and
/// the device refuses them one by one.
fn discard_unit(file: &File) -> io::Result<Option<u32>> {
    let device = file.metadata()?.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let read = |name: &str| {
        // A partition has its disk's queue.
        ["queue", "../queue"].into_iter().find_map(|queue| {
            let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
            let text = std::fs::read_to_string(path).ok()?;
            text.trim().parse::<u64>().ok()
        })
    };
    if read("discard_max_bytes") == Some(0) {
        return Ok(None);
    }
    let unit = read("discard_granularity").unwrap_or(0);
    Ok(Some(u32::try_from(unit).unwrap_or(u32::MAX)))
}
