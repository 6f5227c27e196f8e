//! Disks and network cards that come and go while a guest runs, by PCI Express native hot-plug: ten of
//! each, one pair after another, while another disk is written and read back all the time.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::net;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};
use serde_json::json;

use crate::net::ping;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "hotplug",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "hotplug.slots_are_native",
        "hotplug.ten_disks_and_cards_under_load",
        "hotplug.load_saw_nothing",
        "hotplug.stays_over_a_reboot",
        "hotplug.created_by_the_api",
    ],
    run: come_and_go,
}];

const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 9, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 9, 2);
const ROUNDS: u32 = 10;

/// The daemons of what comes and goes.
struct Spare {
    disk: Daemon,
    card: Daemon,
}

impl Spare {
    fn start(context: &Context) -> Result<Self> {
        let image = context.scratch("spare.img");
        image::sparse(&image, 64 << 20)?;
        let disk = Daemon::blk(context, "blk-spare", &image, BlkSettings::default())?;
        net::make_tap("tap9")?;
        let card = Daemon::net(context, "net-spare", "tap9", &[])?;
        net::bring_up("tap9", HOST)?;
        Ok(Self { disk, card })
    }
}

fn come_and_go(context: &Context) -> Result<()> {
    let base = context.scratch("base.img");
    image::sparse(&base, 64 << 20)?;
    let base = Daemon::blk(context, "blk-base", &base, BlkSettings::default())?;
    let spare = Spare::start(context)?;
    context.step("boot");
    // The guest that is created later has a file of its own, which the command line knows nothing of.
    let later = created_serial(context);
    let folder = later.parent().context("a scratch file has a folder")?;
    let rule = format!("path={},access=rw", folder.display());
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .device("--landlock-rules", rule)
        .disk(base.socket(), ",id=base")
        .boot(context)?;
    context.check("hotplug.slots_are_native", || {
        let slots = vm.sh("ls /sys/bus/pci/slots | wc -l")?;
        // The base disk's, and the default number of empty ones.
        ensure!(
            slots.trim() == "9",
            "hot-plug slots in the guest: {slots:?}"
        );
        Ok(())
    })?;
    load(&mut vm.console)?;
    context.check("hotplug.ten_disks_and_cards_under_load", || {
        let mut visible = Vec::new();
        for round in 0..ROUNDS {
            context.step(format!("round {round}"));
            visible.push(one_round(&mut vm, &spare, round)?);
        }
        let text = format!("from the answer to the guest's device node: {visible:?}\n");
        std::fs::write(context.log("hotplug").with_extension("times"), text)?;
        Ok(())
    })?;
    context.check("hotplug.load_saw_nothing", || calm(&mut vm.console))?;
    context.check("hotplug.stays_over_a_reboot", || {
        add_disk(&vm, &spare)?;
        vm.api.put("vm.reboot")?;
        vm.console.wait_ready(vmm::BOOT_LIMIT)?;
        vm.sh("cat /sys/block/vda/size /sys/block/vdb/size")?;
        Ok(())
    })?;
    context.check("hotplug.created_by_the_api", || created(context, &mut vm))
}

pub(crate) fn put(vm: &Vm, name: &str, body: &serde_json::Value, status: u16) -> Result<String> {
    let answer = vm.api.put_json(name, body)?;
    ensure!(
        answer.status == status,
        "{name}: status {}: {}",
        answer.status,
        answer.body
    );
    Ok(answer.body)
}

fn add_disk(vm: &Vm, spare: &Spare) -> Result<()> {
    let socket = spare.disk.socket();
    let body = json!({"id": "extra", "vhost_user": true, "vhost_socket": socket});
    put(vm, "vm.add-disk", &body, 200).map(drop)
}

/// Adds a disk and a card, uses and removes them. Returns how long the disk took to be there.
fn one_round(vm: &mut Vm, spare: &Spare, round: u32) -> Result<Duration> {
    add_disk(vm, spare)?;
    let added = Instant::now();
    vm.console
        .sh_within("until [ -b /dev/vdb ]; do usleep 10000; done", seconds(60))?;
    let visible = added.elapsed();
    let card = json!({"id": "lan", "vhost_user": true, "vhost_socket": spare.card.socket(),
        "mac": "52:54:00:be:49:01"});
    put(vm, "vm.add-net", &card, 200)?;
    vm.console.sh_within(
        "until [ -e /sys/class/net/eth0 ]; do usleep 10000; done",
        seconds(60),
    )?;
    vm.sh(&format!(
        "dd if=/dev/urandom of=/tmp/new bs=64k count=4 2>/dev/null
         dd if=/tmp/new of=/dev/vdb bs=64k seek={round} conv=fsync 2>/dev/null
         echo 1 >/proc/sys/vm/drop_caches
         dd if=/dev/vdb bs=64k skip={round} count=4 2>/dev/null | cmp - /tmp/new"
    ))?;
    vmm::bring_up(&mut vm.console, "eth0", GUEST)?;
    ping(&mut vm.console, HOST)?;
    for id in ["extra", "lan"] {
        put(vm, "vm.remove-device", &json!({"id": id}), 204)?;
    }
    // Linux waits five seconds for a second press of the button.
    vm.console.sh_within(
        "while [ -e /sys/block/vdb ] || [ -e /sys/class/net/eth0 ]; do usleep 50000; done",
        seconds(60),
    )?;
    until("devices that the guest let go of", seconds(60), || {
        let info = vm.api.get("vm.info")?;
        let tree = info["device_tree"].as_object().context("no device_tree")?;
        let there = ["extra", "lan"].iter().any(|id| tree.contains_key(*id));
        Ok((!there).then_some(()))
    })?;
    Ok(visible)
}

/// Writes pieces of the first disk and reads them back, until told to be calm.
pub(crate) fn load(console: &mut Console) -> Result<()> {
    console
        .sh("rm -f /tmp/calm
             (i=0; while [ ! -e /tmp/calm ]; do
                i=$(((i + 1) % 200))
                dd if=/dev/urandom of=/tmp/piece bs=64k count=4
                dd if=/tmp/piece of=/dev/vda bs=256k seek=$i conv=fsync
                echo 1 >/proc/sys/vm/drop_caches
                dd if=/dev/vda bs=256k skip=$i count=1 | cmp - /tmp/piece && echo same || echo other
              done; echo end) >/tmp/load 2>/dev/null &")
        .map(drop)
}

pub(crate) fn calm(console: &mut Console) -> Result<()> {
    let end = "touch /tmp/calm; until grep -q end /tmp/load; do usleep 50000; done; sort /tmp/load | uniq -c";
    let load = console.sh_within(end, seconds(120))?;
    let same = load.lines().any(|line| line.ends_with(" same"));
    ensure!(
        same && !load.contains("other"),
        "what the load saw: {load:?}"
    );
    Ok(())
}

fn created_serial(context: &Context) -> PathBuf {
    context.scratch("created.serial")
}

/// The same guest, forgotten and made again from what `vm.info` said of it.
fn created(context: &Context, vm: &mut Vm) -> Result<()> {
    let info = vm.api.get("vm.info")?;
    vm.api.put("vm.delete")?;
    let refused = vm.api.request("GET", "vm.info")?;
    ensure!(refused.status == 404, "vm.info of no VM: {refused:?}");
    let log = created_serial(context);
    let mut config = info["config"].clone();
    config["serial"] = json!({"mode": "File", "file": log});
    put(vm, "vm.create", &config, 204)?;
    vm.api.put("vm.boot")?;
    until(
        "the agent of the guest that was created",
        vmm::BOOT_LIMIT,
        || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            Ok(text.contains("berth-agent ready").then_some(()))
        },
    )?;
    let state = vm.state()?;
    ensure!(state == "Running", "state: {state}");
    vm.api.put("vm.delete")
}
