//! Boots real guests and writes their memory down: on a host whose KVM runs them, or in the lab.
//!
//! ```text
//!   a few guests at a time, in window mode: Debian on a disk of its own, packages on a second one
//!     boot ── dump "boot"
//!       read all of /usr, keep some data of its own in memory ── dump "settled"
//!         unpack the packages, read /usr again ── dump "upgraded"
//!           a program takes most of what is left ── dump "tight"
//! ```
//!
//! A guest is paused while it is read through `/proc/PID/mem`; what `pagemap` does not have in memory is noted as such.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::process::run as run_program;
use berth_tests_framework::story::{Context, Options};
use berth_tests_framework::vmm::{BOOT_LIMIT, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

use super::store::{ABSENT, Map, PAGE, Set, Writer};

/// States of a guest, in the order of time, and what brings it there.
const STATES: [(&str, &str); 4] = [
    ("boot", "true"),
    (
        "settled",
        "find /usr /etc /var -xdev -type f -exec cat {} + >/dev/null && \
         head -c 48M /dev/urandom >/dev/shm/data && \
         dmesg >/dev/shm/log && ls -lR /usr >/dev/shm/list && sort /dev/shm/list >/dev/shm/sorted",
    ),
    (
        "upgraded",
        "mkdir -p /var/lib/upgrade && tar -C /var/lib/upgrade -xf /dev/vdb && sync && \
         find /var/lib/upgrade -type f -exec cat {} + >/dev/null && \
         (systemctl daemon-reexec; find /usr/bin /usr/sbin -type f -exec cat {} + >/dev/null)",
    ),
    (
        "tight",
        "rm -f /dev/shm/sorted && head -c 96M /dev/urandom >/dev/shm/more",
    ),
];
/// Guests at a time.
const AT_A_TIME: usize = 3;
/// How long a guest may take for a step, nested in an emulated machine.
const LIMIT: std::time::Duration = seconds(600);

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "memory-dumps";

/// What is to be taken.
#[derive(Debug, Clone, clap::Args)]
pub struct TakeArgs {
    /// How many guests
    #[arg(long)]
    pub(super) guests: u64,
    /// MiB of each that can be merged; the window comes on top
    #[arg(long)]
    pub(super) mib: u64,
    /// Kernel, initramfs, disk
    #[arg(long)]
    pub(super) assets: PathBuf,
    /// The programs
    #[arg(long)]
    pub(super) bin: PathBuf,
    /// Where the set goes, and the logs
    #[arg(long)]
    pub(super) out: PathBuf,
}

/// MiB of the window.
const WINDOW_MIB: u64 = 128;

/// The subcommand: takes a set.
pub fn run(wanted: &TakeArgs) -> Result<()> {
    let options = Options::of_folders(&wanted.assets, &wanted.bin, &wanted.out.join("logs"), 1)?;
    let context = Context::alone(&options)?;
    let result = guests(&context, wanted);
    if result.is_err() {
        eprint!("{}", context.log_tails());
    }
    result
        .map(drop)
        .with_context(|| format!("failed at: {}", context.current_step()))
}

fn guests(context: &Context, wanted: &TakeArgs) -> Result<Set> {
    let packages = packages(context)?;
    let mut writer = Writer::new(&wanted.out)?;
    let names: Vec<String> = (0..wanted.guests).map(|n| format!("guest{n:02}")).collect();
    for names in names.chunks(AT_A_TIME) {
        context.step(format!("booting {}", names.join(", ")));
        eprintln!("{}", context.current_step());
        let mut guests = Vec::new();
        for name in names {
            guests.push(Guest::start(context, wanted, name, &packages)?);
        }
        for guest in &mut guests {
            guest.vm.console.wait_ready(BOOT_LIMIT)?;
        }
        for (state, script) in STATES {
            context.step(format!("{state}: {}", names.join(", ")));
            eprintln!("{}", context.current_step());
            let mut ids = Vec::new();
            for guest in &mut guests {
                ids.push(guest.vm.console.start(script)?);
            }
            for (guest, id) in guests.iter_mut().zip(ids) {
                let end = guest.vm.console.finish(id, script, LIMIT)?;
                ensure!(end.rc == 0, "{}: {}", guest.name, end.stdout.trim_end());
                guest.dump(&mut writer, wanted.mib, state)?;
            }
        }
    }
    let kernel = fs::read_to_string(wanted.assets.join("kernel-version")).unwrap_or_default();
    let from = format!(
        "{} guests of {} MiB beside a window of {WINDOW_MIB} MiB, kernel {}",
        wanted.guests,
        wanted.mib,
        kernel.trim()
    );
    writer.finish(from, wanted.mib << 20)
}

/// New files for a guest, as an upgrade brings them: a kernel, and programs of the next release.
fn packages(context: &Context) -> Result<PathBuf> {
    let path = context.scratch("packages.tar");
    let text = path.display().to_string();
    let assets = context.asset(".").display().to_string();
    let mut args = vec!["-C", &assets, "-cf", &text, "vmlinux", "vmlinuz"];
    if context.asset("trixie").exists() {
        args.push("trixie");
    }
    run_program("tar", &args)?;
    // A disk has whole sectors.
    let file = File::options().write(true).open(&path)?;
    let bytes = file.metadata()?.len();
    file.set_len(bytes.next_multiple_of(4096))?;
    Ok(path)
}

/// A guest and its daemons.
struct Guest {
    name: String,
    vm: Vm,
    _disk: Daemon,
    _packages: Daemon,
}

impl Guest {
    fn start(context: &Context, wanted: &TakeArgs, name: &str, packages: &Path) -> Result<Self> {
        let image = context.scratch(&format!("{name}.raw"));
        let source = context.asset("demo-disk.raw");
        let (from, to) = (source.display().to_string(), image.display().to_string());
        run_program("cp", &["--sparse=always", &from, &to])?;
        let disk = Daemon::blk(
            context,
            &format!("{name}-disk"),
            &image,
            BlkSettings::default(),
        )?;
        let read_only = BlkSettings {
            read_only: true,
            ..BlkSettings::default()
        };
        let packages = Daemon::blk(context, &format!("{name}-packages"), packages, read_only)?;
        let size = wanted.mib + WINDOW_MIB;
        let vm = VmBuilder::new(context, name)
            .memory(&format!("{size}M,mergeable=on,window={WINDOW_MIB}M"))
            .append("berth.root=/dev/vda")
            .disk(disk.socket(), "")
            .disk(packages.socket(), ",readonly=on")
            .start(context)?;
        Ok(Self {
            name: name.to_owned(),
            vm,
            _disk: disk,
            _packages: packages,
        })
    }

    fn dump(&self, writer: &mut Writer, mib: u64, state: &str) -> Result<()> {
        self.vm.api.put("vm.pause")?;
        let map = read_memory(self.vm.process.pid(), mib << 20, writer)
            .with_context(|| format!("memory of {}", self.name))?;
        writer.put(&self.name, state, &map)?;
        self.vm.api.put("vm.resume")
    }
}

/// Memory of a process that is one private mapping of `bytes`.
fn read_memory(pid: u32, bytes: u64, writer: &mut Writer) -> Result<Map> {
    let start = mapping(&fs::read_to_string(format!("/proc/{pid}/maps"))?, bytes)
        .with_context(|| format!("no private mapping of {bytes} bytes in process {pid}"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    // A huge page at a time.
    const PAGES: usize = 512;
    let (mut entries, mut contents) = (vec![0; 8 * PAGES], vec![0; PAGE * PAGES]);
    let mut map = Map::new();
    let mut at = start;
    while at < start + bytes {
        pagemap.read_exact_at(&mut entries, at / PAGE as u64 * 8)?;
        let is_there: Vec<bool> = entries.chunks_exact(8).map(is_present).collect();
        if is_there.iter().any(|there| *there) {
            memory.read_exact_at(&mut contents, at)?;
        }
        for (there, page) in is_there.iter().zip(contents.chunks_exact(PAGE)) {
            map.push(if *there { writer.page(page)? } else { ABSENT });
        }
        at += (PAGE * PAGES) as u64;
    }
    Ok(map)
}

/// Bits 63 and 62 of an entry of pagemap: in memory, or swapped.
fn is_present(entry: &[u8]) -> bool {
    entry[7] & 0xc0 != 0
}

/// Start of the only private anonymous mapping of that size.
fn mapping(maps: &str, bytes: u64) -> Option<u64> {
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let is_private = words.next()? == "rw-p" && words.nth(2)? == "0";
        (is_private && end - start == bytes).then_some(start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mapping_is_found_by_its_size() {
        let maps = "7f0000000000-7f0020000000 rw-s 00000000 00:01 77 /memfd:ram (deleted)\n\
                    7f0040000000-7f0060000000 rw-p 00000000 00:00 0 \n";
        assert_eq!(mapping(maps, 512 << 20), Some(0x7f00_4000_0000));
        assert_eq!(mapping(maps, 256 << 20), None);
    }
}
