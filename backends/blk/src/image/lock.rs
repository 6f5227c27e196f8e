//! Locks on an image, on the byte ranges that QEMU uses, so that QEMU, qemu-img and we see each
//! other.
//!
//! ```text
//!   byte 100 + P   held (shared) by whoever uses permission P
//!   byte 200 + P   held (shared) by whoever lets nobody else use permission P
//! ```
//!
//! First our own bytes are taken, then the others' are looked at: a conflict is somebody at
//! 200 + P for a P we use, or at 100 + P for a P we do not share. Two that come at once may both
//! give up, never both go on. The locks belong to the open file (OFD) and go when it, and all
//! I/O on it, has ended. Facts: QEMU block/file-posix.c, RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE.
#![expect(unsafe_code, reason = "fcntl with F_OFD_SETLK and F_OFD_GETLK")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use tracing::info;

use super::marker::Marker;

const PERM_BASE: i64 = 100;
const SHARED_BASE: i64 = 200;

/// QEMU's permission bits, by number.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Why an image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else uses the image in a way that excludes us.
    #[error("the image is in use by {holder}")]
    InUse {
        /// The process that holds the lock, where /proc shows it.
        holder: String,
    },
    /// fcntl failed.
    #[error("cannot lock the image")]
    System(#[from] io::Error),
}

/// How long a lock of nobody knows whom is waited for, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(5);
/// How often /proc is searched for who holds a lock.
const SEARCH: Duration = Duration::from_millis(200);
/// When the operator is told what is waited for, and how often again.
const FIRST_WORD: Duration = Duration::from_secs(1);
const NEXT_WORD: Duration = Duration::from_secs(30);

/// Takes the locks for reading, or for reading and writing. They last as long as `file`, which
/// `marker` marks.
///
/// I/O that a killed predecessor left in the kernel is waited for, for as long as it takes: a write
/// of it must not land after ours, nor a read in memory that the guest uses for something else by
/// then, which a lock for reading would let happen. A holder that is visible is an error at once.
/// One that is neither visible nor marked as dead is waited for half a minute: it may be the same,
/// of another program, or a process that /proc does not show, as none is within the sandbox.
pub fn lock(file: &File, marker: &Marker, read_only: bool) -> Result<(), LockError> {
    let start = Instant::now();
    let (mut search_at, mut word_at) = (start, start + FIRST_WORD);
    loop {
        let leftover = marker.sees_leftover_io(file)?;
        let conflict = try_lock(file, read_only)?;
        if conflict.is_none() && !leftover {
            return Ok(());
        }
        if conflict.is_some() {
            // Whoever waits keeps nobody out: two that wait would wait for each other.
            unlock(file)?;
        }
        let now = Instant::now();
        if let Some(byte) = conflict
            && now >= search_at
        {
            search_at = now + SEARCH;
            if let Some(holder) = find_holder(file, byte) {
                return Err(LockError::InUse { holder });
            }
        }
        if !leftover && now - start > PATIENCE {
            let holder = "a process that /proc does not show".to_owned();
            return Err(LockError::InUse { holder });
        }
        if now >= word_at {
            word_at = now + NEXT_WORD;
            let seconds = (now - start).as_secs();
            let by = if leftover {
                "I/O of a process that has gone"
            } else {
                "a process that cannot be seen, or its I/O"
            };
            info!(seconds, "the image is still locked by {by}: waiting for it");
        }
        // Nothing announces the release of a shared OFD lock.
        std::thread::sleep(RETRY);
    }
}

/// Gives up all locks of `file`.
pub fn unlock(file: &File) -> io::Result<()> {
    for base in [PERM_BASE, SHARED_BASE] {
        for perm in CONSISTENT_READ..=RESIZE {
            set(file, libc::F_UNLCK, base + perm)?;
        }
    }
    Ok(())
}

/// Takes our bytes and looks at the others'; the byte of a conflict, if there is one.
fn try_lock(file: &File, read_only: bool) -> Result<Option<i64>, LockError> {
    let uses: &[i64] = if read_only {
        &[CONSISTENT_READ]
    } else {
        &[CONSISTENT_READ, WRITE]
    };
    let refuses = [WRITE, RESIZE];
    for perm in uses {
        take(file, PERM_BASE + perm)?;
    }
    for perm in refuses {
        take(file, SHARED_BASE + perm)?;
    }
    let conflicts = uses
        .iter()
        .map(|perm| SHARED_BASE + perm)
        .chain(refuses.iter().map(|perm| PERM_BASE + perm));
    for byte in conflicts {
        if is_held_by_another(file, byte)? {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

fn flock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// A shared lock on one byte. Fails only where somebody holds it exclusively, as QEMU never does.
fn take(file: &File, byte: i64) -> io::Result<()> {
    set(file, libc::F_RDLCK, byte)
}

fn set(file: &File, kind: i32, byte: i64) -> io::Result<()> {
    let lock = flock(kind, byte);
    // SAFETY: lock is a valid flock, read by the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_held_by_another(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte);
    // SAFETY: lock is a valid flock, overwritten by the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Who holds `byte`: F_OFD_GETLK and /proc/locks do not tell, the fdinfo of the holder's fd does.
fn find_holder(file: &File, byte: i64) -> Option<String> {
    let inode = file.metadata().ok()?.ino();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let Ok(infos) = std::fs::read_dir(process.path().join("fdinfo")) else {
            continue;
        };
        for info in infos.flatten() {
            let text = std::fs::read_to_string(info.path()).unwrap_or_default();
            let ours = pid == std::process::id() && is_fd(&info, file);
            if !ours && text.lines().any(|line| is_lock(line, inode, byte)) {
                let name = std::fs::read_to_string(process.path().join("comm"));
                let name = name.unwrap_or_default();
                return Some(format!("process {pid} ({})", name.trim_end()));
            }
        }
    }
    None
}

fn is_fd(info: &std::fs::DirEntry, file: &File) -> bool {
    info.file_name().to_string_lossy().parse() == Ok(file.as_raw_fd())
}

/// Whether a line of fdinfo is an OFD lock on `byte` of `inode`, as in
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 101 101`.
fn is_lock(line: &str, inode: u64, byte: i64) -> bool {
    let Some(rest) = line.strip_prefix("lock:") else {
        return false;
    };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let [_, "OFDLCK", _, _, _, place, first, last] = fields[..] else {
        return false;
    };
    let same_inode = place.rsplit(':').next().and_then(|i| i.parse().ok()) == Some(inode);
    let first_ok = first.parse::<i64>().is_ok_and(|first| first <= byte);
    let last_ok = last == "EOF" || last.parse::<i64>().is_ok_and(|last| last >= byte);
    same_inode && first_ok && last_ok
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_did_not_get_the_image_keeps_nobody_else_out() {
        let name = format!("berth-blk-lock-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path).unwrap()
        };
        let (first, refused, third) = (open(), open(), open());
        let path_again = format!("/proc/self/fd/{}", first.as_raw_fd());
        std::fs::remove_file(&path).unwrap();
        let path = std::path::PathBuf::from(path_again);
        let marker = Marker::new(&first, &path).unwrap();
        lock(&first, &marker, false).unwrap();
        let error = lock(&refused, &marker, false).unwrap_err();
        assert!(matches!(error, LockError::InUse { .. }), "{error}");
        unlock(&first).unwrap();
        lock(&third, &marker, false).unwrap();
    }

    #[test]
    fn fdinfo_line_of_the_byte_and_inode_is_found() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101";
        assert!(is_lock(line, 1234, 101));
        assert!(!is_lock(line, 1234, 102));
        assert!(!is_lock(line, 1235, 101));
        assert!(!is_lock(
            "lock:\t1: POSIX ADVISORY READ 7 fe:00:1234 0 EOF",
            1234,
            101
        ));
    }
}
