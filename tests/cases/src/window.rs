//! A guest with a DMA window: its disks and cards reach the window only, all else of it is private and can be merged.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::net as links;
use berth_tests_framework::process::Process;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

use crate::{disk, net, net_control};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "window",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "window.ram_below_and_from_4_gib",
            "window.guest_limits_its_devices",
            "window.kernel_and_initramfs_above",
            "window.backends_map_nothing_else",
            "window.rest_is_private_and_not_merged",
            "window.disk_data_round_trips",
            "window.net_transfers_each_way",
            "window.net_carries_frames_by_two_pairs",
            "window.under_memory_pressure",
            "window.report",
            "window.reboot",
            "window.hot_plug_has_a_shadow",
            "window.off",
        ],
        run: keeps_to_it,
    },
    Story {
        name: "window-6.1",
        tier: Tier::Guest,
        long: false,
        checks: &OLDER,
        run: older_guest,
    },
    Story {
        name: "window-usedac",
        tier: Tier::Guest,
        long: false,
        checks: &["window.usedac_is_caught"],
        run: usedac,
    },
];

const OLDER: [&str; 4] = [
    "window.6_1_limits_its_devices",
    "window.6_1_disk_data_round_trips",
    "window.6_1_net_transfers_each_way",
    "window.6_1_off",
];
const MIB: u64 = 1 << 20;
/// Size of the guest, and of the window that it gets.
const SIZE: u64 = 1 << 30;
const WINDOW: u64 = 128 * MIB;
const FOUR_GIB: u64 = 4 << 30;
const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 3, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 3, 2);
const MEMORY: &str = "1G,mergeable=on";

fn keeps_to_it(context: &Context) -> Result<()> {
    let (image, fixed) = (context.scratch("disk.img"), context.scratch("fixed.img"));
    image::sparse(&image, 256 * MIB)?;
    image::random(&fixed, 16 * MIB, 11)?;
    context.step("start the daemons");
    let queues = BlkSettings {
        queues: 2,
        ..Default::default()
    };
    let read_only = BlkSettings {
        read_only: true,
        ..Default::default()
    };
    let writable = Daemon::blk(context, "blk", &image, queues)?;
    let fixed_disk = Daemon::blk(context, "blk-fixed", &fixed, read_only)?;
    let pairs = ["--create", "--num-queues=2"].map(str::to_owned);
    let card = Daemon::net(context, "net", "tap0", &pairs)?;
    links::bring_up("tap0", HOST)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .memory(MEMORY)
        .disk(writable.socket(), ",num_queues=2")
        .disk(fixed_disk.socket(), ",readonly=on")
        .net(card.socket(), ",num_queues=4")
        .boot(context)?;

    context.check("window.ram_below_and_from_4_gib", || ram(&mut vm.console))?;
    context.check("window.guest_limits_its_devices", || limited(&mut vm))?;
    context.check("window.kernel_and_initramfs_above", || above(&mut vm))?;
    context.check("window.backends_map_nothing_else", || {
        for daemon in [&writable, &fixed_disk, &card] {
            maps_the_window(daemon.process())?;
        }
        Ok(())
    })?;
    context.check("window.rest_is_private_and_not_merged", || {
        private(&vm.process)
    })?;
    context.check("window.disk_data_round_trips", || {
        let sum = vm.sh("md5sum </dev/vdb")?;
        ensure!(sum.starts_with(&image::md5(&fixed)?), "of /dev/vdb: {sum}");
        disk::make_and_mount(&mut vm.console, "/dev/vda")?;
        disk::random_writes(&mut vm.console)
    })?;
    context.check("window.net_transfers_each_way", || {
        vmm::bring_up(&mut vm.console, "eth0", GUEST)?;
        net::transfer(context, &mut vm.console, [HOST, GUEST], 32 * MIB)
    })?;
    context.check("window.net_carries_frames_by_two_pairs", || {
        net_control::both_pairs(&mut vm, &card, HOST)
    })?;
    context.check("window.under_memory_pressure", || {
        pressure(context, &mut vm)
    })?;
    context.check("window.report", || report(&vm))?;
    context.check("window.reboot", || {
        vm.sh("umount /mnt")?;
        vm.reboot()?;
        maps_the_window(writable.process())?;
        vm.sh("mount -t ext4 /dev/vda /mnt")?;
        disk::verify(&mut vm.console)
    })?;
    context.check("window.hot_plug_has_a_shadow", || {
        crate::shadow::late_disk(context, &mut vm)
    })?;
    context.check("window.off", || {
        vm.sh("cd /; umount /mnt")?;
        vm.power_off()?;
        image::require_clean(&image)
    })
}

/// RAM is `[0, W)` and `[4 GiB, …)`.
fn ram(console: &mut Console) -> Result<()> {
    let ranges = crate::memory::ranges(console)?;
    let outside = |(first, last): &(u64, u64)| *last >= WINDOW && *first < FOUR_GIB;
    let end = ranges.last().map(|(_, last)| last + 1);
    ensure!(
        !ranges.iter().any(outside) && end == Some(FOUR_GIB + SIZE - WINDOW),
        "{ranges:x?}"
    );
    crate::memory::is_there(console, SIZE)
}

/// The kernel says that it limits what is below the ports, and bounces for them.
fn limited(vm: &mut Vm) -> Result<()> {
    let log = vm.sh("dmesg | grep -i 'DAC on VIA\\|software IO TLB: mapped'")?;
    ensure!(
        log.contains("disabling DAC on VIA PCI bridge") && log.contains("software IO TLB"),
        "{log}"
    );
    // virtio-blk asks the DMA layer how long a segment may be: 256 KiB where it has to bounce.
    let segment = vm.sh("cat /sys/block/vda/queue/max_segment_size")?;
    ensure!(segment.trim() == "262144", "max_segment_size {segment}");
    Ok(())
}

/// What the VMM loads is not in the window, where it could not be merged.
fn above(vm: &mut Vm) -> Result<()> {
    let iomem = vm.sh("grep 'Kernel code' /proc/iomem")?;
    let first = iomem.trim().split('-').next().unwrap_or_default();
    let code = u64::from_str_radix(first, 16).context(iomem.clone())?;
    ensure!(code >= FOUR_GIB, "kernel code at {code:#x}");
    let line = vm.sh("dmesg | grep 'RAMDISK: \\[mem'")?;
    let at = line.split("[mem 0x").nth(1).unwrap_or_default();
    let at = u64::from_str_radix(at.split('-').next().unwrap_or_default(), 16)?;
    ensure!(at >= FOUR_GIB, "initramfs: {line}");
    Ok(())
}

/// A process has the guest's window mapped, in one piece, and nothing else of the guest.
fn maps_the_window(process: &Process) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid()))?;
    let sizes: Vec<u64> = maps
        .lines()
        .filter(|line| line.contains("berth-guest-ram"))
        .map(|line| {
            let (first, last) = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'))
                .context("a range")?;
            Ok(u64::from_str_radix(last, 16)? - u64::from_str_radix(first, 16)?)
        })
        .collect::<Result<_>>()?;
    ensure!(
        sizes == [WINDOW],
        "{} maps {sizes:?} bytes of guest memory",
        process.name()
    );
    Ok(())
}

/// What is above the window is anonymous memory of the VMM that nobody may merge as long as nobody said so.
fn private(process: &Process) -> Result<()> {
    let above = crate::memory::mapping(process, SIZE - WINDOW)?;
    ensure!(
        !above.has("sh") && !above.has("mg") && above.has("hg"),
        "VmFlags: {}",
        above.flags()
    );
    Ok(())
}

/// Nearly all memory is taken while 32 processes read and write past the page cache: nobody fails, nothing is killed, and
/// what is on the disk stays.
fn pressure(context: &Context, vm: &mut Vm) -> Result<()> {
    context.step("fill memory and write under it");
    let script = "set -e; mkdir -p /tmp/fill; mount -t tmpfs -o size=100% fill /tmp/fill
        free=$(awk '/MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)
        dd if=/dev/zero of=/tmp/fill/zeros bs=1M count=$((free - 60)) 2>/dev/null
        for i in $(seq 8); do
            (dd if=/dev/vdb of=/dev/null bs=256k iflag=direct 2>/dev/null || echo failed) &
            (dd if=/dev/vdb of=/dev/null bs=4k skip=$((i * 256)) count=128 iflag=direct 2>/dev/null || echo failed) &
            (dd if=/dev/urandom of=/mnt/p$i bs=64k count=16 oflag=direct 2>/dev/null || echo failed) &
            (dd if=/dev/urandom of=/mnt/q$i bs=4k count=64 oflag=direct 2>/dev/null || echo failed) &
        done
        wait; umount /tmp/fill; rmdir /tmp/fill; rm /mnt/p* /mnt/q*
        dmesg | grep -i 'swiotlb buffer is full\\|out of memory\\|I/O error' || true
        grep '^oom_kill ' /proc/vmstat | grep -vx 'oom_kill 0' || true";
    let said = vm.console.sh_within(script, seconds(180))?;
    ensure!(said.trim().is_empty(), "{said}");
    disk::verify(&mut vm.console)
}

/// The API says how much of the window is in use, and how much can be merged.
fn report(vm: &Vm) -> Result<()> {
    let counters = vm.counters()?;
    let memory = &counters["memory"];
    let number = |name: &str| memory[name].as_u64().context(format!("{memory}"));
    ensure!(number("window_bytes")? == WINDOW, "{memory}");
    ensure!(number("mergeable_bytes")? == SIZE - WINDOW, "{memory}");
    let used = number("window_used_bytes")?;
    ensure!((MIB..=WINDOW).contains(&used), "{memory}");
    Ok(())
}

/// A guest that is told not to limit its devices puts rings where no backend can see them. Where only the window will do
/// it is told so, in a line, and nothing is written anywhere.
fn usedac(context: &Context) -> Result<()> {
    let image = context.scratch("disk.img");
    image::random(&image, 16 * MIB, 5)?;
    let sum = image::md5(&image)?;
    let daemon = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    let vm = VmBuilder::new(context, "vmm")
        .memory(MEMORY)
        .append("iommu=usedac")
        .disk(daemon.socket(), ",dma=window")
        .start(context)?;
    context.check("window.usedac_is_caught", || {
        let line = "does not keep to the DMA window";
        vm.process.wait_output(line, vmm::BOOT_LIMIT)?;
        let log = vm.process.output()?;
        let said = log.lines().find(|said| said.contains(line));
        match said {
            Some(said) if said.contains("mergeable=off") => {}
            said => bail!("{said:?}"),
        }
        ensure!(image::md5(&image)? == sum, "the image has changed");
        Ok(())
    })
}

/// Bookworm's own kernel, five minor versions older, keeps to the window as well.
fn older_guest(context: &Context) -> Result<()> {
    if let Ok(why) = fs::read_to_string(context.asset("older-kernel/absent")) {
        OLDER.iter().for_each(|check| context.skip(check, &why));
        return Ok(());
    }
    let image = context.scratch("disk.img");
    image::sparse(&image, 256 * MIB)?;
    context.step("start the daemons");
    let disk = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    links::make_tap("tap0")?;
    let card = Daemon::net(context, "net", "tap0", &[])?;
    links::bring_up("tap0", HOST)?;
    context.step("boot");
    let kernel = context.asset("older-kernel/vmlinuz");
    let mut vm = VmBuilder::new(context, "vmm")
        .kernel(kernel.display().to_string())
        .initramfs(context.asset("older-kernel/guest-initramfs.cpio"))
        .memory(MEMORY)
        .disk(disk.socket(), "")
        .net(card.socket(), "")
        .boot(context)?;
    context.check(OLDER[0], || {
        ensure!(vm.sh("uname -r")?.starts_with("6.1."));
        limited(&mut vm)?;
        maps_the_window(disk.process())
    })?;
    context.check(OLDER[1], || {
        disk::make_and_mount(&mut vm.console, "/dev/vda")?;
        disk::random_writes(&mut vm.console)
    })?;
    context.check(OLDER[2], || {
        vmm::bring_up(&mut vm.console, "eth0", GUEST)?;
        net::transfer(context, &mut vm.console, [HOST, GUEST], 8 * MIB)
    })?;
    context.check(OLDER[3], || {
        vm.sh("cd /; umount /mnt")?;
        vm.power_off()?;
        image::require_clean(&image)
    })
}
