//! What a daemon takes while nothing happens: CPU time and private memory, with a frontend connected
//! and four queues of 256 that have seen requests.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::backing::{Backing, Disk};
use super::subject::Subject;
use super::target::virtio::{self, Session};
use crate::client;
use crate::daemon::Daemon;
use crate::interrupt;
use crate::scenario::Sample;
use crate::sys::{self, SharedMemory};

const QUEUES: u16 = 4;
const RING: u16 = 256;
const FILE_BYTES: u64 = 64 << 20;
/// What it may still do after its last request.
const SETTLE: Duration = Duration::from_secs(1);
/// How long the first requests may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is watched.
const WATCHED: Duration = Duration::from_secs(5);

struct Watched {
    daemon: Daemon,
    /// Keeps the frontend connected.
    _session: Session,
    _memory: SharedMemory,
}

/// Watches one.
pub fn watch(subject: &Subject, cpu: usize, directory: &Path) -> Result<Sample> {
    let place = directory.join("idle");
    let watched = start(subject, cpu, &place)?;
    interrupt::sleep(SETTLE)?;
    let pid = watched.daemon.pid();
    let died = || format!("it died while idle: {}", watched.daemon.last_words());
    let before = sys::process_cpu(pid).with_context(died)?;
    interrupt::sleep(WATCHED)?;
    let used = sys::process_cpu(pid)
        .with_context(died)?
        .saturating_sub(before);
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(died)?;
    drop(watched);
    fs::remove_dir_all(&place)?;
    Ok(Sample::new()
        .figure("idle_cpu", used.as_secs_f64() * 1000.0)
        .figure("idle_private", private_kib(&maps) as f64))
}

fn start(subject: &Subject, cpu: usize, place: &Path) -> Result<Watched> {
    // One that failed may have left its own.
    fs::create_dir_all(place)?;
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
