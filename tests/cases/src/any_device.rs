//! Daemons that are neither ours nor QEMU's: virtiofsd as a shared folder and as a device of any type, passt
//! as the network.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::image;
use berth_tests_framework::net::PageServer;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

/// Stories of this file.
pub(crate) const STORIES: &[Story] = &[Story {
    name: "any-device",
    tier: Tier::Guest,
    long: false,
    checks: CHECKS,
    run: any_device,
}];

const CHECKS: &[&str] = &[
    "fs.mount_and_read",
    "fs.write_and_read_outside",
    "fs.unmount_and_mount_again",
    "fs.killed_under_a_mount",
    "generic.fs_by_its_type",
    "passt.address_by_dhcp",
    "passt.fetches_a_file",
    "any_device.power_off",
];

/// Where a passt without an interface to imitate puts itself; to its guest it is the host's loopback.
pub(crate) const PASST: Ipv4Addr = Ipv4Addr::new(169, 254, 2, 2);

/// Takes what the server offers.
const DHCP_SCRIPT: &str = "#!/bin/sh
[ \"$1\" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router dev $interface
";

fn any_device(context: &Context) -> Result<()> {
    if let Ok(why) = fs::read_to_string(context.asset("trixie/absent")) {
        CHECKS.iter().for_each(|check| context.skip(check, &why));
        return Ok(());
    }
    let (shared, other) = (context.scratch("shared"), context.scratch("other"));
    for folder in [&shared, &other] {
        fs::create_dir(folder)?;
        image::random(&folder.join("from-outside"), 4 << 20, 31)?;
    }
    context.step("start the daemons");
    let mut fs = virtiofsd(context, "virtiofsd", &shared, &[])?;
    let generic = virtiofsd(context, "virtiofsd-other", &other, &["--tag=other"])?;
    let passt = passt(context)?;
    context.step("boot");
    let socket = |daemon: &Daemon| daemon.socket().display().to_string();
    let mut vm = VmBuilder::new(context, "vmm")
        .device("--fs", format!("tag=home,socket={}", socket(&fs)))
        .device(
            "--generic-vhost-user",
            format!(
                "device_type=fs,socket={},queue_sizes=[128,128]",
                socket(&generic)
            ),
        )
        .net(passt.socket(), "")
        .boot(context)?;

    shared_folder(context, &mut vm, &shared)?;
    killed_under_a_mount(context, &mut vm, &mut fs, &shared)?;
    context.check("generic.fs_by_its_type", || {
        vm.sh("mkdir -p /other && mount -t virtiofs other /other")?;
        same(&mut vm, "/other/from-outside", &other.join("from-outside"))?;
        vm.sh("umount /other").map(drop)
    })?;
    network(context, &mut vm)?;
    context.check("any_device.power_off", || vm.power_off())
}

fn virtiofsd(context: &Context, name: &str, folder: &Path, more: &[&str]) -> Result<Daemon> {
    let program = context.asset("trixie/bin/virtiofsd");
    Daemon::other(context, name, program, |socket| {
        let mut args = vec![
            format!("--socket-path={}", socket.display()),
            format!("--shared-dir={}", folder.display()),
        ];
        args.extend(more.iter().map(|&flag| flag.to_owned()));
        args
    })
}

fn passt(context: &Context) -> Result<Daemon> {
    let program = context.asset("trixie/bin/passt");
    Daemon::other(context, "passt", program, |socket| {
        let socket = socket.display().to_string();
        let flags = ["-f", "-4", "--vhost-user", "--runas", "0", "-s", &socket];
        flags.map(str::to_owned).to_vec()
    })
}

fn shared_folder(context: &Context, vm: &mut Vm, shared: &Path) -> Result<()> {
    context.check("fs.mount_and_read", || {
        vm.sh("mkdir -p /home && mount -t virtiofs home /home")?;
        same(vm, "/home/from-outside", &shared.join("from-outside"))
    })?;
    context.check("fs.write_and_read_outside", || {
        vm.sh("mkdir /home/folder
             dd if=/dev/urandom of=/home/folder/from-guest bs=64k count=64 2>/dev/null
             mv /home/folder/from-guest /home/from-guest && rmdir /home/folder && sync")?;
        same(vm, "/home/from-guest", &shared.join("from-guest"))?;
        ensure!(!shared.join("folder").exists(), "the folder is still there");
        Ok(())
    })?;
    context.check("fs.unmount_and_mount_again", || {
        vm.sh("umount /home && mount -t virtiofs home /home")?;
        same(vm, "/home/from-guest", &shared.join("from-guest"))?;
        vm.sh("umount /home").map(drop)
    })
}

/// virtiofsd knows nothing of what its predecessor had open, nor that the guest has mounted it: the VMM gives it
/// the rings again, the guest's requests are answered, be it with errors, and after a new mount all is well.
fn killed_under_a_mount(
    context: &Context,
    vm: &mut Vm,
    fs: &mut Daemon,
    shared: &Path,
) -> Result<()> {
    context.check("fs.killed_under_a_mount", || {
        vm.sh("mount -t virtiofs home /home && ls /home >/dev/null")?;
        fs.kill();
        connected(vm, "_fs0", 0)?;
        // Nobody serves it: this one waits.
        vm.sh("(stat /home/from-guest >/tmp/stat 2>&1; echo done >>/tmp/stat) >/dev/null 2>&1 &")?;
        fs.start_again()?;
        connected(vm, "_fs0", 1)?;
        until("an answer to what waited", seconds(60), || {
            let text = vm.sh("cat /tmp/stat 2>/dev/null; true")?;
            Ok(text.contains("done").then_some(()))
        })?;
        vm.sh("umount /home && mount -t virtiofs home /home")?;
        same(vm, "/home/from-outside", &shared.join("from-outside"))?;
        vm.sh("echo again >/home/again && sync")?;
        ensure!(shared.join("again").exists(), "nothing was written");
        vm.sh("umount /home").map(drop)
    })
}

/// Waits until the VMM says that a device's daemon serves it (1), or does not (0).
pub(crate) fn connected(vm: &Vm, id: &str, whether: u64) -> Result<()> {
    let what = format!("{id} to say backend_connected {whether}");
    until(&what, seconds(60), || {
        let counters = vm.counters()?;
        let now = counters[id]["backend_connected"].as_u64();
        Ok((now == Some(whether)).then_some(()))
    })
}

/// The same bytes here and in the guest.
pub(crate) fn same(vm: &mut Vm, there: &str, here: &Path) -> Result<()> {
    let sum = image::md5(here)?;
    let seen = vm.sh(&format!("md5sum <{there}"))?;
    ensure!(seen.starts_with(&sum), "{there}: {seen}, not {sum}");
    Ok(())
}

fn network(context: &Context, vm: &mut Vm) -> Result<()> {
    context.check("passt.address_by_dhcp", || address_by_dhcp(vm, "eth0"))?;
    context.check("passt.fetches_a_file", || {
        let page = context.scratch("page");
        image::random(&page, 8 << 20, 32)?;
        let server = PageServer::start(Ipv4Addr::LOCALHOST, &page)?;
        let url = server.url();
        let url = url.replace("127.0.0.1", &PASST.to_string());
        vm.sh(&format!("wget -q -O /tmp/page {url}"))?;
        same(vm, "/tmp/page", &page)
    })
}

/// The guest takes the address that passt offers.
pub(crate) fn address_by_dhcp(vm: &mut Vm, interface: &str) -> Result<()> {
    vm.sh(&format!(
        "cat >/tmp/dhcp <<'END'\n{DHCP_SCRIPT}END
         chmod 755 /tmp/dhcp && ip link set {interface} up &&
         udhcpc -i {interface} -n -q -t 20 -T 1 -s /tmp/dhcp"
    ))?;
    let addresses = vm.sh(&format!("ip -4 addr show dev {interface}"))?;
    ensure!(addresses.contains("inet 169.254.2.1/"), "{addresses}");
    Ok(())
}
