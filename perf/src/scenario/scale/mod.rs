//! What happens when there are many guests on one host: how fast they start, what each costs, and what their disks
//! do together. Micro-guests on any /dev/kvm: a kernel that says that it is up, and halts.
//!
//! ```text
//!   start N VMMs, each with its disk's daemon ──▶ all are up ──▶ memory of all ──▶ end them
//!                        guests_per_s                  private_mib each
//!   start N disk daemons, a driver for each, one request in flight, for a second ──▶ iops together
//! ```
//!
//! N doubles twice from cell to cell until the host says stop: where memory does not suffice for the next N, or a
//! process or guest is refused, the cell says so and is left out. A model through what was measured (`model`)
//! stands beside the figures, marked as extrapolated.

mod kernel;
mod model;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use berth_tests_framework::process::Process;

use self::model::Line;
use super::crash::client::Client;
use super::guest::memory;
use super::{Better, Bound, Cell, Entry, Metric, Need, Of, Sample, Scenario, Subject};
use crate::context::Context;
use crate::{daemon, interrupt};

/// This scenario.
pub const ENTRY: Entry = Entry {
    name: "scale",
    about: "1 to N guests on one host: start rate, memory of each, I/O together, and a model",
    needs: &[Need::Kvm],
    metrics: &[
        Metric {
            name: "guests_per_s",
            unit: "/s",
            better: Better::More,
            about: "guests that are up, each with its disk's daemon, by the time since the first was started",
        },
        Metric {
            name: "private_mib",
            unit: "MiB",
            better: Better::Less,
            about: "private memory of all processes, guests' memory left out, for each guest",
        },
        Metric {
            name: "iops",
            unit: "/s",
            better: Better::More,
            about: "reads of 4 KiB of N disk daemons together, one in flight at each",
        },
    ],
    cells,
    prepare,
    expected: |quick| Duration::from_secs(if quick { 15 } else { 150 }),
};

/// Of guest memory, of which a micro-guest touches a few pages.
const GUEST_MIB: u64 = 32;
/// What a guest may need of the host, at the most, before it is known.
const EACH_MIB: u64 = 24;
/// Kept free.
const RESERVE_MIB: u64 = 1024;
const IMAGE_BYTES: usize = 1 << 20;
/// The goal: VMM and one disk's daemon, in the limit for all of a VM.
const LIMIT_MIB: f64 = 8.0;
const PATIENCE: Duration = Duration::from_secs(120);
const DRIVEN: Duration = Duration::from_secs(1);

fn cells() -> Vec<Cell> {
    let cell = |n: u32| {
        let title = format!("{n} guests of {GUEST_MIB} MiB and a disk");
        let goal = Bound::AtMost(LIMIT_MIB);
        Cell::new(format!("n{n}"), title).goal("private_mib", Of::Itself, goal)
    };
    vec![
        cell(1).rounds(5, 2).quick(),
        cell(4).rounds(5, 2).quick(),
        cell(16).rounds(3, 1).quick(),
        cell(64).rounds(2, 1),
        cell(256).rounds(1, 1),
    ]
}

fn guests(cell: &str) -> Result<u32> {
    let count = cell.strip_prefix('n').and_then(|count| count.parse().ok());
    count.with_context(|| format!("no such cell: {cell}"))
}

/// A build of ours.
struct Build {
    subject: Subject,
    vmm: PathBuf,
    blk: PathBuf,
}

struct Scale {
    builds: Vec<Build>,
    folder: PathBuf,
    /// Turns so far; each has a folder of its own.
    turns: u32,
    /// Guests and MiB of all their processes, by subject.
    points: BTreeMap<usize, Vec<(f64, f64)>>,
}

fn prepare(context: &mut Context) -> Result<Box<dyn Scenario>> {
    let folder = context.folder("scale")?;
    fs::write(folder.join("kernel"), kernel::elf())?;
    let (vmms, blks) = (context.ours("berth-vmm")?, context.ours("berth-blk")?);
    let builds = vmms.into_iter().zip(blks).map(|(vmm, blk)| Build {
        subject: vmm.subject,
        vmm: vmm.program,
        blk: blk.program,
    });
    Ok(Box::new(Scale {
        builds: builds.collect(),
        folder,
        turns: 0,
        points: BTreeMap::new(),
    }))
}

impl Scenario for Scale {
    fn subjects(&self) -> Vec<Subject> {
        self.builds
            .iter()
            .map(|build| build.subject.clone())
            .collect()
    }

    fn measure(&mut self, cell: &Cell, subject: usize, _round: u32) -> Result<Sample> {
        let count = guests(&cell.name)?;
        let available = available_mib()?;
        let needed = u64::from(count) * EACH_MIB + RESERVE_MIB;
        ensure!(
            available >= needed,
            "the host says stop: {count} guests may need {needed} MiB, and {available} are available"
        );
        self.turns += 1;
        let folder = self.folder.join(self.turns.to_string());
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        for n in 0..count {
            fs::write(image(&folder, n), vec![0x5a; IMAGE_BYTES])?;
        }
        let build = &self.builds[subject];
        let kernel = self.folder.join("kernel");
        let started = start_all(build, &kernel, &folder, count)?;
        let iops = drive_all(build, &folder, count)?;
        fs::remove_dir_all(&folder)?;
        let points = self.points.entry(subject).or_default();
        points.push((f64::from(count), started.all_mib));
        let sample = Sample::new()
            .figure("guests_per_s", started.rate)
            .figure("private_mib", started.private_mib / f64::from(count))
            .figure("iops", iops);
        Ok(match Line::through(points) {
            Some(line) if count > 4 => sample.note(line.words(available as f64)),
            _ => sample,
        })
    }
}

fn image(folder: &Path, n: u32) -> PathBuf {
    folder.join(format!("{n}.raw"))
}

/// What came of N guests.
struct Started {
    /// Up per second.
    rate: f64,
    /// Of all processes, guests' memory left out.
    private_mib: f64,
    /// With what guests have touched.
    all_mib: f64,
}

fn start_all(build: &Build, kernel: &Path, folder: &Path, count: u32) -> Result<Started> {
    let mut running = Vec::new();
    let began = Instant::now();
    for n in 0..count {
        interrupt::check()?;
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new(&build.vmm);
        command
            .arg("--kernel")
            .arg(kernel)
            .args(["--cpus", "boot=1", "--serial", "tty", "--memory"])
            .arg(format!("size={GUEST_MIB}M"))
            .arg("--disk")
            .arg(format!("path={}", image(folder, n).display()));
        let stdio = (Stdio::from(theirs.try_clone()?), Stdio::from(theirs));
        let log = folder.join(format!("{n}.log"));
        let process = Process::spawn_with_stdio("berth-vmm", command, stdio, &log)
            .with_context(|| format!("the host says stop at guest {}", n + 1))?;
        running.push((process, ours));
    }
    for (n, (process, line)) in running.iter_mut().enumerate() {
        wait_up(process, line).with_context(|| format!("guest {} of {count}", n + 1))?;
    }
    let rate = f64::from(count) / began.elapsed().as_secs_f64();
    let (mut private, mut guest) = (0, 0);
    for (process, _) in &running {
        for pid in memory::family(process.pid())? {
            let memory = memory::of_process(pid, GUEST_MIB << 20)?;
            private += memory.private;
            // The daemon maps the same.
            guest += if pid == process.pid() {
                memory.guest
            } else {
                0
            };
        }
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(Started {
        rate,
        private_mib: mib(private),
        all_mib: mib(private + guest),
    })
}

fn wait_up(process: &Process, line: &mut UnixStream) -> Result<()> {
    line.set_read_timeout(Some(PATIENCE))?;
    let mut said = [0; kernel::UP.len()];
    let read = line.read_exact(&mut said);
    if read.is_err() || said != kernel::UP.as_bytes() {
        let log = process.output().unwrap_or_default();
        let last = log.lines().last().unwrap_or("the VMM said nothing");
        bail!("it does not come up: {last}");
    }
    Ok(())
}

/// Requests a second of daemons on the same images, which nobody else has any more.
fn drive_all(build: &Build, folder: &Path, count: u32) -> Result<f64> {
    let mut daemons = Vec::new();
    for n in 0..count {
        let (image, socket) = (image(folder, n), folder.join(format!("{n}.sock")));
        let mut command = Command::new(&build.blk);
        command
            .arg(format!("--blk-file={}", image.display()))
            .arg(format!("--socket-path={}", socket.display()))
            .arg("--cache=none");
        let log = folder.join(format!("{n}.blk.log"));
        let process = Process::spawn("berth-blk", command, &log)
            .with_context(|| format!("the host says stop at daemon {}", n + 1))?;
        daemons.push((process, socket));
    }
    for (process, socket) in &daemons {
        daemon::wait_listens(process, socket)?;
    }
    let drive = |socket: &Path| -> Result<u64> {
        let mut client = Client::new(1, false, (IMAGE_BYTES / 4096) as u64)?;
        client.connect(socket)?;
        let (mut done, end) = (0, Instant::now() + DRIVEN);
        while Instant::now() < end {
            client.work(8)?;
            done += 8;
        }
        client.drain()?;
        Ok(done)
    };
    let began = Instant::now();
    let done = thread::scope(|scope| {
        let threads: Vec<_> = daemons
            .iter()
            .map(|(_, socket)| scope.spawn(move || drive(socket)))
            .collect();
        let joined = threads.into_iter().map(|thread| {
            let result = thread.join();
            result.unwrap_or_else(|_| Err(anyhow!("a driver panicked")))
        });
        joined.sum::<Result<u64>>()
    })?;
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

fn available_mib() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).context(path)?;
    available_in(&text).context("/proc/meminfo says nothing of MemAvailable")
}

fn available_in(meminfo: &str) -> Option<u64> {
    let rest = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = rest.split_whitespace().next()?.parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_numbers_of_guests_and_grow() {
        let counts: Vec<u32> = cells()
            .iter()
            .map(|cell| guests(&cell.name).unwrap())
            .collect();
        assert!(counts.is_sorted() && counts[0] == 1);
        assert!(guests("n").is_err() && guests("16").is_err());
    }

    #[test]
    fn what_the_host_has_left_is_read() {
        let text = "MemTotal: 9 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(available_in(text), Some(2048));
        assert_eq!(available_in("MemTotal: 9 kB\n"), None);
    }
}
