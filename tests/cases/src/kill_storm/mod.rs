//! Daemons that are killed with SIGKILL again and again under load, by drivers of our own: nothing is lost,
//! nothing is answered twice, and the driver sees no error. Each storm's client also shows that it can fail.

mod card;
mod disk;
pub(crate) mod guest;
mod request;
mod tally;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::driver::Ring;
use berth_tests_framework::image;
use berth_tests_framework::net;
use berth_tests_framework::process::Signal;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::wait::seconds;

use crate::blocks::{self, BLOCK};
use card::Card;
use disk::{Client, Plan};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "blk-kill-storm",
        tier: Tier::Client,
        long: false,
        checks: &["kill_storm.blk_direct_10", "kill_storm.blk_cached_10"],
        run: |context| {
            blk(context, "kill_storm.blk_direct_10", DIRECT, 10)?;
            blk(context, "kill_storm.blk_cached_10", CACHED, 10)
        },
    },
    Story {
        name: "blk-kill-storm-long",
        tier: Tier::Client,
        long: true,
        checks: &[
            "kill_storm.blk_direct_100",
            "kill_storm.blk_cached_100",
            "kill_storm.blk_sync_100",
        ],
        run: |context| {
            blk(context, "kill_storm.blk_direct_100", DIRECT, 100)?;
            blk(context, "kill_storm.blk_cached_100", CACHED, 100)?;
            blk(context, "kill_storm.blk_sync_100", SYNC, 100)
        },
    },
    Story {
        name: "blk-kill-storm-fails",
        tier: Tier::Client,
        long: false,
        checks: &[
            "kill_storm.blk_sees_lost_requests",
            "kill_storm.blk_sees_doubled_entries",
            "kill_storm.blk_sees_stale_block",
        ],
        run: blk_fails,
    },
    Story {
        name: "guest-kill-storm",
        tier: Tier::Guest,
        long: false,
        checks: &["kill_storm.ext4_under_berth_vmm_10"],
        run: |context| guest::under_berth_vmm(context, "kill_storm.ext4_under_berth_vmm_10", 10),
    },
    Story {
        name: "guest-kill-storm-long",
        tier: Tier::Guest,
        long: true,
        checks: &["kill_storm.ext4_under_berth_vmm_50"],
        run: |context| guest::under_berth_vmm(context, "kill_storm.ext4_under_berth_vmm_50", 50),
    },
    Story {
        name: "net-kill-storm",
        tier: Tier::Client,
        long: false,
        checks: &[
            "kill_storm.net_tracked_10",
            "kill_storm.net_untracked_10",
            "kill_storm.net_sees_lost_frames",
        ],
        run: |context| {
            net(context, "kill_storm.net_tracked_10", true, 10)?;
            net(context, "kill_storm.net_untracked_10", false, 10)?;
            context.check("kill_storm.net_sees_lost_frames", || frames_lost(context))
        },
    },
    Story {
        name: "net-kill-storm-long",
        tier: Tier::Client,
        long: true,
        checks: &["kill_storm.net_tracked_50", "kill_storm.net_untracked_50"],
        run: |context| {
            net(context, "kill_storm.net_tracked_50", true, 50)?;
            net(context, "kill_storm.net_untracked_50", false, 50)
        },
    },
];

const PLAN: Plan = Plan {
    queues: 2,
    depth: 32,
    size_bytes: 64 << 20,
    ring_features: true,
    tracked: true,
    seed: 1,
};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 9, 1);

/// A storm's daemon and client.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    flags: &'static [&'static str],
    plan: Plan,
}

const DIRECT: Shape = Shape {
    name: "direct",
    flags: &["--cache=none", "--engine=io-uring"],
    plan: PLAN,
};

const CACHED: Shape = Shape {
    name: "cached",
    flags: &["--cache=writeback"],
    plan: Plan {
        ring_features: false,
        seed: 2,
        ..PLAN
    },
};

const SYNC: Shape = Shape {
    name: "sync",
    flags: &["--cache=writeback", "--engine=sync"],
    plan: Plan { seed: 3, ..PLAN },
};

fn start(context: &Context, shape: Shape) -> Result<(Daemon, std::path::PathBuf)> {
    let image = context.scratch(&format!("{}.img", shape.name));
    image::sparse(&image, shape.plan.size_bytes)?;
    let settings = BlkSettings {
        queues: shape.plan.queues,
        more: shape.flags,
        ..Default::default()
    };
    let daemon = Daemon::blk(context, shape.name, &image, settings)?;
    Ok((daemon, image))
}

/// One storm, and every block read back: by the daemon, and from the image after its end.
fn blk(context: &Context, check: &'static str, shape: Shape, kills: u32) -> Result<()> {
    context.step(format!("start for {check}"));
    let (mut daemon, image) = start(context, shape)?;
    let mut client = Client::new(shape.plan)?;
    context.check(check, || {
        let storm = client.storm(&mut daemon, kills);
        let log = context.log(&format!("{}-storm", shape.name));
        fs::write(&log, format!("{:#?}\n", client.tally))?;
        client.tally.all_well()?;
        storm?;
        client.read_back()?;
        client.tally.all_well()?;
        client.stop()?;
        daemon.signal(Signal::Term)?;
        daemon.process_mut().wait_success(seconds(30))?;
        client.compare(&image)?;
        client.tally.all_well()?;
        // Where the daemon stood still the queues were full, but for blocks that were busy.
        let full = u64::from(kills / 5 * u32::from(shape.plan.queues)) * shape.plan.depth as u64;
        ensure!(
            client.tally.kills == kills && client.tally.in_flight_at_kills >= full / 2,
            "this was no storm: {:?}",
            client.tally
        );
        Ok(())
    })
}

const UNTRACKED: Shape = Shape {
    name: "untracked",
    flags: &["--cache=none"],
    plan: Plan {
        tracked: false,
        ..PLAN
    },
};

/// The same client where requests are lost, answered twice and forgotten: it must say so.
fn blk_fails(context: &Context) -> Result<()> {
    context.check("kill_storm.blk_sees_lost_requests", || lost(context))?;
    context.check("kill_storm.blk_sees_doubled_entries", || doubled(context))?;
    context.check("kill_storm.blk_sees_stale_block", || stale(context))
}

fn lost(context: &Context) -> Result<()> {
    let (mut daemon, _) = start(context, UNTRACKED)?;
    let mut client = Client::new(UNTRACKED.plan)?;
    client.dial(daemon.socket())?;
    client.work(100)?;
    client.drain()?;
    // Standing still, it takes nothing; and what the rings hold is never asked for again.
    daemon.signal(Signal::Stop)?;
    client.fill()?;
    daemon.kill();
    daemon.start_again()?;
    client.dial_from(daemon.socket(), Ring::avail_idx)?;
    client.stop()?;
    let depth = u64::from(UNTRACKED.plan.queues) * UNTRACKED.plan.depth as u64;
    ensure!(
        client.tally.missing == depth && client.tally.faults.is_empty(),
        "{depth} requests were lost, the client says: {:?}",
        client.tally
    );
    ensure!(client.tally.all_well().is_err(), "all well");
    Ok(())
}

fn doubled(context: &Context) -> Result<()> {
    let (daemon, _) = start(context, UNTRACKED)?;
    let mut client = Client::new(UNTRACKED.plan)?;
    client.dial(daemon.socket())?;
    client.work(100)?;
    client.drain()?;
    client.dial_from(daemon.socket(), |ring| ring.used_idx().wrapping_sub(1))?;
    client.work(20)?;
    client.drain()?;
    ensure!(
        client.tally.faults.len() == usize::from(UNTRACKED.plan.queues)
            && client.tally.missing == 0,
        "one entry of each queue was doubled, the client says: {:?}",
        client.tally
    );
    ensure!(client.tally.all_well().is_err(), "all well");
    Ok(())
}

fn stale(context: &Context) -> Result<()> {
    let (daemon, image) = start(context, UNTRACKED)?;
    let mut client = Client::new(UNTRACKED.plan)?;
    client.dial(daemon.socket())?;
    client.work(1000)?;
    client.drain()?;
    client.read_back()?;
    client.tally.all_well()?;
    // A block that is right in itself, but of an earlier write.
    let stale = 3usize;
    let mut bytes = vec![0; BLOCK];
    blocks::fill(&mut bytes, stale as u64, 0);
    let file = fs::File::options().write(true).open(&image)?;
    file.write_all_at(&bytes, (stale * BLOCK) as u64)?;
    file.sync_all().context("sync")?;
    client.read_back()?;
    ensure!(
        client.tally.mismatches.len() == 1
            && client.tally.mismatches[0].starts_with("block 3 holds Write(0)"),
        "block {stale} is stale, the client says: {:?}",
        client.tally
    );
    ensure!(client.tally.all_well().is_err(), "all well");
    Ok(())
}

/// A daemon on a tap that outlives it.
fn start_net(context: &Context, name: &str, tap: &str) -> Result<Daemon> {
    net::make_tap(tap)?;
    net::bring_up(tap, HOST)?;
    Daemon::net(context, name, tap, &[])
}

/// Frames both ways through a tap while its daemon is killed; QEMU's frontend tracks nothing for a card.
fn net(context: &Context, check: &'static str, tracked: bool, kills: u32) -> Result<()> {
    let name = if tracked { "tracked" } else { "untracked" };
    context.step(format!("start for {check}"));
    let mut daemon = start_net(context, name, name)?;
    let mut card = Card::new(name, tracked)?;
    context.check(check, || {
        let storm = card.storm(&mut daemon, kills);
        fs::write(
            context.log(&format!("{name}-storm")),
            format!("{:#?}\n", card.tally),
        )?;
        card.tally.all_well()?;
        storm?;
        daemon.signal(Signal::Term)?;
        daemon.process_mut().wait_success(seconds(30))
    })
}

/// The same client where a daemon never hears of the frames that its predecessor was given.
fn frames_lost(context: &Context) -> Result<()> {
    let mut daemon = start_net(context, "forgetful", "forgetful")?;
    let mut card = Card::new("forgetful", false)?;
    card.dial(daemon.socket())?;
    card.work(50)?;
    // So that no buffer is under way, and all of them can be given.
    card.settle()?;
    daemon.signal(Signal::Stop)?;
    let given = card.fill()?;
    daemon.kill();
    daemon.start_again()?;
    card.dial_from(daemon.socket(), Ring::avail_idx)?;
    let missing = card.stop()?;
    ensure!(
        given > 0 && missing >= given && card.tally.all_well().is_err(),
        "{given} frames were lost, the client says: {:?}",
        card.tally
    );
    Ok(())
}
