//! Disks behind berth-blk: two of them, writing, reading back after a reboot, discard, read-only, and a
//! root file system.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::process::{Signal, run};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

use crate::power;

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "disk",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "disk.two",
            "disk.serial_id",
            "disk.mkfs_and_mount",
            "disk.random_writes",
            "disk.read_only_refused",
            "disk.discard_shrinks_file",
            "disk.grows_under_the_guest",
            "power.reboot",
            "disk.checksums_after_reboot",
            "backend.disk_restarted_while_idle",
            "power.button",
            "disk.clean_from_outside",
        ],
        run: two_disks,
    },
    Story {
        name: "root",
        tier: Tier::Guest,
        long: false,
        checks: &["disk.root_on_berth_blk"],
        run: root_on_berth_blk,
    },
];

/// Sectors of the first disk: 512 MiB.
const SECTORS: u64 = 1 << 20;

fn two_disks(context: &Context) -> Result<()> {
    let (image, fixed) = (context.scratch("disk.img"), context.scratch("fixed.img"));
    image::sparse(&image, SECTORS * 512)?;
    let contents = context.scratch("fixed");
    fs::create_dir(&contents)?;
    image::random(&contents.join("data"), 1 << 20, 7)?;
    let sum = image::md5(&contents.join("data"))?;
    image::ext4(&fixed, 32 << 20, &contents)?;

    context.step("start the daemons");
    let settings = BlkSettings {
        queues: 2,
        serial_id: Some("berth-one"),
        ..Default::default()
    };
    let mut writable = Daemon::blk(context, "blk-writable", &image, settings)?;
    let settings = BlkSettings {
        read_only: true,
        ..Default::default()
    };
    let read_only = Daemon::blk(context, "blk-read-only", &fixed, settings)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .disk(writable.socket(), ",num_queues=2")
        .disk(read_only.socket(), ",readonly=on")
        .boot(context)?;

    context.check("disk.two", || {
        let sizes = vm.sh("cat /sys/block/vda/size /sys/block/vdb/size")?;
        let expected = format!("{SECTORS}\n{}\n", (32 << 20) / 512);
        ensure!(
            sizes == expected,
            "sectors in the guest: {sizes:?}, not {expected:?}"
        );
        Ok(())
    })?;
    context.check("disk.serial_id", || {
        let id = vm.sh("cat /sys/block/vda/serial")?;
        ensure!(id.trim() == "berth-one", "serial in the guest: {id:?}");
        Ok(())
    })?;
    context.check("disk.mkfs_and_mount", || {
        make_and_mount(&mut vm.console, "/dev/vda")
    })?;
    context.check("disk.random_writes", || random_writes(&mut vm.console))?;
    context.check("disk.read_only_refused", || {
        refuses_writes(&mut vm.console, "/dev/vdb", &sum)
    })?;
    context.check("disk.discard_shrinks_file", || {
        discard(&mut vm.console, &image)
    })?;
    context.check("disk.grows_under_the_guest", || {
        grows(&mut vm.console, &writable, &image)
    })?;
    context.check("power.reboot", || power::reboots(&mut vm))?;
    context.check("disk.checksums_after_reboot", || {
        vm.sh("mount -t ext4 -o discard /dev/vda /mnt")?;
        verify(&mut vm.console)
    })?;
    context.check("backend.disk_restarted_while_idle", || {
        restart(&mut vm, &mut writable)
    })?;
    context.check("power.button", || power::button(&mut vm))?;
    context.check("disk.clean_from_outside", || image::require_clean(&image))
}

/// Makes a file system on a disk of the guest and mounts it at /mnt.
pub(crate) fn make_and_mount(console: &mut Console, disk: &str) -> Result<()> {
    console.sh(&format!(
        "mke2fs -F {disk} && mount -t ext4 -o discard {disk} /mnt"
    ))?;
    let mounts = console.sh("grep /mnt /proc/mounts")?;
    ensure!(mounts.contains("rw"), "mounted as {mounts:?}");
    Ok(())
}

/// Writes blocks at random places of a few files, directly and through the page cache, and keeps their
/// checksums beside them.
pub(crate) fn random_writes(console: &mut Console) -> Result<()> {
    let script = "set -e; cd /mnt
        dd if=/dev/urandom of=/tmp/noise bs=64k count=64 2>/dev/null
        for file in a b c; do
            for i in $(seq 12); do
                dd if=/tmp/noise of=$file bs=4k count=$((RANDOM % 8 + 1)) skip=$((RANDOM % 1000)) \
                   seek=$((RANDOM % 4096)) conv=notrunc 2>/dev/null
            done
        done
        for i in $(seq 6); do
            dd if=/tmp/noise of=direct bs=4k count=4 skip=$((RANDOM % 1000)) seek=$((RANDOM % 1024)) \
               oflag=direct conv=notrunc 2>/dev/null
        done
        sync; md5sum a b c direct >sums; sync";
    console.sh_within(script, seconds(120))?;
    verify(console)
}

/// Reads the files of [`random_writes`] from the disk, past the page cache, and compares checksums.
pub(crate) fn verify(console: &mut Console) -> Result<()> {
    let script = "echo 3 >/proc/sys/vm/drop_caches; cd /mnt && md5sum -c sums";
    let report = console.sh_within(script, seconds(120))?;
    ensure!(report.matches(": OK").count() == 4, "checksums: {report}");
    Ok(())
}

/// A read-only disk says so, fails a forced write, and still reads right.
pub(crate) fn refuses_writes(console: &mut Console, disk: &str, sum: &str) -> Result<()> {
    let name = disk.trim_start_matches("/dev/");
    let flag = console.sh(&format!("cat /sys/block/{name}/ro"))?;
    ensure!(flag.trim() == "1", "/sys/block/{name}/ro says {flag:?}");
    let write = console.run(&format!(
        "dd if=/dev/zero of={disk} bs=4k count=1 conv=fsync"
    ))?;
    ensure!(
        write.rc != 0,
        "a write to a read-only disk succeeded: {}",
        write.stdout
    );
    let read = console.sh(&format!(
        "mkdir -p /tmp/fixed && mount -t ext4 -o ro {disk} /tmp/fixed && md5sum /tmp/fixed/data && \
         umount /tmp/fixed"
    ))?;
    ensure!(
        read.starts_with(sum),
        "the disk's file reads as {read:?}, not {sum}"
    );
    Ok(())
}

/// What the guest deletes and trims leaves the image file. Comes after [`random_writes`].
pub(crate) fn discard(console: &mut Console, image: &Path) -> Result<()> {
    const SIZE: u64 = 64 << 20;
    console.sh_within(
        "for i in $(seq 16); do cat /tmp/noise; done >/mnt/big; sync",
        seconds(120),
    )?;
    let full = image::allocated_bytes(image)?;
    ensure!(full >= SIZE, "{full} bytes of storage after writing {SIZE}");
    console.sh("rm /mnt/big && sync && fstrim -v /mnt")?;
    until("storage to shrink after discard", seconds(20), || {
        Ok((image::allocated_bytes(image)? + SIZE * 9 / 10 <= full).then_some(()))
    })
}

/// The image grows twice, the daemon is told by signal and by command, and the guest has the new size
/// and reads back what it writes at the new end, its file system mounted all the while. Comes after
/// [`random_writes`].
pub(crate) fn grows(console: &mut Console, daemon: &Daemon, image: &Path) -> Result<()> {
    const MORE: u64 = 16 << 11;
    let before = fs::metadata(image)?.len() / 512;
    for sectors in [before + MORE, before + 2 * MORE] {
        let file = fs::File::options().write(true).open(image)?;
        file.set_len(sectors * 512)?;
        if sectors == before + MORE {
            daemon.signal(Signal::Hangup)?;
        } else {
            let answer = daemon.command("resize")?;
            ensure!(answer == format!("{sectors} sectors"), "answer {answer:?}");
        }
        until("the guest to see the new size", seconds(60), || {
            let seen = console.sh("cat /sys/block/vda/size")?;
            Ok((seen.trim() == sectors.to_string()).then_some(()))
        })?;
    }
    // The last 256 KiB.
    let last = (before + 2 * MORE) / 128 - 4;
    console.sh(&format!(
        "dd if=/tmp/noise of=/dev/vda bs=64k count=4 seek={last} oflag=direct 2>/dev/null &&
         dd if=/dev/vda of=/tmp/end bs=64k count=4 skip={last} iflag=direct 2>/dev/null &&
         dd if=/tmp/noise of=/tmp/start bs=64k count=4 2>/dev/null && cmp /tmp/start /tmp/end"
    ))?;
    verify(console)
}

/// The daemon of an idle disk dies and comes back: what was there is there, and new data lands.
pub(crate) fn restart(vm: &mut Vm, daemon: &mut Daemon) -> Result<()> {
    vm.sh("sync")?;
    daemon.kill();
    daemon.start_again()?;
    vm.console.sh_within(
        "echo 3 >/proc/sys/vm/drop_caches; dd if=/tmp/noise of=/mnt/after bs=64k count=8 2>/dev/null || \
         dd if=/dev/urandom of=/mnt/after bs=64k count=8; sync; md5sum /mnt/after >/tmp/after; \
         echo 3 >/proc/sys/vm/drop_caches; md5sum -c /tmp/after",
        seconds(60),
    )?;
    verify(&mut vm.console)
}

/// An ext4 image whose /sbin/init is the agent: the test guest's initramfs as a root file system.
pub(crate) fn root_image(context: &Context, path: &Path) -> Result<()> {
    let tree = context.scratch("root-tree");
    fs::create_dir(&tree)?;
    let archive = context.asset("guest-initramfs.cpio");
    let unpack = format!(
        "cd {} && busybox cpio -i <{}",
        tree.display(),
        archive.display()
    );
    run("sh", &["-c", &unpack]).context("unpack the guest's initramfs")?;
    fs::create_dir_all(tree.join("sbin"))?;
    let init = tree.join("sbin/init");
    fs::write(
        &init,
        "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n\
         mount -t tmpfs tmp /tmp\ndmesg -n 1\n\
         exec setsid /agent </dev/ttyS0 >/dev/ttyS0 2>&1\n",
    )?;
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    image::ext4(path, 128 << 20, &tree)
}

/// A guest whose root is `/dev/vda`: it writes there, powers off, and leaves a clean file system.
pub(crate) fn lives_on_its_disk(vm: &mut Vm, image: &Path, context: &Context) -> Result<()> {
    let mounts = vm.sh("grep ' / ' /proc/mounts")?;
    ensure!(
        mounts.contains("/dev/vda / ext4 rw"),
        "root in the guest: {mounts:?}"
    );
    let sum =
        vm.sh("dd if=/dev/urandom of=/written bs=64k count=16 2>/dev/null; md5sum </written")?;
    // Process 1 is the agent on the disk: only a read-only remount leaves it clean.
    vm.console
        .start("sync; mount -o remount,ro / && poweroff -f")?;
    vm.wait_off()?;
    image::require_clean(image)?;
    let copy = context.scratch("written");
    image::extract(image, "/written", &copy)?;
    let outside = image::md5(&copy)?;
    ensure!(
        sum.starts_with(&outside),
        "the guest wrote {sum:?}, the image holds {outside}"
    );
    Ok(())
}

fn root_on_berth_blk(context: &Context) -> Result<()> {
    let image = context.scratch("root.img");
    root_image(context, &image)?;
    let daemon = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .append("berth.root=/dev/vda")
        .disk(daemon.socket(), "")
        .boot(context)?;
    context.check("disk.root_on_berth_blk", || {
        lives_on_its_disk(&mut vm, &image, context)
    })
}
