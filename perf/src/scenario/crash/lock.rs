//! When the lock of a killed daemon is free: seen from outside, without taking it.
//!
//! Daemons lock an image by bytes of it (QEMU's convention, which ours follows: 100 + permission, 200 +
//! permission), for as long as the open file lives: until the kernel has ended the last request of the dead.
//! The successor locks the same bytes, so these tell nothing. Ours holds a byte more, far behind any image, that
//! no other process has (`backends/blk/src/image/marker.rs`): that one is watched where it is there. Who has
//! none is not started again until its bytes are free.
//! Facts: fcntl(2), "Open file description locks".
#![allow(unsafe_code, reason = "fcntl with F_OFD_GETLK")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;

/// Where QEMU's permission bytes begin and end.
const QEMU: Bytes = Bytes {
    first: 100,
    count: 200,
};
/// Where markers begin: pairs of bytes, the first of each is held by the file of all I/O.
const MARKERS: Bytes = Bytes {
    first: 1 << 60,
    count: 1 << 33,
};
const GLANCE: Duration = Duration::from_micros(100);
/// How long requests of the dead may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A range of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes {
    first: i64,
    count: i64,
}

/// What is locked by one daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Bytes that nobody else has: they are free when it has gone.
    Own(Bytes),
    /// Bytes that a successor takes too.
    Shared(Bytes),
}

impl Held {
    /// What somebody has locked of `image`.
    pub(super) fn look(image: &File) -> Result<Held> {
        let Some(marker) = locked(image, MARKERS)? else {
            return match locked(image, QEMU)? {
                Some(_) => Ok(Held::Shared(QEMU)),
                None => bail!("nobody has locked the image"),
            };
        };
        let io = marker.first & !1;
        let own = Bytes {
            first: io,
            count: 1,
        };
        if locked(image, own)?.is_none() {
            bail!("a lock at {:#x} that is no daemon's marker", marker.first);
        }
        Ok(Held::Own(own))
    }

    fn bytes(self) -> Bytes {
        match self {
            Held::Own(bytes) | Held::Shared(bytes) => bytes,
        }
    }
}

/// Waits until nobody has locked `image`: what a killed daemon has left in the kernel has ended.
pub(super) fn wait_free(image: &File) -> Result<()> {
    let began = Instant::now();
    while locked(image, QEMU)?.is_some() {
        interrupt::check()?;
        if began.elapsed() > PATIENCE {
            bail!("somebody has locked the image for {PATIENCE:?}");
        }
        thread::sleep(GLANCE);
    }
    Ok(())
}

/// Watches from a thread of its own; the moment comes through the channel.
pub(super) fn watch(image: &File, held: Held) -> Result<Receiver<Result<Instant>>> {
    let image = image.try_clone()?;
    let (tell, told) = channel();
    let look = move || {
        let began = Instant::now();
        while locked(&image, held.bytes())?.is_some() {
            if began.elapsed() > PATIENCE {
                bail!("the lock of a killed daemon was not free after {PATIENCE:?}");
            }
            thread::sleep(GLANCE);
        }
        Ok(Instant::now())
    };
    thread::Builder::new()
        .name("lock-watch".to_owned())
        // Nobody listens any more where the run was given up.
        .spawn(move || drop(tell.send(look())))?;
    Ok(told)
}

/// A lock of somebody else's in `bytes`, the first one.
fn locked(image: &File, bytes: Bytes) -> Result<Option<Bytes>> {
    // SAFETY: `flock` is plain numbers; all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = bytes.first;
    lock.l_len = bytes.count;
    // SAFETY: the call reads and writes one flock, which lives through it.
    let done = unsafe { libc::fcntl(image.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if done < 0 {
        return Err(std::io::Error::last_os_error()).context("F_OFD_GETLK");
    }
    let free = lock.l_type == libc::F_UNLCK as libc::c_short;
    Ok((!free).then_some(Bytes {
        first: lock.l_start,
        count: lock.l_len,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A file that goes with its test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let name = format!("berth-perf-lock-{name}-{}", std::process::id());
            Scratch(std::env::temp_dir().join(name))
        }

        fn open(&self) -> File {
            let mut open = File::options();
            open.read(true).write(true).create(true).truncate(false);
            open.open(&self.0).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn take(file: &File, byte: i64) {
        // SAFETY: as in `locked`.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_RDLCK as _;
        lock.l_whence = libc::SEEK_SET as _;
        lock.l_start = byte;
        lock.l_len = 1;
        // SAFETY: as in `locked`.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        assert_eq!(done, 0);
    }

    #[test]
    fn a_marker_is_known_and_its_end_is_seen_while_others_stay() {
        let scratch = Scratch::new("marker");
        let (us, daemon, alive, successor) = (
            scratch.open(),
            scratch.open(),
            scratch.open(),
            scratch.open(),
        );
        assert!(Held::look(&us).is_err(), "nobody has locked it");
        take(&daemon, 101);
        assert_eq!(Held::look(&us).unwrap(), Held::Shared(QEMU));
        let marker = MARKERS.first + 2 * 77;
        take(&alive, marker + 1);
        take(&daemon, marker);
        let held = Held::look(&us).unwrap();
        assert_eq!(
            held,
            Held::Own(Bytes {
                first: marker,
                count: 1
            })
        );
        let told = watch(&us, held).unwrap();
        take(&successor, 101);
        take(&successor, MARKERS.first + 2 * 99);
        drop(alive);
        assert!(told.try_recv().is_err(), "its I/O is not over");
        let before = Instant::now();
        drop(daemon);
        let free = told.recv_timeout(PATIENCE).unwrap().unwrap();
        assert!(free >= before);
    }
}
