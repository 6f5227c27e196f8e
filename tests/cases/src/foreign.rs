//! Daemons of other people's code that come to the VMM's socket (DPDK's testpmd, passt), and a disk built the usual
//! way, on the crate `vhost-user-backend`: all of them under one guest, killed, and back.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::image;
use berth_tests_framework::net::PageServer;
use berth_tests_framework::process::Process;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

use crate::any_device::{self, PASST};
use crate::net::ping;
use crate::{disk, hotplug, interop_dpdk};

/// Stories of this file.
pub(crate) const STORIES: &[Story] = &[Story {
    name: "foreign",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "dial_in.testpmd_answers_the_guest",
        "dial_in.testpmd_killed_and_back",
        "dial_in.passt_on_a_connection",
        "dial_in.passt_killed_and_back",
        "generic.stock_disk_holds_what_was_written",
        "generic.stock_disk_killed_3_times_under_load",
        "generic.stock_disk_clean_from_outside",
    ],
    run: foreign,
}];

/// testpmd answers for every address; this is the one that the guest asks for.
const ECHO: Ipv4Addr = Ipv4Addr::new(10, 61, 6, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 6, 2);
const DISK_BYTES: u64 = 64 << 20;

fn foreign(context: &Context) -> Result<()> {
    let image = context.scratch("stock.img");
    image::sparse(&image, DISK_BYTES)?;
    context.step("start the daemons");
    let mut stock = Daemon::other(
        context,
        "stock",
        context.bin("berth-stock-disk"),
        |socket| {
            let place = |flag: &str, path: &Path| format!("{flag}={}", path.display());
            vec![place("--socket", socket), place("--image", &image)]
        },
    )?;
    let absent = fs::read_to_string(context.asset("trixie/absent")).ok();
    let mut testpmd = Caller::new(context, "testpmd", testpmd);
    let mut passt = Caller::new(context, "passt", passt);
    context.step("boot");
    let generic = stock.socket().display();
    let mut builder = VmBuilder::new(context, "vmm")
        .cpus(2)
        .device(
            "--generic-vhost-user",
            format!("device_type=block,socket={generic},queue_sizes=[128]"),
        )
        .net(&testpmd.socket, ",vhost_mode=server");
    if absent.is_none() {
        builder = builder.net(&passt.socket, ",vhost_mode=server");
    }
    // It listens and waits: the guest starts when they have come.
    let mut vm = builder.start(context)?;
    testpmd.come(&vm)?;
    if absent.is_none() {
        passt.come(&vm)?;
    }
    vm.console.wait_ready(vmm::BOOT_LIMIT)?;

    context.check("dial_in.testpmd_answers_the_guest", || {
        vmm::bring_up(&mut vm.console, "eth0", GUEST)?;
        answers(&mut vm)
    })?;
    context.check("dial_in.testpmd_killed_and_back", || {
        testpmd.killed_and_back(&mut vm, "_net0")?;
        answers(&mut vm)
    })?;
    if let Some(why) = absent {
        context.skip("dial_in.passt_on_a_connection", &why);
        context.skip("dial_in.passt_killed_and_back", &why);
    } else {
        context.check("dial_in.passt_on_a_connection", || {
            any_device::address_by_dhcp(&mut vm, "eth1")?;
            fetches(context, &mut vm)
        })?;
        context.check("dial_in.passt_killed_and_back", || {
            passt.killed_and_back(&mut vm, "_net1")?;
            fetches(context, &mut vm)
        })?;
    }
    stock_disk(context, &mut vm, &mut stock, &image)
}

/// A daemon that dials: the VMM has its socket.
struct Caller<'a> {
    context: &'a Context,
    name: &'static str,
    socket: PathBuf,
    start: fn(&Context, &str, &Path) -> Result<Process>,
    process: Option<Process>,
}

impl<'a> Caller<'a> {
    fn new(
        context: &'a Context,
        name: &'static str,
        start: fn(&Context, &str, &Path) -> Result<Process>,
    ) -> Self {
        Self {
            context,
            name,
            socket: context.scratch(&format!("{name}.sock")),
            start,
            process: None,
        }
    }

    /// Once the VMM listens.
    fn come(&mut self, vm: &Vm) -> Result<()> {
        vm.process.wait_path(&self.socket, seconds(30))?;
        self.process = Some((self.start)(self.context, self.name, &self.socket)?);
        Ok(())
    }

    /// Killed as by `kill -9`; the VMM notices, and takes the next one that comes.
    fn killed_and_back(&mut self, vm: &mut Vm, id: &str) -> Result<()> {
        let mut process = self.process.take().context("it has come")?;
        ensure!(process.is_running(), "{} ended by itself", self.name);
        process.kill();
        any_device::connected(vm, id, 0)?;
        self.come(vm)?;
        any_device::connected(vm, id, 1)
    }
}

/// DPDK's vhost library, as a client; it answers ARP and pings.
fn testpmd(context: &Context, name: &str, socket: &Path) -> Result<Process> {
    let mut command = interop_dpdk::command(context);
    let device = format!(
        "--vdev=net_vhost0,iface={},client=1,queues=1",
        socket.display()
    );
    command
        .args([&device, "--"])
        .args(interop_dpdk::WORK)
        .arg("--forward-mode=icmpecho");
    Process::spawn(name, command, &context.log(name))
}

/// passt dials nobody, but takes a connection that somebody else has made.
fn passt(context: &Context, name: &str, socket: &Path) -> Result<Process> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"]);
    command.arg(context.asset("trixie/bin/passt")).args([
        "-f",
        "-4",
        "--vhost-user",
        "--runas",
        "0",
        "--fd",
        "3",
    ]);
    let stdin = Stdio::from(OwnedFd::from(stream));
    Process::spawn_with_stdin(name, command, stdin, &context.log(name))
}

/// The guest finds it by ARP, anew, and is answered.
fn answers(vm: &mut Vm) -> Result<()> {
    vm.sh("ip neigh flush dev eth0")?;
    // What came before the link was up is lost.
    until("testpmd's answer to a ping", seconds(60), || {
        Ok(ping(&mut vm.console, ECHO).is_ok().then_some(()))
    })
}

fn fetches(context: &Context, vm: &mut Vm) -> Result<()> {
    let page = context.scratch("page");
    image::random(&page, 1 << 20, 33)?;
    let server = PageServer::start(Ipv4Addr::LOCALHOST, &page)?;
    let url = server.url().replace("127.0.0.1", &PASST.to_string());
    vm.console
        .sh_within(&format!("wget -q -O /tmp/page {url}"), seconds(90))?;
    any_device::same(vm, "/tmp/page", &page)
}

/// It has no region of requests in flight: what it took and did not finish, its successor gets again.
fn stock_disk(context: &Context, vm: &mut Vm, stock: &mut Daemon, image: &Path) -> Result<()> {
    context.check("generic.stock_disk_holds_what_was_written", || {
        let size = vm.sh("cat /sys/block/vda/size")?;
        let sectors = DISK_BYTES / 512;
        ensure!(size.trim() == sectors.to_string(), "sectors: {size:?}");
        vm.sh("dd if=/dev/urandom of=/tmp/all bs=1M count=8 2>/dev/null
             dd if=/tmp/all of=/dev/vda bs=1M seek=56 conv=fsync 2>/dev/null")?;
        let end = context.scratch("end");
        fs::write(&end, &fs::read(image)?[56 << 20..])?;
        any_device::same(vm, "/tmp/all", &end)
    })?;
    context.check("generic.stock_disk_killed_3_times_under_load", || {
        hotplug::load(&mut vm.console)?;
        for _ in 0..3 {
            stock.kill();
            any_device::connected(vm, "_generic_vhost_user0", 0)?;
            stock.start_again()?;
            any_device::connected(vm, "_generic_vhost_user0", 1)?;
            vm.sh("rm -f /tmp/load.seen; grep -c same /tmp/load >/tmp/load.seen
                 until [ $(grep -c same /tmp/load) -gt $(cat /tmp/load.seen) ]; do usleep 20000; done")?;
        }
        hotplug::calm(&mut vm.console)
    })?;
    context.check("generic.stock_disk_clean_from_outside", || {
        disk::make_and_mount(&mut vm.console, "/dev/vda")?;
        disk::random_writes(&mut vm.console)?;
        disk::verify(&mut vm.console)?;
        vm.sh("umount /mnt")?;
        vm.power_off()?;
        image::require_clean(image)
    })
}
