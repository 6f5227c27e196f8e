//! What a daemon takes while nothing happens: CPU time and private memory, with a frontend connected
//! and four queues of 256 that have seen requests. All daemons idle at the same time, each on a file
//! of its own.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::backing::{Backing, Disk};
use crate::client;
use crate::daemon::Daemon;
use crate::subject::Subject;
use crate::sys::{self, SharedMemory};
use crate::target::virtio::{self, Session};

const QUEUES: u16 = 4;
const RING: u16 = 256;
const FILE_BYTES: u64 = 64 << 20;
/// What it may still do after its last request.
const SETTLE: Duration = Duration::from_secs(1);
/// How long the first requests may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is watched.
pub const WATCHED: Duration = Duration::from_secs(10);

/// Of one daemon.
#[derive(Clone, Debug)]
pub struct Idle {
    /// Whose.
    pub subject: String,
    /// CPU time in [`WATCHED`].
    pub cpu: Duration,
    /// Private memory without the guest's, KiB.
    pub private_kib: u64,
}

struct Watched {
    subject: String,
    daemon: Daemon,
    /// Keeps the frontend connected.
    _session: Session,
    _memory: SharedMemory,
}

/// Watches all of `subjects` that are daemons; those that fail say why.
pub fn watch(subjects: &[Subject], cpu: usize, directory: &Path) -> Result<Vec<Result<Idle>>> {
    let daemons = subjects
        .iter()
        .filter(|subject| subject.is_daemon() && subject.fits(Backing::File));
    let started: Vec<Result<Watched>> = daemons
        .enumerate()
        .map(|(n, subject)| {
            start(subject, cpu, &directory.join(format!("idle{n}")))
                .with_context(|| format!("{} (idle)", subject.name))
        })
        .collect();
    thread::sleep(SETTLE);
    let time = |watched: &Result<Watched>| {
        let pid = watched.as_ref().ok()?.daemon.pid();
        sys::process_cpu(pid).ok()
    };
    let before: Vec<_> = started.iter().map(time).collect();
    thread::sleep(WATCHED);
    let after: Vec<_> = started.iter().map(time).collect();
    let readings = before.into_iter().zip(after);
    let idle = started.into_iter().zip(readings).map(|(watched, times)| {
        let watched = watched?;
        let (Some(before), Some(after)) = times else {
            bail!(
                "{} died while idle: {}",
                watched.subject,
                watched.daemon.last_words()
            );
        };
        let maps = fs::read_to_string(format!("/proc/{}/smaps", watched.daemon.pid()))?;
        Ok(Idle {
            subject: watched.subject,
            cpu: after.saturating_sub(before),
            private_kib: private_kib(&maps),
        })
    });
    Ok(idle.collect())
}

fn start(subject: &Subject, cpu: usize, place: &Path) -> Result<Watched> {
    fs::create_dir(place)?;
    let path = place.join("disk.img");
    File::create(&path)?.set_len(FILE_BYTES)?;
    let disk = Disk {
        backing: Backing::File,
        path,
        size: FILE_BYTES,
    };
    let socket = place.join("disk.sock");
    let command = subject
        .command(&disk, &socket, QUEUES)
        .context("not a daemon")?;
    let daemon = Daemon::start(command, cpu, &socket, &place.join("daemon.log"))?;
    let memory = SharedMemory::new(1 << 20)?;
    let session = client::on_cpu(cpu, PATIENCE, || {
        let mut session = Session::connect(&socket, usize::from(QUEUES), RING)?;
        session.map(&memory)?;
        virtio::touch(&mut session, &memory)?;
        Ok(session)
    })?;
    Ok(Watched {
        subject: subject.name.clone(),
        daemon,
        _session: session,
        _memory: memory,
    })
}

/// Sum of Private_Clean and Private_Dirty over all mappings that are not the guest's.
fn private_kib(smaps: &str) -> u64 {
    let mut guest = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // A mapping's head: addresses, rights, offset, device, inode, and perhaps a name.
            guest = line.contains("/memfd:");
        } else if !guest && matches!(first, "Private_Clean:" | "Private_Dirty:") {
            sum += words
                .next()
                .and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_does_not_count() {
        let smaps = "\
55d0-55d1 r-xp 0000 fe:00 1234 /usr/bin/berth-blk
Private_Clean:         8 kB
Private_Dirty:         4 kB
Shared_Clean:        100 kB
7f00-7f01 rw-s 0000 00:01 77 /memfd:bench (deleted)
Private_Dirty:      1024 kB
7f02-7f03 rw-p 0000 00:00 0
Private_Dirty:        16 kB
";
        assert_eq!(private_kib(smaps), 28);
    }
}
