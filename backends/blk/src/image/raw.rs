//! A raw image: a regular file or a block device, opened, checked and locked.
//!
//! Opening answers everything that does not change later: alignment for direct I/O, block sizes
//! for the guest. The size may change ([`Disk::update_size`]). Invariants: the image is locked
//! against other writers for as long as the [`Disk`] lives, or, with [`LockTime::Running`], from
//! [`Disk::begin_use`] to [`Disk::end_use`].
#![expect(unsafe_code, reason = "block device ioctls and statx")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::blocks::Blocks;
use super::holder::{Holder, LockTime};
use super::lock::LockError;
use super::marker::Marker;
use super::size::{Change, Size};
use crate::request::SECTOR_SIZE;

/// Discards a range of a block device (linux/fs.h).
pub const BLKDISCARD: libc::Ioctl = 0x1277;
/// Size of a block device in bytes (linux/fs.h).
pub const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened or looked at.
    #[error("cannot open image {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, a FIFO, a character device, …
    #[error("image {path} is {what}, expected a regular file or a block device")]
    WrongKind {
        /// The image.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The size is no whole number of sectors.
    #[error("image {path} has {size_bytes} bytes, which is not a multiple of 512")]
    BadSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// No bytes at all.
    #[error("image {path} is empty")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// O_DIRECT refused.
    #[error("image {path} is on a file system without direct I/O: use --cache=writeback")]
    NoDirect {
        /// The image.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error("cannot use image {path}")]
    Lock {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: LockError,
    },
}

/// Whether the host's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Cache {
    /// Direct I/O (O_DIRECT)
    None,
    /// Through the page cache; a guest's flush makes it durable
    Writeback,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The image.
    pub path: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
    /// Use of the page cache.
    pub cache: Cache,
    /// When the image is locked.
    pub lock: LockTime,
}

/// What direct I/O on the image asks of buffers and offsets, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Alignment of memory addresses.
    pub mem_align: u64,
    /// Alignment of file offsets and lengths.
    pub offset_align: u64,
}

/// An open image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    size: Size,
    holder: Holder,
    read_only: bool,
    block_device: bool,
    direct: Option<Direct>,
    blocks: Blocks,
}

impl Disk {
    /// Opens, checks and locks an image.
    pub fn open(options: &OpenOptions) -> Result<Disk, ImageError> {
        let path = &options.path;
        let open_error = |source| ImageError::Open {
            path: path.clone(),
            source,
        };
        // Before the open: opening a FIFO or a tape would block or act.
        let kind = std::fs::metadata(path).map_err(open_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = kind_name(kind);
            return Err(ImageError::WrongKind {
                path: path.clone(),
                what,
            });
        }
        let file = open_file(options)?;
        let block_device = kind.is_block_device();
        let size_bytes = size_of_image(&file, block_device).map_err(open_error)?;
        check_size(path, size_bytes)?;
        let lock_error = |source| ImageError::Lock {
            path: path.clone(),
            source,
        };
        let marker = Marker::new(&file, path).map_err(|source| lock_error(source.into()))?;
        let holder = Holder::new(options.lock, marker);
        holder.open(&file, options.read_only).map_err(lock_error)?;
        let mut disk = Disk {
            file,
            path: path.clone(),
            size: Size::new(size_bytes),
            holder,
            read_only: options.read_only,
            block_device,
            direct: None,
            blocks: Blocks::of_file(),
        };
        disk.find_block_sizes(options.cache).map_err(open_error)?;
        Ok(disk)
    }

    fn find_block_sizes(&mut self, cache: Cache) -> io::Result<()> {
        if self.block_device {
            self.blocks = Blocks::of_device(&self.file)?;
        }
        if cache == Cache::None {
            let direct = match direct_limits(&self.file)? {
                Some(direct) => direct,
                None => Direct {
                    mem_align: 4096,
                    offset_align: probe_offset_align(&self.file, self.blocks.logical)?,
                },
            };
            // The guest must use whole blocks of direct I/O.
            self.blocks = self.blocks.at_least(direct.offset_align as u32);
            self.direct = Some(direct);
        }
        Ok(())
    }

    /// A queue begins to use the image; an error where somebody else does. Locks it
    /// where that was not done at the start. Blocks while the last I/O of a process that has gone
    /// is under way.
    pub fn begin_use(&self) -> Result<(), LockError> {
        self.holder.begin_use(&self.file, self.read_only)
    }

    /// A queue has ended, with nothing in flight.
    pub fn end_use(&self) {
        self.holder.end_use(&self.file, self.read_only);
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in sectors of 512 bytes, as the driver is told. It only grows.
    pub fn capacity_sectors(&self) -> u64 {
        self.size.told()
    }

    /// How many sectors of that there are; fewer where the image has shrunk.
    pub fn usable_sectors(&self) -> u64 {
        self.size.end()
    }

    /// Looks at the image's size again. Any thread.
    pub fn update_size(&self) -> io::Result<Change> {
        self.size
            .update(|| size_of_image(&self.file, self.block_device))
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Alignment, where I/O bypasses the page cache.
    pub fn direct(&self) -> Option<Direct> {
        self.direct
    }

    /// The units in which the guest should use it.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Discards a range of a block device whose driver knows no zeroing discard. Blocks.
    pub fn discard_blocks(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: BLKDISCARD reads two u64, which `range` is.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn kind_name(kind: std::fs::FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a character device"
    }
}

fn open_file(options: &OpenOptions) -> Result<File, ImageError> {
    let direct = options.cache == Cache::None;
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(&options.path);
    opened.map_err(|source| {
        let path = options.path.clone();
        if direct && source.raw_os_error() == Some(libc::EINVAL) {
            ImageError::NoDirect { path }
        } else {
            ImageError::Open { path, source }
        }
    })
}

fn check_size(path: &Path, size_bytes: u64) -> Result<(), ImageError> {
    let path = path.to_owned();
    if size_bytes == 0 {
        return Err(ImageError::Empty { path });
    }
    if !size_bytes.is_multiple_of(SECTOR_SIZE) {
        return Err(ImageError::BadSize { path, size_bytes });
    }
    Ok(())
}

fn size_of_image(file: &File, block_device: bool) -> io::Result<u64> {
    if !block_device {
        return Ok(file.metadata()?.len());
    }
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size) } {
        0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The smallest block of direct I/O that works, for kernels and file systems that do not say.
fn probe_offset_align(file: &File, block_size: u32) -> io::Result<u64> {
    let mut buffer = vec![0u8; 3 * 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    for len in [block_size as usize, 4096] {
        // A short read at the end of a small image is an answer too.
        match file.read_at(&mut buffer[aligned..aligned + len.min(4096)], 0) {
            Ok(_) => return Ok(len as u64),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::Unsupported.into())
}

/// What the kernel says about direct I/O on the file (statx, since 6.1); none where it does not.
fn direct_limits(file: &File) -> io::Result<Option<Direct>> {
    // SAFETY: statx is plain data, filled by the call; the path is an empty C string.
    let stat = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let fd = file.as_raw_fd();
        let flags = libc::AT_EMPTY_PATH;
        let mask = libc::STATX_DIOALIGN;
        if libc::statx(fd, c"".as_ptr(), flags, mask, &mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        stat
    };
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0;
    Ok(known.then(|| Direct {
        mem_align: u64::from(stat.stx_dio_mem_align).max(1),
        offset_align: u64::from(stat.stx_dio_offset_align).max(SECTOR_SIZE),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probed_alignment_is_no_finer_than_what_the_kernel_says() {
        let name = format!("berth-blk-probe-{}.img", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let opened = open_file(&OpenOptions {
            path: path.clone(),
            read_only: true,
            cache: Cache::None,
            lock: LockTime::Always,
        });
        std::fs::remove_file(&path).unwrap();
        let Ok(file) = opened else {
            eprintln!("skipped: no direct I/O in the temporary directory");
            return;
        };
        let probed = probe_offset_align(&file, 512).unwrap();
        if let Some(said) = direct_limits(&file).unwrap() {
            assert_eq!(probed, said.offset_align);
        }
    }
}
