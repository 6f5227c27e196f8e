//! QEMU on either side: its frontend drives our daemons, and its storage daemon serves our frontend.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Result, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::net::{self, FrameCounter};
use berth_tests_framework::qemu::{Devices, Qemu};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, VmBuilder};

use crate::disk;
use crate::kill_storm::guest::{add_program, finish_load, kill_under_load, start_load};
use crate::net::{frames_over_mtu, killed_in_transfers, ping, transfer};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "qemu",
        tier: Tier::Client,
        long: false,
        checks: &[
            "qemu.boots_on_both_daemons",
            "qemu.disk_mkfs_and_mount",
            "qemu.disk_random_writes",
            "qemu.disk_discard_shrinks_file",
            "qemu.disk_grows_under_the_guest",
            "qemu.disk_read_only_refused",
            "qemu.disk_killed_3_times_under_load",
            "qemu.net_mac_and_ping",
            "qemu.net_transfer_100mb_each_way",
            "qemu.net_tso_both_ways",
            "qemu.net_killed_3_times_in_transfers",
            "qemu.power_off",
            "qemu.disk_clean_from_outside",
            "qemu.second_guest_is_served",
        ],
        run: qemu_guest,
    },
    Story {
        name: "qemu-storage-daemon",
        tier: Tier::Guest,
        long: false,
        checks: &["interop.root_on_qemu_storage_daemon"],
        run: root_on_qemu_storage_daemon,
    },
];

const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 3, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 3, 2);
const MAC: &str = "52:54:00:be:47:03";

fn qemu_guest(context: &Context) -> Result<()> {
    let (image, fixed) = (context.scratch("disk.img"), context.scratch("fixed.img"));
    image::sparse(&image, 512 << 20)?;
    let sum = fixed_image(context, &fixed)?;

    context.step("start the daemons");
    let settings = BlkSettings {
        queues: 2,
        ..Default::default()
    };
    let mut writable = Daemon::blk(context, "blk-writable", &image, settings)?;
    let settings = BlkSettings {
        read_only: true,
        ..Default::default()
    };
    let read_only = Daemon::blk(context, "blk-read-only", &fixed, settings)?;
    net::make_tap("tap0")?;
    let mut card = Daemon::net(context, "net", "tap0", &[])?;
    net::bring_up("tap0", HOST)?;
    let devices = Devices::default()
        .disk("writable", writable.socket(), 2)
        .disk("fixed", read_only.socket(), 1)
        .net("card", card.socket(), MAC);

    context.step("boot");
    let mut guest = Qemu::boot(context, "qemu", &devices)?;
    context.check("qemu.boots_on_both_daemons", || {
        guest
            .console
            .sh("test -b /dev/vda && test -b /dev/vdb && test -d /sys/class/net/eth0")?;
        Ok(())
    })?;
    let console = &mut guest.console;
    use_disks(context, console, &mut writable, &image, &sum)?;
    context.check("qemu.net_mac_and_ping", || {
        let seen = console.sh("cat /sys/class/net/eth0/address")?;
        ensure!(seen.trim() == MAC, "address in the guest: {seen:?}");
        vmm::bring_up(console, "eth0", GUEST)?;
        ping(console, HOST)
    })?;
    let frames = FrameCounter::start("tap0")?;
    context.check("qemu.net_transfer_100mb_each_way", || {
        transfer(context, console, [HOST, GUEST], 100 << 20)
    })?;
    context.check("qemu.net_tso_both_ways", || frames_over_mtu(frames))?;
    context.check("qemu.net_killed_3_times_in_transfers", || {
        killed_in_transfers(context, console, HOST, &mut card, 3)
    })?;
    context.check("qemu.power_off", || {
        guest.console.sh("umount /mnt")?;
        guest.power_off()
    })?;
    context.check("qemu.disk_clean_from_outside", || {
        image::require_clean(&image)
    })?;
    context.check("qemu.second_guest_is_served", || {
        second_guest(context, &devices)
    })
}

/// The daemons serve the next guest too, which finds what the first has written.
fn second_guest(context: &Context, devices: &Devices) -> Result<()> {
    let mut second = Qemu::boot(context, "qemu-second", devices)?;
    second.console.sh("mount -t ext4 /dev/vda /mnt")?;
    disk::verify(&mut second.console)?;
    vmm::bring_up(&mut second.console, "eth0", GUEST)?;
    ping(&mut second.console, HOST)?;
    second.console.sh("umount /mnt")?;
    second.power_off()
}

/// A writable disk and a read-only one whose file has this checksum.
fn use_disks(
    context: &Context,
    console: &mut Console,
    writable: &mut Daemon,
    image: &Path,
    sum: &str,
) -> Result<()> {
    context.check("qemu.disk_mkfs_and_mount", || {
        disk::make_and_mount(console, "/dev/vda")
    })?;
    context.check("qemu.disk_random_writes", || disk::random_writes(console))?;
    context.check("qemu.disk_discard_shrinks_file", || {
        disk::discard(console, image)
    })?;
    context.check("qemu.disk_grows_under_the_guest", || {
        disk::grows(console, writable, image)
    })?;
    context.check("qemu.disk_read_only_refused", || {
        disk::refuses_writes(console, "/dev/vdb", sum)
    })?;
    context.check("qemu.disk_killed_3_times_under_load", || {
        killed_under_load(console, writable)
    })
}

/// An image of a file whose checksum is returned, and of the program that makes load.
fn fixed_image(context: &Context, path: &Path) -> Result<String> {
    let contents = context.scratch("fixed");
    fs::create_dir(&contents)?;
    image::random(&contents.join("data"), 1 << 20, 9)?;
    add_program(context, &contents)?;
    image::ext4(path, 64 << 20, &contents)?;
    image::md5(&contents.join("data"))
}

/// QEMU dials again and hands the inflight region back; the guest notices nothing.
fn killed_under_load(console: &mut Console, daemon: &mut Daemon) -> Result<()> {
    console.sh("mkdir -p /programs && mount -t ext4 -o ro /dev/vdb /programs")?;
    start_load(console, "/programs", "/mnt")?;
    kill_under_load(console, daemon, 3)?;
    finish_load(console)?;
    console.sh("umount /programs")?;
    disk::verify(console)
}

fn root_on_qemu_storage_daemon(context: &Context) -> Result<()> {
    let image = context.scratch("root.img");
    disk::root_image(context, &image)?;
    let mut daemon = Daemon::qemu_storage(context, "qemu-storage-daemon", &image)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .append("berth.root=/dev/vda")
        .disk(daemon.socket(), "")
        .boot(context)?;
    context.check("interop.root_on_qemu_storage_daemon", || {
        disk::lives_on_its_disk(&mut vm, &image, context)
    })?;
    daemon.kill();
    Ok(())
}
