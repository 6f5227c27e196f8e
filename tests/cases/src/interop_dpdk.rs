//! DPDK's testpmd on berth-net, through its virtio-user driver: another vhost-user frontend and driver, and
//! one that polls.
//!
//! testpmd ends by SIGTERM and then prints what it has sent, which the daemon and the host must have seen.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::net::{self, FrameSocket};
use berth_tests_framework::process::{Process, Signal, run};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::wait::{seconds, until};
use serde_json::Value;

use crate::blocks::{self, Content, Damage};

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "testpmd",
    tier: Tier::Client,
    long: false,
    checks: &[
        "testpmd.transmits_64_bytes",
        "testpmd.transmits_1500_bytes",
        "testpmd.echoes_every_frame_once",
    ],
    run: testpmd,
}];

const TAP: &str = "tap0";
/// Frames that testpmd transmits at least.
const FLOOD: u64 = 20_000;
/// Entries of its rings.
const RING: u64 = 256;
/// Frames that it echoes, and how many of them fly at a time.
const ECHOES: u64 = 5_000;
const WINDOW: u64 = 64;
/// Kinds of frames to echo.
const KNOCKING: u64 = 1;
const COUNTED: u64 = 2;
/// Ethernet's header of the frames to echo, of a type for experiments.
const ETHERNET: [u8; 14] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5,
];

fn testpmd(context: &Context) -> Result<()> {
    net::make_tap(TAP)?;
    // No address: nothing but ours comes from the host.
    run("ip", &["link", "set", TAP, "addrgenmode", "none", "up"])?;
    let daemon = Daemon::net(context, "net", TAP, &[])?;
    context.check("testpmd.transmits_64_bytes", || {
        transmits(context, &daemon, "--txpkts=64")
    })?;
    context.check("testpmd.transmits_1500_bytes", || {
        transmits(context, &daemon, "--txpkts=1500")
    })?;
    context.check("testpmd.echoes_every_frame_once", || {
        echoes(context, &daemon)
    })
}

/// Starts testpmd on the daemon; it forwards until SIGTERM.
fn start(context: &Context, name: &str, daemon: &Daemon, more: &[&str]) -> Result<Process> {
    let mut command = command(context);
    let device = format!(
        "--vdev=net_virtio_user0,path={},queues=1",
        daemon.socket().display()
    );
    command.args([&device, "--"]).args(WORK).args(more);
    Process::spawn(name, command, &context.log(name))
}

/// How any testpmd of ours works: few buffers, no questions to a terminal.
pub(crate) const WORK: [&str; 3] = [
    "--total-num-mbufs=4096",
    "--no-lsc-interrupt",
    "--stats-period=1",
];

/// testpmd on one CPU and without large pages; what it drives, and `--`, come next.
pub(crate) fn command(context: &Context) -> Command {
    let installed = Path::new("/usr/bin/dpdk-testpmd");
    let mut command = if installed.exists() {
        Command::new(installed)
    } else {
        let folder = context.asset("dpdk");
        let (lib, mut command) = (
            folder.join("lib"),
            Command::new(folder.join("dpdk-testpmd")),
        );
        let drivers = ["driver.so", "vhost.so", "mempool.so"];
        let preload = drivers.map(|name| lib.join(name).display().to_string());
        // Not --vdev's plugins by -d: DPDK takes none from below a folder that others may write.
        command
            .env("LD_PRELOAD", preload.join(" "))
            .env("LD_LIBRARY_PATH", lib);
        command
    };
    command
        .args(["--lcores", "0@0,1@0", "--no-huge", "-m", "64", "--no-pci"])
        .args(["--no-telemetry", "--no-shconf"]);
    command
}

/// Ends it; the `TX-packets` of its summary.
fn finish(mut process: Process) -> Result<u64> {
    process.signal(Signal::Term)?;
    process.wait_success(seconds(30))?;
    let output = process.output()?;
    output
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("TX-packets:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no summary from {}", process.name()))
}

/// Frames that the host has received from the tap.
fn seen_by_host() -> Result<u64> {
    let links: Value =
        serde_json::from_str(&run("ip", &["-s", "-j", "link", "show", "dev", TAP])?)?;
    links[0]["stats64"]["rx"]["packets"]
        .as_u64()
        .context("no counters of the tap")
}

fn transmits(context: &Context, daemon: &Daemon, size: &str) -> Result<()> {
    let (before, requests) = (seen_by_host()?, daemon.total("berth_requests_total")?);
    let name = format!("testpmd{size}");
    let process = start(context, &name, daemon, &["--forward-mode=txonly", size])?;
    until(&format!("{FLOOD} frames"), seconds(60), || {
        ensure!(process.is_running(), "testpmd ended by itself");
        Ok((seen_by_host()? - before >= FLOOD).then_some(()))
    })?;
    let sent = finish(process)?;
    let seen = seen_by_host()? - before;
    let used = daemon.total("berth_requests_total")? - requests;
    // testpmd disables the rings before it stops them: what is in them then, nobody takes.
    ensure!(
        used == seen && seen <= sent && sent - seen <= RING,
        "testpmd sent {sent} frames, the daemon used {used}, the host saw {seen}"
    );
    Ok(())
}

/// testpmd sends back what it gets, as it is.
fn echoes(context: &Context, daemon: &Daemon) -> Result<()> {
    let socket = FrameSocket::open(TAP)?;
    let before = daemon.total("berth_requests_total")?;
    let process = start(context, "testpmd-echo", daemon, &["--forward-mode=io"])?;
    // Frames of another kind go first, until one is back: some get lost before testpmd is there.
    let mut frame = ETHERNET.to_vec();
    frame.resize(ETHERNET.len() + 256, 0);
    until("testpmd to echo a frame", seconds(60), || {
        ensure!(process.is_running(), "testpmd ended by itself");
        blocks::fill(&mut frame[ETHERNET.len()..], KNOCKING, 1);
        socket.send(&frame)?;
        let came = echo(&socket, KNOCKING, Duration::from_millis(20))?;
        Ok(came.map(drop))
    })?;
    let mut back = vec![false; usize::try_from(ECHOES)?];
    let (mut sent, mut count) = (0, 0);
    while count < ECHOES {
        while sent < ECHOES && sent - count < WINDOW {
            blocks::fill(&mut frame[ETHERNET.len()..], COUNTED, sent + 1);
            socket.send(&frame)?;
            sent += 1;
        }
        let number = echo(&socket, COUNTED, seconds(30))?
            .with_context(|| format!("{} of {sent} frames did not come back", sent - count))?;
        let seen = back
            .get_mut(usize::try_from(number)?)
            .with_context(|| format!("frame {number} was never sent"))?;
        ensure!(!*seen, "frame {number} came back twice");
        (*seen, count) = (true, count + 1);
    }
    finish(process)?;
    let more = echo(&socket, COUNTED, Duration::ZERO)?;
    ensure!(more.is_none(), "frame {more:?} came back twice");
    let requests = daemon.total("berth_requests_total")? - before;
    ensure!(
        requests >= 2 * ECHOES,
        "the daemon counts {requests} requests"
    );
    Ok(())
}

/// The number of the next frame of a kind that comes back, counted from 0.
fn echo(socket: &FrameSocket, kind: u64, limit: Duration) -> Result<Option<u64>> {
    let mut buffer = [0; 2048];
    while let Some(frame) = socket.receive(&mut buffer, limit)? {
        let Some(payload) = frame.strip_prefix(&ETHERNET) else {
            continue;
        };
        match blocks::content(payload, kind) {
            Ok(Content::Write(number)) => return Ok(Some(number - 1)),
            Err(Damage::Misplaced(KNOCKING | COUNTED)) => {}
            other => bail!("a damaged frame: {other:?}"),
        }
    }
    Ok(None)
}
