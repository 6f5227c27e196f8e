//! Daemons that the VMM starts itself: a guest from one command, daemons killed under it, and nothing left
//! when the VMM is gone.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::image;
use berth_tests_framework::net;
use berth_tests_framework::process::run;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};
use serde_json::json;

use crate::kill_storm::guest::{add_program, finish_load, start_load};
use crate::net::ping;
use crate::{any_device, disk, hotplug};

/// Stories of this file.
pub(crate) const STORIES: &[Story] = &[Story {
    name: "own-daemons",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "own_daemons.one_command",
        "own_daemons.read_only_refused",
        "own_daemons.disk_killed_3_times_under_load",
        "own_daemons.card_killed",
        "own_daemons.disk_added_to_a_running_guest",
        "own_daemons.added_disk_killed",
        "own_daemons.added_disk_removed",
        "own_daemons.after_a_reboot",
        "own_daemons.end_with_a_killed_vmm",
    ],
    run: own_daemons,
}];

const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 5, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 5, 2);
const MAC: &str = "52:54:00:be:47:05";

fn own_daemons(context: &Context) -> Result<()> {
    let (image, fixed) = (context.scratch("own.img"), context.scratch("own-fixed.img"));
    image::sparse(&image, 256 << 20)?;
    let contents = context.scratch("fixed");
    fs::create_dir(&contents)?;
    image::random(&contents.join("data"), 1 << 20, 41)?;
    let sum = image::md5(&contents.join("data"))?;
    add_program(context, &contents)?;
    image::ext4(&fixed, 64 << 20, &contents)?;
    net::make_tap("own0")?;
    net::bring_up("own0", HOST)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .device("--disk", format!("path={},num_queues=2", image.display()))
        .device("--disk", format!("path={},readonly=on", fixed.display()))
        .device("--net", format!("tap=own0,mac={MAC}"))
        .boot(context)?;
    let blk = format!("--blk-file={}", image.display());

    context.check("own_daemons.one_command", || {
        disk::make_and_mount(&mut vm.console, "/dev/vda")?;
        disk::random_writes(&mut vm.console)?;
        let address = vm.sh("cat /sys/class/net/eth0/address")?;
        ensure!(address.trim() == MAC, "address in the guest: {address:?}");
        vmm::bring_up(&mut vm.console, "eth0", GUEST)?;
        ping(&mut vm.console, HOST)
    })?;
    context.check("own_daemons.read_only_refused", || {
        disk::refuses_writes(&mut vm.console, "/dev/vdb", &sum)
    })?;
    context.check("own_daemons.disk_killed_3_times_under_load", || {
        vm.sh("mkdir -p /programs && mount -t ext4 -o ro /dev/vdb /programs")?;
        start_load(&mut vm.console, "/programs", "/mnt")?;
        for _ in 0..3 {
            kill(&blk)?;
            vm.sh("dd if=/dev/zero of=/mnt/after bs=64k count=16 conv=fsync 2>/dev/null")?;
        }
        finish_load(&mut vm.console)?;
        vm.sh("umount /programs")?;
        disk::verify(&mut vm.console)
    })?;
    context.check("own_daemons.card_killed", || {
        kill("--tap=own0")?;
        until("answer to a ping after the kill", seconds(60), || {
            Ok(ping(&mut vm.console, HOST).is_ok().then_some(()))
        })
    })?;
    added_disk(context, &mut vm)?;
    context.check("own_daemons.after_a_reboot", || {
        let before = pid_of(&blk).context("no daemon before the reboot")?;
        vm.reboot()?;
        let after = pid_of(&blk).context("no daemon after the reboot")?;
        ensure!(before != after, "the daemon of the boot before");
        vm.sh("mount -t ext4 -o discard /dev/vda /mnt")?;
        disk::verify(&mut vm.console)
    })?;
    context.check("own_daemons.end_with_a_killed_vmm", || {
        gone_with(&mut vm, &[&blk, "--tap=own0"])?;
        image_is_free(&image)
    })
}

/// An image that comes by the API: it gets a daemon of its own, which goes with it.
fn added_disk(context: &Context, vm: &mut Vm) -> Result<()> {
    let image = context.scratch("added.img");
    image::sparse(&image, 48 << 20)?;
    let blk = format!("--blk-file={}", image.display());
    context.check("own_daemons.disk_added_to_a_running_guest", || {
        let body = json!({"id": "extra", "path": image});
        hotplug::put(vm, "vm.add-disk", &body, 200)?;
        let added = Instant::now();
        let there = "until [ -b /dev/vdc ]; do usleep 10000; done; cat /sys/block/vdc/size";
        let sectors = vm.console.sh_within(there, seconds(60))?;
        let text = format!(
            "from the answer to the guest's device node: {:?}\n",
            added.elapsed()
        );
        fs::write(context.log("own-daemons").with_extension("times"), text)?;
        ensure!(
            sectors.trim() == "98304",
            "sectors in the guest: {sectors:?}"
        );
        vm.sh("mke2fs -F /dev/vdc && mkdir -p /extra && mount -t ext4 /dev/vdc /extra")?;
        vm.sh(
            "dd if=/dev/urandom of=/extra/first bs=1M count=4 conv=fsync 2>/dev/null
             md5sum </extra/first >/tmp/first",
        )
        .map(drop)
    })?;
    context.check("own_daemons.added_disk_killed", || {
        // One that writes meanwhile waits, and goes on.
        vm.sh("rm -f /tmp/second.done
             (dd if=/dev/urandom of=/extra/second bs=64k count=256 oflag=direct &&
              md5sum </extra/second >/tmp/second && touch /tmp/second.done) >/tmp/second.log 2>&1 &")?;
        kill(&blk)?;
        let done = "until [ -e /tmp/second.done ]; do usleep 50000; done";
        vm.console.sh_within(done, seconds(60))?;
        for name in ["first", "second"] {
            let seen = vm.sh(&format!(
                "echo 3 >/proc/sys/vm/drop_caches; md5sum </extra/{name} | cmp - /tmp/{name} && echo same"
            ))?;
            ensure!(seen == "same\n", "{name} after the kill: {seen}");
        }
        Ok(())
    })?;
    context.check("own_daemons.added_disk_removed", || {
        vm.sh("umount /extra")?;
        let pid = pid_of(&blk).context("no daemon of the disk that was added")?;
        hotplug::put(vm, "vm.remove-device", &json!({"id": "extra"}), 204)?;
        // Linux waits five seconds for a second press of the button.
        let gone = "while [ -e /sys/block/vdc ]; do usleep 50000; done";
        vm.console.sh_within(gone, seconds(60))?;
        ended(pid)?;
        image_is_free(&image)?;
        image::require_clean(&image)?;
        for name in ["first", "second"] {
            let copy = context.scratch(name);
            image::extract(&image, name, &copy)?;
            any_device::same(vm, &format!("/tmp/{name}"), &sum_file(&copy)?)?;
        }
        Ok(())
    })
}

/// A file beside it that holds what md5sum says of it in the guest.
fn sum_file(path: &Path) -> Result<PathBuf> {
    let sums = path.with_extension("sum");
    fs::write(&sums, format!("{}  -\n", image::md5(path)?))?;
    Ok(sums)
}

/// Waits for the end of a process that somebody else takes leave of.
fn ended(pid: i32) -> Result<()> {
    until(&format!("end of process {pid}"), seconds(60), || {
        Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })
}

/// Kills a daemon as `kill -9` does, and waits for its successor.
fn kill(argument: &str) -> Result<()> {
    let pid = until(&format!("a daemon with {argument}"), seconds(60), || {
        Ok(pid_of(argument))
    })?;
    run("kill", &["-9", &pid.to_string()])?;
    until(&format!("a successor of {pid}"), seconds(60), || {
        Ok(pid_of(argument).filter(|&next| next != pid))
    })?;
    Ok(())
}

/// The VMM is killed; daemons and launcher end by themselves.
fn gone_with(vm: &mut Vm, arguments: &[&str]) -> Result<()> {
    let pids: Option<Vec<_>> = arguments.iter().map(|argument| pid_of(argument)).collect();
    let mut pids = pids.context("not all daemons are there")?;
    pids.push(parent_of(pids[0])?);
    vm.process.kill();
    pids.into_iter().try_for_each(ended)
}

/// Nobody holds a lock on it any more: another daemon can have it.
fn image_is_free(image: &Path) -> Result<()> {
    let image = image.to_str().context("a path that is not UTF-8")?;
    run("qemu-img", &["info", "-f", "raw", image]).map(drop)
}

/// The process of a daemon that was started with that argument.
fn pid_of(argument: &str) -> Option<i32> {
    let processes = fs::read_dir("/proc").ok()?;
    processes.flatten().find_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        let line = fs::read(process.path().join("cmdline")).ok()?;
        let mut words = line.split(|&byte| byte == 0);
        words.any(|word| word == argument.as_bytes()).then_some(pid)
    })
}

fn parent_of(pid: i32) -> Result<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(parent.context("no PPid")?.trim().parse()?)
}
