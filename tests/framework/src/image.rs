//! Disk images, made and read with e2fsprogs; nothing is mounted on the host.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::process::run;

/// An empty sparse image.
///
/// # Errors
/// It cannot be made.
pub fn sparse(path: &Path, size_bytes: u64) -> Result<()> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    file.set_len(size_bytes)?;
    Ok(())
}

/// An image with an ext4 file system that holds what is in `contents`.
///
/// # Errors
/// It cannot be made.
pub fn ext4(path: &Path, size_bytes: u64, contents: &Path) -> Result<()> {
    sparse(path, size_bytes)?;
    let (contents, path) = (text(contents)?, text(path)?);
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-m", "0", "-d", contents, path],
    )
    .map(drop)
}

/// A file of `size_bytes` pseudo-random bytes, the same for the same seed.
///
/// # Errors
/// It cannot be written.
pub fn random(path: &Path, size_bytes: u64, seed: u64) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    // xorshift64*: not for secrets, and without period or pattern that a transfer could hide in.
    let mut state = seed | 1;
    let mut left = size_bytes;
    let mut buffer = vec![0u8; 1 << 20];
    while left > 0 {
        for word in buffer.chunks_exact_mut(8) {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
        }
        let count = left.min(buffer.len() as u64);
        file.write_all(&buffer[..usize::try_from(count)?])?;
        left -= count;
    }
    Ok(())
}

/// Bytes of storage that a file takes.
///
/// # Errors
/// It is not there.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)
        .with_context(|| path.display().to_string())?
        .blocks()
        * 512)
}

/// Whether both files hold the same bytes.
///
/// # Errors
/// One cannot be read.
pub fn same(one: &Path, other: &Path) -> Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let mut buffers = [vec![0u8; 1 << 20], vec![0u8; 1 << 20]];
    loop {
        let count = one.read(&mut buffers[0])?;
        if count == 0 {
            return Ok(true);
        }
        other.read_exact(&mut buffers[1][..count])?;
        if buffers[0][..count] != buffers[1][..count] {
            return Ok(false);
        }
    }
}

/// MD5 of a file, as `md5sum` prints it in the guest and here.
///
/// # Errors
/// It cannot be read.
pub fn md5(path: &Path) -> Result<String> {
    let line = run("md5sum", &[text(path)?])?;
    Ok(line
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// Checks that an ext file system is clean: unmounted in order, and whole by e2fsck's full check.
///
/// # Errors
/// It is not.
pub fn require_clean(image: &Path) -> Result<()> {
    let path = text(image)?;
    let state = run("dumpe2fs", &["-h", path])?;
    if !state
        .lines()
        .any(|line| line.starts_with("Filesystem state:") && line.ends_with(" clean"))
    {
        bail!("file system in {path} was not unmounted");
    }
    if state.contains("needs_recovery") {
        bail!("journal in {path} has not been written back: it was not unmounted");
    }
    run("e2fsck", &["-f", "-n", path]).map(drop)
}

/// Copies a file out of an ext file system without mounting it.
///
/// # Errors
/// It is not there.
pub fn extract(image: &Path, file: &str, to: &Path) -> Result<()> {
    let dump = format!("dump {file} {}", text(to)?);
    run("debugfs", &["-R", &dump, text(image)?])?;
    // debugfs ends with 0 whatever happens.
    if !to.exists() {
        bail!("no {file} in {}", image.display());
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
