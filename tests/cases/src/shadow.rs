//! Guests whose daemons have none of their memory: the VMM copies. One whose memory is private from the start, one that
//! has a DMA window and does not keep to it, and a disk that comes when the guest runs.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::net as links;
use berth_tests_framework::process::Process;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;
use serde_json::json;

use crate::{disk, net};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "shadow-usedac",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "shadow.usedac_is_served",
            "shadow.usedac_disk_data_round_trips",
            "shadow.usedac_net_transfers_each_way",
            "shadow.usedac_killed_daemon_loses_nothing",
            "shadow.usedac_reboot",
            "shadow.usedac_off",
        ],
        run: usedac,
    },
    Story {
        name: "shadow-private",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "shadow.private_is_served",
            "shadow.private_disk_data_round_trips",
            "shadow.private_net_transfers_each_way",
            "shadow.private_off",
        ],
        run: private,
    },
];

const MIB: u64 = 1 << 20;
const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 4, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 4, 2);

/// A guest with two disks and a card, and their daemons.
struct Bench {
    vm: Vm,
    writable: Daemon,
    fixed: Daemon,
    card: Daemon,
}

impl Bench {
    fn boot(context: &Context, memory: &str, words: &str) -> Result<Self> {
        let (image, fixed) = (context.scratch("disk.img"), context.scratch("fixed.img"));
        image::sparse(&image, 256 * MIB)?;
        image::random(&fixed, 16 * MIB, 17)?;
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
        let fixed = Daemon::blk(context, "blk-fixed", &fixed, read_only)?;
        links::make_tap("tap0")?;
        let card = Daemon::net(context, "net", "tap0", &[])?;
        links::bring_up("tap0", HOST)?;
        context.step("boot");
        let vm = VmBuilder::new(context, "vmm")
            .cpus(2)
            .memory(memory)
            .append(words)
            .disk(writable.socket(), ",num_queues=2")
            .disk(fixed.socket(), ",readonly=on")
            .net(card.socket(), "")
            .boot(context)?;
        Ok(Self {
            vm,
            writable,
            fixed,
            card,
        })
    }

    /// No daemon has a page of the guest's, and what it has was copied.
    fn is_shadowed(&mut self, context: &Context) -> Result<()> {
        vmm::bring_up(&mut self.vm.console, "eth0", GUEST)?;
        for daemon in [&self.writable, &self.fixed, &self.card] {
            maps_bounce_memory(daemon.process())?;
        }
        let sum = self.vm.sh("md5sum </dev/vdb")?;
        let expected = image::md5(&context.scratch("fixed.img"))?;
        ensure!(sum.starts_with(&expected), "of /dev/vdb: {sum}");
        let counters = self.vm.counters()?;
        let out = |id: &str| counters[id]["shadow_copied_out_bytes"].as_u64();
        let read = out("_disk1").context("no counter of _disk1")?;
        ensure!(read >= 16 * MIB, "{counters}");
        fs::write(context.log("counters"), counters.to_string())?;
        Ok(())
    }

    fn disk(&mut self) -> Result<()> {
        disk::make_and_mount(&mut self.vm.console, "/dev/vda")?;
        disk::random_writes(&mut self.vm.console)
    }

    fn net(&mut self, context: &Context) -> Result<()> {
        net::transfer(context, &mut self.vm.console, [HOST, GUEST], 32 * MIB)
    }

    fn off(mut self, context: &Context) -> Result<()> {
        self.vm.sh("cd /; umount /mnt")?;
        self.vm.power_off()?;
        image::require_clean(&context.scratch("disk.img"))
    }
}

/// A process has bounce memory of the VMM mapped, and no memory of the guest.
fn maps_bounce_memory(process: &Process) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid()))?;
    ensure!(
        maps.contains("berth-bounce") && !maps.contains("berth-guest-ram"),
        "{} maps\n{maps}",
        process.name()
    );
    Ok(())
}

fn usedac(context: &Context) -> Result<()> {
    let mut bench = Bench::boot(context, "1G,mergeable=on", "iommu=usedac")?;
    context.check("shadow.usedac_is_served", || {
        let log = bench.vm.process.output()?;
        let line = log.lines().find(|line| {
            line.contains("served by shadow queues") && line.contains("does not keep")
        });
        ensure!(line.is_some(), "no line in the log");
        bench.is_shadowed(context)
    })?;
    context.check("shadow.usedac_disk_data_round_trips", || bench.disk())?;
    context.check("shadow.usedac_net_transfers_each_way", || {
        bench.net(context)
    })?;
    context.check("shadow.usedac_killed_daemon_loses_nothing", || {
        let begun = "(for i in $(seq 60); do dd if=/dev/urandom of=/mnt/k$i bs=64k count=4 conv=fsync; \
                     md5sum /mnt/k$i; done) >/tmp/sums 2>/tmp/errors; touch /tmp/written";
        bench.vm.sh(&format!("({begun}) >/dev/null 2>&1 &"))?;
        for _ in 0..5 {
            bench.vm.sh("usleep 300000")?;
            bench.writable.kill();
            bench.writable.start_again()?;
        }
        let said = "until [ -e /tmp/written ]; do usleep 50000; done; sync; echo 3 >/proc/sys/vm/drop_caches
            grep md5sum /tmp/sums | wc -l; md5sum -c /tmp/sums | grep -v ': OK' || true
            dmesg | grep -i 'I/O error' || true; rm /mnt/k*";
        let said = bench.vm.console.sh_within(said, seconds(180))?;
        ensure!(said.trim() == "0", "{said}");
        Ok(())
    })?;
    context.check("shadow.usedac_reboot", || {
        bench.vm.sh("umount /mnt")?;
        bench.vm.reboot()?;
        bench.is_shadowed(context)?;
        bench.vm.sh("mount -t ext4 /dev/vda /mnt")?;
        disk::verify(&mut bench.vm.console)
    })?;
    context.check("shadow.usedac_off", || bench.off(context))
}

fn private(context: &Context) -> Result<()> {
    let mut bench = Bench::boot(context, "512M,shared=off", "")?;
    context.check("shadow.private_is_served", || bench.is_shadowed(context))?;
    context.check("shadow.private_disk_data_round_trips", || bench.disk())?;
    context.check("shadow.private_net_transfers_each_way", || {
        bench.net(context)
    })?;
    context.check("shadow.private_off", || bench.off(context))
}

/// A disk that is added to a guest that runs, and cannot be limited any more, works, and can go again.
pub(crate) fn late_disk(context: &Context, vm: &mut Vm) -> Result<()> {
    let image = context.scratch("late.img");
    image::sparse(&image, 64 * MIB)?;
    let daemon = Daemon::blk(context, "blk-late", &image, BlkSettings::default())?;
    let body = json!({"id": "late", "vhost_user": true, "vhost_socket": daemon.socket()});
    let answer = vm.api.put_json("vm.add-disk", &body)?;
    ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
    let round_trip = "until [ -b /dev/vdc ]; do usleep 10000; done
        cat /sys/block/vdc/queue/max_segment_size
        dd if=/dev/urandom of=/tmp/new bs=1M count=8 2>/dev/null
        dd if=/tmp/new of=/dev/vdc bs=1M conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vdc bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/new && echo same; rm /tmp/new";
    let said = vm.console.sh_within(round_trip, seconds(120))?;
    ensure!(said.ends_with("same\n"), "{said}");
    maps_bounce_memory(daemon.process())?;
    let answer = vm
        .api
        .put_json("vm.remove-device", &json!({"id": "late"}))?;
    ensure!(answer.status == 204, "{}: {}", answer.status, answer.body);
    vm.console.sh_within(
        "while [ -e /sys/block/vdc ]; do usleep 50000; done",
        seconds(60),
    )?;
    Ok(())
}
