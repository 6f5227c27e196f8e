//! How long a disk stands still when its daemon is killed: from `kill -9` to the next completed request.
//!
//! ```text
//!   kill -9 ──▶ process gone ──▶ successor started ──▶ it waits for the lock ──▶ connected ──▶ rings ──▶ request
//!      │                                                      │                                            │
//!      │◀──────────────── lock_free_ms ──────────────────────▶│◀───────────── after_lock_ms ──────────────▶│
//!      │◀──────────────────────────────────────── pause_ms ────────────────────────────────────────────────▶│
//! ```
//!
//! The driver is our own on the host (tests/framework's, one queue), the same for everybody: no guest takes part,
//! and no VMM. It dials again as soon as somebody listens, hands back what was in flight where the daemon tracks
//! that, and makes the rest of its requests again where not. The successor is started at once. A daemon that
//! gives up where the lock is taken (qemu-storage-daemon) is started when the lock is free.

pub(super) mod client;
mod lock;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use berth_tests_framework::process::Process;

use self::client::Client;
use self::lock::Held;
use super::{Better, Bound, Cell, Entry, Metric, Of, Sample, Scenario, Subject};
use crate::context::Context;
use crate::{daemon, interrupt};

/// This scenario.
pub const ENTRY: Entry = Entry {
    name: "crash",
    about: "from a disk daemon's kill -9 to the next completed request, under load",
    needs: &[],
    metrics: &[
        Metric {
            name: "pause_ms",
            unit: "ms",
            better: Better::Less,
            about: "from kill -9 to the next completed request",
        },
        Metric {
            name: "after_lock_ms",
            unit: "ms",
            better: Better::Less,
            about: "the part of it after the image's lock was free",
        },
        Metric {
            name: "lock_free_ms",
            unit: "ms",
            better: Better::Less,
            about: "from kill -9 until the kernel had ended the dead daemon's requests",
        },
    ],
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 10 } else { 45 }),
};

const IMAGE_BYTES: u64 = 64 << 20;
const BLOCKS: u64 = IMAGE_BYTES / 4096;
/// Requests before the kill, and after the first one that came back.
const BEFORE: u64 = 2000;
const AFTER: u64 = 200;
/// The goal, of `after_lock_ms`.
const AFTER_LOCK_MS: f64 = 50.0;
/// How long a killed daemon's lock may last.
const PATIENCE: Duration = Duration::from_secs(60);

fn cells() -> Vec<Cell> {
    let cell = |name, title| {
        Cell::new(name, title).rounds(9, 3).warm_up(1).goal(
            "after_lock_ms",
            Of::Itself,
            Bound::AtMost(AFTER_LOCK_MS),
        )
    };
    vec![
        cell("read-qd1", "one read of 4 KiB in flight"),
        cell("read-qd32", "32 reads of 4 KiB in flight").quick(),
        cell("write-qd32", "32 writes of 4 KiB in flight").quick(),
    ]
}

/// Depth, and whether it writes.
fn load(cell: &str) -> Result<(usize, bool)> {
    match cell {
        "read-qd1" => Ok((1, false)),
        "read-qd32" => Ok((32, false)),
        "write-qd32" => Ok((32, true)),
        _ => bail!("no such load: {cell}"),
    }
}

/// A daemon that can be killed.
struct Victim {
    subject: Subject,
    program: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Berth,
    Qsd,
}

impl Victim {
    /// Serves `image` past the page cache.
    fn command(&self, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(&self.program);
        let (image, socket) = (image.display(), socket.display());
        match self.kind {
            Kind::Berth => command.args([
                format!("--blk-file={image}"),
                format!("--socket-path={socket}"),
                "--cache=none".to_owned(),
                "--engine=io-uring".to_owned(),
            ]),
            Kind::Qsd => command.args([
                "--blockdev".to_owned(),
                format!(
                    "driver=file,node-name=disk,filename={image},cache.direct=on,aio=io_uring,locking=on"
                ),
                "--export".to_owned(),
                format!(
                    "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
                ),
            ]),
        };
        command
    }
}

struct Crash {
    victims: Vec<Victim>,
    folder: PathBuf,
    image: PathBuf,
    /// Daemons started so far: each has a socket of its own.
    lives: u32,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let folder = context.folder("crash")?;
    let image = folder.join("disk.img");
    fill(&image)?;
    let ours = context.ours("berth-blk")?.into_iter().map(|ours| Victim {
        subject: ours.subject,
        program: ours.program,
        kind: Kind::Berth,
    });
    let mut victims: Vec<Victim> = ours.collect();
    if let Some(program) = context.peer("qemu-storage-daemon") {
        victims.push(Victim {
            subject: Subject::peer("qemu-storage-daemon"),
            program,
            kind: Kind::Qsd,
        });
    }
    Ok(Box::new(Crash {
        victims,
        folder,
        image,
        lives: 0,
    }))
}

/// Blocks that are there: a hole is answered without the disk.
fn fill(image: &Path) -> Result<()> {
    let what = || format!("cannot write {}", image.display());
    let bytes = vec![0x5a; usize::try_from(IMAGE_BYTES)?];
    std::fs::write(image, bytes).with_context(what)?;
    File::open(image)?.sync_all().with_context(what)
}

impl Crash {
    fn start(&mut self, victim: usize) -> Result<(Process, PathBuf)> {
        self.lives += 1;
        let socket = self.folder.join(format!("{}.sock", self.lives));
        let log = self.folder.join(format!("{}.log", self.lives));
        let command = self.victims[victim].command(&self.image, &socket);
        let name = &self.victims[victim].subject.name;
        Ok((Process::spawn(name, command, &log)?, socket))
    }
}

impl Scenario for Crash {
    fn subjects(&self) -> Vec<Subject> {
        self.victims
            .iter()
            .map(|victim| victim.subject.clone())
            .collect()
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        interrupt::check()?;
        let (depth, writes) = load(&cell.name)?;
        let image = File::open(&self.image)?;
        let mut client = Client::new(depth, writes, BLOCKS)?;
        lock::wait_free(&image)?;
        let (mut first, socket) = self.start(subject)?;
        daemon::wait_listens(&first, &socket)?;
        client.connect(&socket)?;
        client.work(BEFORE)?;
        let held = Held::look(&image)?;
        let free = lock::watch(&image, held)?;

        let killed = Instant::now();
        first.kill();
        let mut lock_free = None;
        if matches!(held, Held::Shared(_)) {
            lock_free = Some(
                free.recv_timeout(PATIENCE)
                    .context("the lock is not free")??,
            );
        }
        let (second, socket) = self.start(subject)?;
        // What came back before the kill was no answer of the successor. It may have been all: the load goes on.
        client.collect()?;
        client.fill()?;
        daemon::wait_listens(&second, &socket)?;
        client.connect(&socket)?;
        client.wait_used()?;
        let answered = Instant::now();
        let lock_free = match lock_free {
            Some(moment) => moment,
            None => free
                .recv_timeout(PATIENCE)
                .context("the lock is not free")??,
        };
        client.collect()?;
        if client.is_tracked() {
            client.work(AFTER)?;
            client.drain()?;
        }
        drop(second);
        Ok(sample(killed, lock_free, answered))
    }
}

fn sample(killed: Instant, lock_free: Instant, answered: Instant) -> Sample {
    let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
    Sample::new()
        .figure("pause_ms", ms(killed, answered))
        .figure("lock_free_ms", ms(killed, lock_free))
        .figure("after_lock_ms", ms(lock_free, answered))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_a_load_and_the_parts_are_the_pause() {
        for cell in cells() {
            assert!(load(&cell.name).is_ok(), "{}", cell.name);
        }
        assert!(load("read-qd2").is_err());
        let killed = Instant::now();
        let at = |ms| killed + Duration::from_millis(ms);
        let sample = sample(killed, at(30), at(70));
        let [pause, lock, after] =
            ["pause_ms", "lock_free_ms", "after_lock_ms"].map(|name| sample.figures[name]);
        assert!((pause - 70.0).abs() < 1e-6 && (lock + after - pause).abs() < 1e-6);
    }

    #[test]
    fn a_daemon_that_ends_instead_of_listening_is_told_by_its_last_line() {
        let folder = std::env::temp_dir().join(format!("berth-perf-crash-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such image"]);
        let process = Process::spawn("daemon", command, &folder.join("log")).unwrap();
        let error = daemon::wait_listens(&process, &folder.join("sock")).unwrap_err();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(error.to_string().contains("no such image"), "{error:#}");
    }
}
