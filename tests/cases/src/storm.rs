//! The long form, `./test --full`: every way to boot at every size, and the same few events many times.

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

use crate::{cpu, disk, memory, power};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "matrix",
        tier: Tier::Guest,
        long: true,
        checks: &["matrix.every_entry_and_size"],
        run: matrix,
    },
    Story {
        name: "storm",
        tier: Tier::Guest,
        long: true,
        checks: &[
            "storm.daemon_killed_20_times",
            "storm.paused_100_times_under_io",
            "storm.rebooted_5_times",
        ],
        run: storm,
    },
];

const KERNELS: [(&str, &str); 4] = [
    ("vmlinux", ",entry=pvh"),
    ("vmlinux", ",entry=linux64"),
    ("vmlinuz", ""),
    ("vmlinuz", ",entry=bzimage"),
];

fn matrix(context: &Context) -> Result<()> {
    context.check("matrix.every_entry_and_size", || {
        for (kernel, entry) in KERNELS {
            for cpus in [1, 2, 4] {
                for (size, bytes) in [("512M", 512 << 20), ("5G", 5u64 << 30)] {
                    let what = format!("{kernel}{entry}, {cpus} vCPUs, {size}");
                    context.step(what.clone());
                    boot_once(context, kernel, entry, cpus, size, bytes).context(what)?;
                }
            }
        }
        Ok(())
    })
}

fn boot_once(
    context: &Context,
    kernel: &str,
    entry: &str,
    cpus: u32,
    size: &str,
    bytes: u64,
) -> Result<()> {
    let mut vm = VmBuilder::new(context, "vmm")
        .kernel(format!("{}{entry}", context.asset(kernel).display()))
        .cpus(cpus)
        .memory(size)
        .boot(context)?;
    cpu::online(&mut vm.console, cpus as usize)?;
    memory::is_there(&mut vm.console, bytes)?;
    vm.power_off()
}

fn storm(context: &Context) -> Result<()> {
    let image = context.scratch("disk.img");
    image::sparse(&image, 512 << 20)?;
    let mut daemon = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .disk(daemon.socket(), "")
        .boot(context)?;
    disk::make_and_mount(&mut vm.console, "/dev/vda")?;
    disk::random_writes(&mut vm.console)?;
    context.check("storm.daemon_killed_20_times", || {
        for _ in 0..20 {
            disk::restart(&mut vm, &mut daemon)?;
        }
        Ok(())
    })?;
    context.check("storm.paused_100_times_under_io", || pauses(&mut vm))?;
    context.check("storm.rebooted_5_times", || {
        for _ in 0..5 {
            vm.sh("umount /mnt")?;
            power::reboots(&mut vm)?;
            vm.sh("mount -t ext4 -o discard /dev/vda /mnt")?;
            disk::verify(&mut vm.console)?;
        }
        Ok(())
    })?;
    vm.sh("umount /mnt")?;
    vm.power_off()?;
    image::require_clean(&image)
}

/// Pauses while the guest reads and writes; its sums are right and its watchdogs silent afterwards.
fn pauses(vm: &mut Vm) -> Result<()> {
    vm.sh("(while [ ! -e /tmp/enough ]; do dd if=/dev/vda of=/dev/null bs=64k count=256 iflag=direct; \
        done; touch /tmp/ended) >/tmp/load 2>&1 &")?;
    for _ in 0..100 {
        vm.api.put("vm.pause")?;
        ensure!(
            vm.state()? == "Paused",
            "state {} after vm.pause",
            vm.state()?
        );
        vm.api.put("vm.resume")?;
    }
    vm.console.sh_within(
        "touch /tmp/enough; while [ ! -e /tmp/ended ]; do sleep 1; done",
        seconds(120),
    )?;
    disk::verify(&mut vm.console)?;
    let complaints = vm.sh("dmesg | grep -iE 'soft lockup|rcu.*stall|hung task' || true")?;
    ensure!(complaints.is_empty(), "in the guest's log: {complaints}");
    Ok(())
}
