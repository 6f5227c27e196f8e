//! The initramfs: as high in the kernel's own part of RAM (below the hole, or above 4 GiB) as the kernel lets it be, out
//! of the kernel's way.

use std::fs::File;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestRam;
use crate::memory::layout::HIGH_RAM_START;

const PAGE: u64 = 4096;

/// Why an initramfs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is missing or not ours to read.
    #[error("cannot open the initramfs {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A directory or device.
    #[error("the initramfs {} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// Nothing in it.
    #[error("the initramfs {} is empty", .0.display())]
    Empty(PathBuf),
    /// No room.
    #[error(
        "the initramfs {} of {len} bytes does not fit into guest memory: {free} bytes are free \
         between the kernel's end {kernel_end:#x} and {limit:#x}",
        .path.display()
    )]
    TooBig {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// Bytes there are for it.
        free: u64,
        /// End of the kernel.
        kernel_end: u64,
        /// End of the room for it.
        limit: u64,
    },
    /// It could not be read to its end.
    #[error("cannot read the initramfs {} of {len} bytes", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// What the file or `vm-memory` said.
        source: GuestMemoryError,
    },
}

/// Where the initramfs is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    /// Guest physical start.
    pub start: GuestAddress,
    /// Length in bytes.
    pub len: u64,
}

/// Reads the file straight into guest memory, between the kernel's end and `max`, the highest address
/// that the kernel accepts.
pub fn load(
    ram: &GuestRam,
    path: &Path,
    kernel_end: GuestAddress,
    max: u64,
) -> Result<Initramfs, Error> {
    let open_error = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    if super::instead_of_a_file(path).is_some() {
        return Err(Error::NotAFile(path.to_owned()));
    }
    let mut file = File::open(path).map_err(open_error)?;
    let metadata = file.metadata().map_err(open_error)?;
    if !metadata.is_file() {
        return Err(Error::NotAFile(path.to_owned()));
    }
    let len = metadata.len();
    if len == 0 {
        return Err(Error::Empty(path.to_owned()));
    }
    let end = match kernel_end.0 {
        HIGH_RAM_START.. => HIGH_RAM_START + ram.high_len(),
        _ => ram.low_len(),
    };
    let limit = end.min(max.saturating_add(1));
    let start = place(len, kernel_end.0, limit).ok_or_else(|| Error::TooBig {
        path: path.to_owned(),
        len,
        free: limit.saturating_sub(kernel_end.0.next_multiple_of(PAGE)),
        kernel_end: kernel_end.0,
        limit,
    })?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .map_err(|source| Error::Read {
            path: path.to_owned(),
            len,
            source,
        })?;
    Ok(Initramfs {
        start: GuestAddress(start),
        len,
    })
}

/// The highest page-aligned start below `limit` that is not below the kernel's end.
fn place(len: u64, kernel_end: u64, limit: u64) -> Option<u64> {
    let start = limit.checked_sub(len)? & !(PAGE - 1);
    (start >= kernel_end).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;

    #[test]
    fn it_goes_as_high_as_it_may() {
        assert_eq!(place(0x1001, 0x20_0000, 0x100_0000), Some(0xff_e000));
        assert_eq!(place(0xe0_0000, 0x20_0000, 0x100_0000), Some(0x20_0000));
        assert_eq!(place(0xe0_0001, 0x20_0000, 0x100_0000), None);
        assert_eq!(place(u64::MAX, 0x20_0000, 0x100_0000), None);
    }

    #[test]
    fn its_bytes_are_in_guest_memory() {
        let ram = testing::ram(4 << 20);
        let file = testing::TempFile::new(b"070701 and so on");
        let initramfs = load(&ram, file.path(), GuestAddress(1 << 20), 0x2f_ffff).unwrap();
        assert_eq!(initramfs.start, GuestAddress(0x2f_f000));
        let mut bytes = vec![0; initramfs.len as usize];
        ram.memory()
            .read_slice(&mut bytes, initramfs.start)
            .unwrap();
        assert_eq!(bytes, b"070701 and so on");
    }

    #[test]
    fn what_cannot_be_used_is_said_in_one_line() {
        let ram = testing::ram(4 << 20);
        let end = GuestAddress(0x3f_f001);
        let file = testing::TempFile::new(b"x");
        let error = load(&ram, file.path(), end, u64::MAX)
            .unwrap_err()
            .to_string();
        assert!(error.contains("0 bytes are free"), "{error}");
        let empty = testing::TempFile::new(b"");
        assert!(matches!(
            load(&ram, empty.path(), end, u64::MAX),
            Err(Error::Empty(_))
        ));
        assert!(matches!(
            load(&ram, Path::new("/"), end, u64::MAX),
            Err(Error::NotAFile(_))
        ));
        assert!(matches!(
            load(&ram, Path::new("/nonexistent"), end, u64::MAX),
            Err(Error::Open { .. })
        ));
    }
}
