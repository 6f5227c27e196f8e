//! Backends that are late, silent or stopped: they hold up themselves, and nobody else.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::peer::{SilentFrom, SilentPeer};
use berth_tests_framework::process::Signal;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{BOOT_LIMIT, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

use crate::disk;

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "silent-backend",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "backend.silent_holds_up_no_api",
            "backend.silent_holds_up_no_shutdown",
        ],
        run: silent_at_the_start,
    },
    Story {
        name: "stopped-backend",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "backend.late_is_waited_for",
            "backend.stopped_holds_up_no_api",
            "backend.stopped_holds_up_no_other_disk",
            "backend.stopped_during_reset",
            "backend.stopped_holds_up_no_power_off",
        ],
        run: stopped_in_flight,
    },
];

/// What an answer may take, also in an emulated host; a vhost-user deadline is longer.
const AT_ONCE: Duration = seconds(2);

/// The API answers at once, a few times in a row.
fn api_at_once(vm: &Vm) -> Result<()> {
    for name in ["vmm.ping", "vm.info", "vm.counters", "vmm.ping"] {
        let start = Instant::now();
        vm.api.get(name)?;
        ensure!(
            start.elapsed() < AT_ONCE,
            "{name} took {:?}",
            start.elapsed()
        );
    }
    Ok(())
}

/// One backend accepts and says nothing, one falls silent when asked for its configuration.
fn silent_at_the_start(context: &Context) -> Result<()> {
    let (mute, coy) = (context.scratch("mute.sock"), context.scratch("coy.sock"));
    let mute_peer = SilentPeer::start(&mute, SilentFrom::Accept)?;
    let coy_peer = SilentPeer::start(&coy, SilentFrom::GetConfig)?;
    context.step("start the VMM");
    let builder = VmBuilder::new(context, "vmm").disk(&coy, "").net(&mute, "");
    let mut vm = builder.start(context)?;
    context.check("backend.silent_holds_up_no_api", || {
        mute_peer.wait_silent(seconds(30))?;
        coy_peer.wait_silent(seconds(30))?;
        api_at_once(&vm)
    })?;
    context.check("backend.silent_holds_up_no_shutdown", || {
        vm.api.put("vmm.shutdown")?;
        vm.process.wait_success(seconds(10))
    })
}

/// One disk's daemon comes late and is stopped while idle, another's is stopped with a request in flight.
fn stopped_in_flight(context: &Context) -> Result<()> {
    let start = |name: &str| -> Result<Daemon> {
        let image = context.scratch(&format!("{name}.img"));
        image::sparse(&image, 64 << 20)?;
        Daemon::blk(context, name, &image, BlkSettings::default())
    };
    let (steady, busy) = (start("blk-steady")?, start("blk-busy")?);
    context.step("start the VMM before one of its backends");
    let builder = VmBuilder::new(context, "vmm")
        .cpus(2)
        .disk(steady.socket(), "")
        .disk(&context.scratch("blk-idle.sock"), "")
        .disk(busy.socket(), "");
    let mut vm = builder.start(context)?;
    vm.process.wait_output("blk-idle.sock", seconds(30))?;
    let idle = start("blk-idle")?;
    context.step("boot");
    vm.console.wait_ready(BOOT_LIMIT)?;
    context.check("backend.late_is_waited_for", || {
        vm.sh("test -b /dev/vdb").map(drop)
    })?;

    disk::make_and_mount(&mut vm.console, "/dev/vda")?;
    idle.signal(Signal::Stop)?;
    busy.signal(Signal::Stop)?;
    vm.sh("dd if=/dev/vdc of=/dev/null bs=4k count=1 iflag=direct >/tmp/log 2>&1 &")?;
    context.check("backend.stopped_holds_up_no_api", || api_at_once(&vm))?;
    context.check("backend.stopped_holds_up_no_other_disk", || {
        disk::random_writes(&mut vm.console)
    })?;
    context.check("backend.stopped_during_reset", || {
        // Unbinding resets the device, which asks the stopped backend for its rings' positions.
        let unbind = "function=$(basename $(readlink -f /sys/block/vdb/device/..))
            (echo $function >/sys/bus/pci/drivers/virtio-pci/unbind; echo over) >/tmp/unbound 2>&1 &";
        vm.sh(unbind)?;
        api_at_once(&vm)?;
        disk::verify(&mut vm.console)?;
        vm.sh("i=0; until grep over /tmp/unbound; do i=$((i + 1)); test $i -lt 300; usleep 100000; done")
            .map(drop)
    })?;
    context.check("backend.stopped_holds_up_no_power_off", || {
        vm.sh("umount /mnt")?;
        vm.console.start("poweroff -n -f")?;
        vm.process.wait_success(seconds(30))
    })?;
    idle.signal(Signal::Cont)?;
    busy.signal(Signal::Cont)
}
