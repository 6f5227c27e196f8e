//! Tells I/O that has outlived its process from a process that lives.
//!
//! ```text
//!   byte M + 2·n       held through the file that all I/O goes through: until the last of it ended
//!   byte M + 2·n + 1   held through a second open file that nobody uses: until the process ended
//! ```
//!
//! A killed process has gone long before its last request has: the kernel still writes to the disk,
//! or into guest memory. Both locks are shared ones on bytes past the end of any image, n is the
//! process's own. Where somebody holds the first byte of a pair and nobody the second, such I/O is
//! under way, of a reader or a writer, and whoever comes next waits until it has ended.
//!
//! Not seen this way: what other programs have left behind, and what lies under a lock on more than
//! one byte. Owned by the image; no threads. Facts: fcntl(2), "Open file description locks".
#![expect(unsafe_code, reason = "fcntl with F_OFD_SETLK and F_OFD_GETLK")]

use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// M. QEMU's bytes are far below, images end far below.
const FIRST: i64 = 1 << 60;
/// Pairs to choose from.
const PAIRS: i64 = 1 << 31;
/// Most locks looked at: more than any number of daemons on one image.
const MAX_LOCKS: usize = 4096;

/// Our pair of bytes, for as long as it lives.
#[derive(Debug)]
pub struct Marker {
    /// Holds the second byte.
    _alive: File,
}

impl Marker {
    /// Marks the I/O of `file`, which was opened from `path`, as this process's.
    pub fn new(file: &File, path: &Path) -> io::Result<Marker> {
        let alive = File::open(path)?;
        let place = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        if place(&alive)? != place(file)? {
            return Err(io::Error::other("it was replaced while it was opened"));
        }
        // The standard library's hasher is seeded with random numbers.
        let random = std::collections::hash_map::RandomState::new()
            .build_hasher()
            .finish();
        let pair = FIRST + 2 * (random as i64 & (PAIRS - 1));
        // This one first: the other without it means that we are dead.
        take(&alive, pair + 1)?;
        take(file, pair)?;
        Ok(Marker { _alive: alive })
    }

    /// Whether some process has gone and its I/O on this image has not.
    pub fn sees_leftover_io(&self, file: &File) -> io::Result<bool> {
        let mut bytes = Vec::new();
        let mut ranges = vec![(FIRST, FIRST + 2 * PAIRS)];
        let mut looks = 0;
        while let Some((start, end)) = ranges.pop()
            && looks < MAX_LOCKS
        {
            if start >= end {
                continue;
            }
            looks += 1;
            // Some lock in the range, not the first: look on both sides of it.
            let Some((first, len)) = held_by_another(file, start, end - start)? else {
                continue;
            };
            if len == 1 {
                bytes.push(first);
                ranges.push((start, first));
                ranges.push((first + 1, end));
            }
        }
        bytes.sort_unstable();
        let is_alone = |byte: i64| byte % 2 == 0 && bytes.binary_search(&(byte + 1)).is_err();
        Ok(bytes.iter().any(|byte| is_alone(*byte)))
    }
}

fn flock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn take(file: &File, byte: i64) -> io::Result<()> {
    let lock = flock(libc::F_RDLCK, byte, 1);
    // SAFETY: lock is a valid flock, read by the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A lock of another open file within the range: where it begins and how long it is.
fn held_by_another(file: &File, start: i64, len: i64) -> io::Result<Option<(i64, i64)>> {
    let mut lock = flock(libc::F_WRLCK, start, len);
    // SAFETY: lock is a valid flock, overwritten by the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        0 if i32::from(lock.l_type) == libc::F_UNLCK => Ok(None),
        0 => Ok(Some((lock.l_start, lock.l_len))),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An open image without a name, and a path that opens it again.
    fn image(name: &str) -> (File, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("marker-{name}-{}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let fd = format!("/proc/self/fd/{}", file.as_raw_fd());
        (file, fd.into())
    }

    fn opened(path: &Path) -> (File, Marker) {
        let file = File::open(path).unwrap();
        let marker = Marker::new(&file, path).unwrap();
        (file, marker)
    }

    #[test]
    fn living_processes_are_told_from_what_a_dead_one_left() {
        let (_keep, path) = image("living");
        let (ours, marker) = opened(&path);
        assert!(!marker.sees_leftover_io(&ours).unwrap());
        let mut living: Vec<_> = (0..5).map(|_| opened(&path)).collect();
        assert!(!marker.sees_leftover_io(&ours).unwrap());
        // One of them dies; its I/O still holds its file.
        let (io, dead) = living.swap_remove(2);
        drop(dead);
        assert!(marker.sees_leftover_io(&ours).unwrap());
        drop(living);
        assert!(marker.sees_leftover_io(&ours).unwrap());
        drop(io);
        assert!(!marker.sees_leftover_io(&ours).unwrap());
    }

    #[test]
    fn locks_of_others_are_not_taken_for_marks() {
        let (keep, path) = image("others");
        let (ours, marker) = opened(&path);
        for (start, len) in [(0, 0), (FIRST - 10, 1000), (100, 104)] {
            let lock = flock(libc::F_RDLCK, start, len);
            // SAFETY: lock is a valid flock.
            let taken = unsafe { libc::fcntl(keep.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
            assert_eq!(taken, 0);
            assert!(!marker.sees_leftover_io(&ours).unwrap());
        }
    }

    #[test]
    fn file_that_is_not_the_one_at_the_path_is_refused() {
        let (_keep, one) = image("one");
        let (_keep, other) = image("other");
        let file = File::open(&one).unwrap();
        assert!(Marker::new(&file, &other).is_err());
    }
}
