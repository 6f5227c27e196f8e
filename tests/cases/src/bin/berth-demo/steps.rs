//! The demonstration, step by step.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::net::{self, PageServer};
use berth_tests_framework::process::run as run_program;
use berth_tests_framework::story::Context;
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

use berth_tests_cases::counters::DataPath;

use crate::measure;
use crate::report::{Outcome, ProcessMemory};

/// The host's end of the tap, and the guest's.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 0, 1);
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 0, 2);
pub(crate) const MAC: &str = "52:54:00:be:47:00";
/// What the guest writes and syncs.
const PROOF: &str = "/root/proof";
const PROOF_MIB: u64 = 32;

/// Prints what happens next, with the seconds since the start.
struct Progress<'a> {
    context: &'a Context,
    start: Instant,
}

impl Progress<'_> {
    fn step(&self, what: &str) {
        println!("[{:5.1}s] {what}", self.start.elapsed().as_secs_f64());
        self.context.step(what);
    }
}

/// The daemons of one guest and its disk image.
pub(crate) struct Backends {
    pub(crate) image: PathBuf,
    pub(crate) disk: Daemon,
    pub(crate) card: Daemon,
}

impl Backends {
    /// Copies the demo disk to `out` and starts a daemon for it and one for a tap.
    pub(crate) fn start(context: &Context, out: &Path) -> Result<Self> {
        let image = out.join("disk.img");
        let source = context.asset("demo-disk.raw");
        let (from, to) = (source.display().to_string(), image.display().to_string());
        run_program("cp", &["--sparse=always", &from, &to])?;
        let settings = BlkSettings {
            queues: 2,
            ..Default::default()
        };
        let disk = Daemon::blk(context, "berth-blk", &image, settings)?;
        let card = Daemon::net(context, "berth-net", "berth0", &["--create".to_owned()])?;
        net::bring_up("berth0", HOST)?;
        Ok(Self { image, disk, card })
    }

    /// Debian on these backends.
    pub(crate) fn guest(&self, context: &Context) -> VmBuilder {
        VmBuilder::new(context, "berth-vmm")
            .cpus(2)
            .memory("512M")
            .append(&format!(
                "berth.root=/dev/vda berth.ip={GUEST}/24 berth.gateway={HOST}"
            ))
            .disk(self.disk.socket(), ",num_queues=2")
            .net(self.card.socket(), &format!(",mac={MAC}"))
    }
}

/// Runs the whole demonstration.
pub(crate) fn run(context: &Context, out: &Path, host: &str) -> Result<Outcome> {
    let progress = Progress {
        context,
        start: Instant::now(),
    };
    progress.step("copying the disk image; starting berth-blk and berth-net");
    let mut backends = Backends::start(context, out)?;

    progress
        .step("starting berth-vmm: Debian's cloud kernel, 2 vCPUs, root on the vhost-user disk");
    let start = Instant::now();
    let mut vm = backends.guest(context).boot(context)?;
    let boot_seconds = start.elapsed().as_secs_f64();
    progress.step(&format!("guest is up after {boot_seconds:.1} s"));
    let guest = vm.sh("uname -r; grep PRETTY_NAME /etc/os-release | cut -d'\"' -f2; nproc")?;
    let root = vm.sh("grep ' / ' /proc/mounts")?;
    ensure!(
        root.starts_with("/dev/vda / ext4 rw"),
        "root of the guest: {root:?}"
    );

    progress.step("fetching a page from the host in the guest, and from the guest on the host");
    pages(context, &mut vm)?;

    progress.step(&format!(
        "writing and syncing a file of {PROOF_MIB} MiB in the guest"
    ));
    let sum = write_proof(&mut vm)?;

    progress.step("reading 10000 blocks, counting exits");
    let data_path = DataPath::measure(&mut vm, &backends.disk)?;
    let memory = processes(&vm, &backends)?;
    let notifications = measure::notifications(&[&backends.disk, &backends.card])?;
    let counters = vm.counters()?;

    progress.step("powering off");
    vm.console.start("systemctl poweroff")?;
    vm.process.wait_success(seconds(90))?;
    drop(vm);
    backends.disk.kill();

    progress.step("proving from outside that the file system is clean and holds the file");
    prove(context, &backends.image, &sum)?;
    fs::rename(context.log("berth-vmm-serial"), out.join("serial.log"))?;
    progress.step("done");
    Ok(Outcome {
        host: host.to_owned(),
        guest: guest.lines().map(str::to_owned).collect(),
        boot_seconds,
        total_seconds: progress.start.elapsed().as_secs_f64(),
        memory,
        notifications,
        data_path,
        proof: sum,
        counters,
    })
}

/// A page each way through the tap.
fn pages(context: &Context, vm: &mut Vm) -> Result<()> {
    let page = context.scratch("page");
    fs::write(&page, "hello from the host\n")?;
    let server = PageServer::start(HOST, &page)?;
    let seen = vm.sh(&format!("busybox wget -q -O - {}", server.url()))?;
    ensure!(seen == "hello from the host\n", "the guest got {seen:?}");

    vm.sh("busybox httpd -p 80 -h /srv/www")?;
    let address = SocketAddr::from((GUEST, 80));
    let copy = context.scratch("from-guest");
    until("the guest's web server", seconds(30), || {
        Ok(net::fetch(address, "/index.html", &copy, seconds(10)).ok())
    })?;
    let (inside, outside) = (
        vm.sh("cat /srv/www/index.html")?,
        fs::read_to_string(&copy)?,
    );
    ensure!(
        outside == inside,
        "the host got {outside:?}, not {inside:?}"
    );
    Ok(())
}

/// Writes random bytes, syncs them, and returns their checksum as the guest sees it.
fn write_proof(vm: &mut Vm) -> Result<String> {
    let script = format!(
        "dd if=/dev/urandom of={PROOF} bs=1M count={PROOF_MIB} 2>/dev/null && sync && md5sum <{PROOF}"
    );
    let line = vm.console.sh_within(&script, seconds(120))?;
    Ok(line
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// The image is whole, was unmounted in order, and holds what the guest wrote.
fn prove(context: &Context, disk: &Path, sum: &str) -> Result<()> {
    image::require_clean(disk)?;
    let copy = context.scratch("proof");
    image::extract(disk, PROOF, &copy)?;
    let found = image::md5(&copy)?;
    ensure!(
        found == sum,
        "the guest wrote {sum}, the image holds {found}"
    );
    Ok(())
}

fn processes(vm: &Vm, backends: &Backends) -> Result<Vec<ProcessMemory>> {
    [
        &vm.process,
        backends.disk.process(),
        backends.card.process(),
    ]
    .into_iter()
    .map(ProcessMemory::of)
    .collect()
}
