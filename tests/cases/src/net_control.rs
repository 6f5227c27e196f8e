//! What a guest does with its network card through the control queue, and what it sees of the link: two
//! queue pairs, another address, a tap that goes down.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::net;
use berth_tests_framework::process::run;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

use crate::net::ping;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "net_control",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "net.both_pairs_carry_frames",
        "net.guest_changes_its_mac",
        "net.link_follows_the_tap",
        "net.interface_down_and_up",
    ],
    run: two_pairs,
}];

const TAP: &str = "tap0";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 62, 1, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 62, 1, 2);
/// The daemon's idea of the address and the VMM's agree, so that the card filters for it.
const MAC: &str = "52:54:00:be:48:01";
const OTHER_MAC: &str = "52:54:00:be:48:99";

fn two_pairs(context: &Context) -> Result<()> {
    context.step("start the daemon");
    let arguments = ["--create", "--num-queues=2", &format!("--mac={MAC}")].map(str::to_owned);
    let daemon = Daemon::net(context, "net", TAP, &arguments)?;
    net::bring_up(TAP, HOST)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .net(daemon.socket(), &format!(",mac={MAC},num_queues=4"))
        .boot(context)?;
    vmm::bring_up(&mut vm.console, "eth0", GUEST)?;

    context.check("net.both_pairs_carry_frames", || {
        both_pairs(&mut vm, &daemon, HOST)
    })?;
    context.check("net.guest_changes_its_mac", || {
        // The driver has switched promiscuous mode off by now: the card filters.
        vm.sh(&format!("ip link set eth0 address {OTHER_MAC}"))?;
        ping(&mut vm.console, HOST)?;
        let neighbour = run("ip", &["neigh", "show", &GUEST.to_string()])?;
        ensure!(neighbour.contains(OTHER_MAC), "the host sees {neighbour:?}");
        Ok(())
    })?;
    context.check("net.link_follows_the_tap", || link(&mut vm))?;
    context.check("net.interface_down_and_up", || {
        vm.sh("ip link set eth0 down && ip link set eth0 up")?;
        ping(&mut vm.console, HOST)
    })?;
    vm.power_off()
}

/// A flow that a vCPU sends goes out by its pair, and the tap sends the answers back there.
///
/// The tap learns a flow's pair from a frame only after the host's stack has answered it, and the first
/// frame may have waited for ARP and gone out on whichever vCPU took the answer: so the first answers come
/// by the pair of before, and are not counted.
pub(crate) fn both_pairs(vm: &mut Vm, daemon: &Daemon, host: Ipv4Addr) -> Result<()> {
    for pair in 0..2 {
        let mut ping = |count| {
            let mask = 1 << pair;
            vm.sh(&format!("taskset {mask} ping -c {count} -W 10 {host}"))
        };
        ping(2)?;
        let before = daemon.metrics()?;
        ping(5)?;
        let after = daemon.metrics()?;
        for queue in [2 * pair, 2 * pair + 1] {
            let name = format!("berth_requests_total{{device=\"net\",queue=\"{queue}\"}}");
            let value = |metrics: &std::collections::BTreeMap<_, f64>| metrics.get(&name).copied();
            let more = value(&after).unwrap_or(0.0) - value(&before).unwrap_or(0.0);
            ensure!(
                more >= 5.0,
                "queue {queue} carried {more} of 5 frames of pair {pair}"
            );
        }
    }
    Ok(())
}

fn link(vm: &mut Vm) -> Result<()> {
    for (change, carrier) in [("down", "0"), ("up", "1")] {
        run("ip", &["link", "set", TAP, change])?;
        until(
            &format!("carrier {carrier} in the guest"),
            seconds(30),
            || {
                let seen = vm.sh("cat /sys/class/net/eth0/carrier")?;
                Ok((seen.trim() == carrier).then_some(()))
            },
        )?;
    }
    ping(&mut vm.console, HOST)
}
