//! The disks that are measured on: a zram device, and a file. Both are full of what does not compress.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::janitor::Janitor;
use crate::sys::SharedMemory;

/// What a cell runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backing {
    /// zram past the page cache: completes at once, shows a daemon's own cost.
    Zram,
    /// A file past the page cache: completes later, shows overlap.
    File,
    /// The same file through the page cache: io_uring completes inline.
    Cache,
}

impl Backing {
    /// Whether the page cache is passed by.
    pub fn direct(self) -> bool {
        self != Backing::Cache
    }

    /// In names of cells.
    pub fn name(self) -> &'static str {
        match self {
            Backing::Zram => "zram",
            Backing::File => "file",
            Backing::Cache => "cache",
        }
    }
}

/// A disk that is there.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What it is.
    pub backing: Backing,
    /// The device or file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

impl Disk {
    /// Opens it the way the cells use it.
    pub fn open(&self, write: bool) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        if self.backing.direct() {
            options.custom_flags(libc::O_DIRECT);
        }
        options
            .open(&self.path)
            .with_context(|| format!("cannot open {}", self.path.display()))
    }
}

const ZRAM_CONTROL: &str = "/sys/class/zram-control/hot_add";
/// Writes of this size fill a disk.
const PIECE: usize = 1 << 20;

/// A new zram device of `size` bytes, removed by `janitor`.
pub fn make_zram(size: u64, janitor: &mut Janitor) -> Result<Disk> {
    let number = fs::read_to_string(ZRAM_CONTROL).with_context(|| {
        format!("no zram here: {ZRAM_CONTROL} (as root, with the zram module: modprobe zram)")
    })?;
    let number: u32 = number.trim().parse().context("hot_add of zram")?;
    janitor.zram(number)?;
    let size_file = format!("/sys/block/zram{number}/disksize");
    fs::write(&size_file, size.to_string()).with_context(|| format!("cannot write {size_file}"))?;
    let disk = Disk {
        backing: Backing::Zram,
        path: PathBuf::from(format!("/dev/zram{number}")),
        size,
    };
    fill(&disk)?;
    Ok(disk)
}

/// A new file of `size` bytes in `directory`, which `janitor` removes.
pub fn make_file(directory: &Path, size: u64) -> Result<Disk> {
    let path = directory.join("disk.img");
    File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let disk = Disk {
        backing: Backing::File,
        path,
        size,
    };
    fill(&disk)?;
    Ok(disk)
}

/// The same file, for the cells that go through the page cache.
pub fn cached(file: &Disk) -> Result<Disk> {
    let disk = Disk {
        backing: Backing::Cache,
        ..file.clone()
    };
    warm(&disk)?;
    Ok(disk)
}

/// Has all of a cached disk in the page cache, where a host that reclaims cold pages may have taken
/// some since the last run.
pub fn warm(disk: &Disk) -> Result<()> {
    if disk.backing.direct() {
        return Ok(());
    }
    let read = std::io::copy(&mut disk.open(false)?, &mut std::io::sink())?;
    if read != disk.size {
        bail!(
            "{} has {read} bytes, not {}",
            disk.path.display(),
            disk.size
        );
    }
    Ok(())
}

fn fill(disk: &Disk) -> Result<()> {
    // Memory of its own pages, as direct I/O wants it.
    let mut piece = SharedMemory::new(PIECE)?;
    let file = disk.open(true)?;
    for at in (0..disk.size).step_by(PIECE) {
        let len = (disk.size - at).min(PIECE as u64) as usize;
        // Every piece differs, in case something deduplicates.
        for page in (0..PIECE).step_by(4096) {
            let stamp = (at + page as u64).to_le_bytes();
            piece.bytes_mut()[page..page + 8].copy_from_slice(&stamp);
        }
        file.write_all_at(&piece.bytes_mut()[..len], at)
            .with_context(|| format!("cannot fill {}", disk.path.display()))?;
    }
    file.sync_all()?;
    Ok(())
}

/// Flushes what was written, so that the next cell does not pay for it.
pub fn settle(disk: &Disk) -> Result<()> {
    Ok(disk.open(true)?.sync_all()?)
}
