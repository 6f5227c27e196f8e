//! Network cards behind berth-net: two of them, transfers both ways, segmentation offload, and what else
//! one guest with a network can be asked.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::image;
use berth_tests_framework::net::{self, FrameCounter, PageServer};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "net",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "net.two",
        "net.mac_as_asked",
        "net.ping",
        "net.transfer_100mb_each_way",
        "net.tso_both_ways",
        "rng.present",
        "api.pause_and_resume",
        "backend.net_restarted_while_idle",
        "backend.net_killed_3_times_in_transfers",
        "power.off_by_guest",
    ],
    run: two_cards,
}];

/// Longest Ethernet frame of the default MTU.
const LONGEST_UNSEGMENTED: usize = 1514;
/// The host on the first and second link; the guest is one higher.
const HOST: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 61, 1, 1), Ipv4Addr::new(10, 61, 2, 1)];
const GUEST: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 61, 1, 2), Ipv4Addr::new(10, 61, 2, 2)];
const MAC: [&str; 2] = ["52:54:00:be:47:01", "52:54:00:be:47:02"];

fn two_cards(context: &Context) -> Result<()> {
    context.step("start the daemons");
    net::make_tap("tap0")?;
    let mut first = Daemon::net(context, "net-first", "tap0", &[])?;
    let second = Daemon::net(context, "net-second", "tap1", &["--create".to_owned()])?;
    net::bring_up("tap0", HOST[0])?;
    net::bring_up("tap1", HOST[1])?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .net(first.socket(), &format!(",mac={}", MAC[0]))
        .net(second.socket(), &format!(",mac={}", MAC[1]))
        .boot(context)?;

    context.check("net.two", || {
        for (interface, address) in ["eth0", "eth1"].into_iter().zip(GUEST) {
            vmm::bring_up(&mut vm.console, interface, address)?;
        }
        Ok(())
    })?;
    context.check("net.mac_as_asked", || {
        let seen = vm.sh("cat /sys/class/net/eth0/address /sys/class/net/eth1/address")?;
        ensure!(seen.lines().eq(MAC), "addresses in the guest: {seen:?}");
        Ok(())
    })?;
    context.check("net.ping", || {
        for host in HOST {
            ping(&mut vm.console, host)?;
        }
        Ok(())
    })?;
    let frames = FrameCounter::start("tap0")?;
    context.check("net.transfer_100mb_each_way", || {
        transfer(context, &mut vm.console, [HOST[0], GUEST[0]], 100 << 20)
    })?;
    context.check("net.tso_both_ways", || frames_over_mtu(frames))?;
    context.check("rng.present", || rng(&mut vm))?;
    context.check("api.pause_and_resume", || pause_and_resume(&mut vm))?;
    context.check("backend.net_restarted_while_idle", || {
        first.kill();
        first.start_again()?;
        // A tap that is not there any more when its daemon dies would need its address again.
        until("answer to a ping after the restart", seconds(60), || {
            Ok(ping(&mut vm.console, HOST[0]).is_ok().then_some(()))
        })?;
        transfer(context, &mut vm.console, [HOST[0], GUEST[0]], 1 << 20)
    })?;
    context.check("backend.net_killed_3_times_in_transfers", || {
        killed_in_transfers(context, &mut vm.console, HOST[0], &mut first, 3)
    })?;
    context.check("power.off_by_guest", || vm.power_off())
}

/// The guest fetches a page again and again while the card's daemon dies `kills` times; every page that
/// arrives is whole, and one does after the last kill.
pub(crate) fn killed_in_transfers(
    context: &Context,
    console: &mut Console,
    host: Ipv4Addr,
    daemon: &mut Daemon,
    kills: u32,
) -> Result<()> {
    let page = context.scratch("page");
    image::random(&page, 16 << 20, 21)?;
    let (sum, server) = (image::md5(&page)?, PageServer::start(host, &page)?);
    console.sh(&format!(
        "rm -f /tmp/calm
         (while :; do
            wget -q -O /tmp/page {} || {{ usleep 100000; continue; }}
            md5sum </tmp/page | grep -q {sum} && echo whole || echo wrong
            [ ! -e /tmp/calm ] || break
          done; echo end) >/tmp/pages 2>/dev/null &",
        server.url()
    ))?;
    for kill in 0..kills {
        until(&format!("traffic before kill {kill}"), seconds(60), || {
            Ok((daemon.total("berth_bytes_to_guest_total")? >= 1 << 20).then_some(()))
        })?;
        daemon.kill();
        daemon.start_again()?;
    }
    let wait = "touch /tmp/calm; until grep -q end /tmp/pages; do usleep 50000; done; sort /tmp/pages | uniq -c";
    let pages = console.sh_within(wait, seconds(120))?;
    ensure!(
        pages.contains("whole") && !pages.contains("wrong"),
        "pages in the guest: {pages:?}"
    );
    Ok(())
}

/// The guest reaches a host.
pub(crate) fn ping(console: &mut Console, host: Ipv4Addr) -> Result<()> {
    console.sh(&format!("ping -c 3 -W 10 {host}")).map(drop)
}

/// A random file goes to the guest by HTTP, is summed there, and comes back from a server in the guest.
pub(crate) fn transfer(
    context: &Context,
    console: &mut Console,
    [host, guest]: [Ipv4Addr; 2],
    size_bytes: u64,
) -> Result<()> {
    let (sent, back) = (context.scratch("sent"), context.scratch("back"));
    image::random(&sent, size_bytes, size_bytes)?;
    let sum = image::md5(&sent)?;
    let server = PageServer::start(host, &sent)?;
    context.step("host to guest");
    let wget = format!(
        "mkdir -p /tmp/www && wget -q -O /tmp/www/data {}",
        server.url()
    );
    console.sh_within(&wget, seconds(120))?;
    let seen = console.sh("md5sum </tmp/www/data")?;
    ensure!(seen.starts_with(&sum), "sent {sum}, the guest has {seen:?}");
    context.step("guest to host");
    // It stays up for the next transfer.
    console
        .sh("[ -e /tmp/served ] || { busybox httpd -p 80 -h /tmp/www && touch /tmp/served; }")?;
    let received = net::fetch((guest, 80).into(), "/data", &back, seconds(60))?;
    ensure!(
        received == size_bytes,
        "{received} of {size_bytes} bytes came back"
    );
    ensure!(
        image::same(&sent, &back)?,
        "what came back differs from what was sent"
    );
    console.sh("rm /tmp/www/data").map(drop)
}

/// Frames longer than the MTU passed the tap both ways: nobody cut them up before.
pub(crate) fn frames_over_mtu(frames: FrameCounter) -> Result<()> {
    let frames = frames.finish()?;
    ensure!(
        frames.to_guest_longest > LONGEST_UNSEGMENTED
            && frames.from_guest_longest > LONGEST_UNSEGMENTED,
        "{frames:?}"
    );
    Ok(())
}

fn rng(vm: &mut Vm) -> Result<()> {
    let name = vm.sh("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(name.starts_with("virtio_rng"), "rng_current is {name:?}");
    // Two reads that are equal would be no randomness.
    let script =
        "for i in 1 2; do dd if=/dev/hwrng bs=64 count=1 2>/dev/null | md5sum; done | sort -u";
    let sums = vm.sh(script)?;
    ensure!(
        sums.lines().count() == 2,
        "two reads of /dev/hwrng: {sums:?}"
    );
    Ok(())
}

/// A paused guest stands still and its clock does not jump in a way that breaks it; afterwards it lives.
fn pause_and_resume(vm: &mut Vm) -> Result<()> {
    let ticker = "i=0; while :; do i=$((i + 1)); echo $i >/tmp/ticks; usleep 50000; done";
    vm.sh(&format!(
        "({ticker}) >/dev/null 2>&1 & echo $! >/tmp/ticker"
    ))?;
    let uptime = |vm: &mut Vm| -> Result<f64> {
        let text = vm.sh("cat /proc/uptime")?;
        Ok(text.split_whitespace().next().unwrap_or_default().parse()?)
    };
    let before = uptime(vm)?;
    for _ in 0..3 {
        vm.api.put("vm.pause")?;
        ensure!(
            vm.state()? == "Paused",
            "state after vm.pause: {}",
            vm.state()?
        );
        let question = vm.console.start("echo still there")?;
        let early = vm.console.finish(question, "echo while paused", seconds(2));
        ensure!(early.is_err(), "a paused guest answered");
        vm.api.put("vm.resume")?;
        ensure!(
            vm.state()? == "Running",
            "state after vm.resume: {}",
            vm.state()?
        );
        let answer = vm
            .console
            .finish(question, "echo after resume", seconds(60))?;
        ensure!(
            answer.stdout == "still there\n",
            "answer after resume: {answer:?}"
        );
    }
    let after = uptime(vm)?;
    ensure!(
        after > before && after < before + 600.0,
        "uptime went from {before} to {after}"
    );
    let ticks = "a=$(cat /tmp/ticks); usleep 500000; b=$(cat /tmp/ticks); echo $((b - a))";
    let moved: i64 = vm.sh(ticks)?.trim().parse()?;
    ensure!(moved > 0, "a timer in the guest does not fire after resume");
    vm.sh("kill $(cat /tmp/ticker)")?;
    let complaints = vm.sh("dmesg | grep -iE 'clocksource.*unstable|lockup|hung task' || true")?;
    ensure!(
        complaints.is_empty(),
        "the guest's kernel says: {complaints}"
    );
    Ok(())
}
