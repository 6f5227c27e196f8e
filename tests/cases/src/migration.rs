//! QEMU live-migrates a guest under load: two QEMUs, two pairs of our daemons, one image.
//!
//! ```text
//!   source QEMU ── berth-blk ──┐          ┌── berth-blk ── destination QEMU
//!        │  └───── berth-net   └─ image ──┘   berth-net ──────┘   │
//!        │            tap0                       tap1             │
//!        └───────────── memory over a socket, pass by pass ───────┘
//! ```
//!
//! What a device writes into guest memory, QEMU knows only from the daemons' dirty logs. So that nothing
//! else marks these pages: files are read into the guest's page cache while the passes go on, by a kernel
//! that does not clear pages first (`init_on_alloc=0`), and are compared after the switch from the cache.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::net::{FrameSocket, PageServer};
use berth_tests_framework::process::run;
use berth_tests_framework::qemu::{Devices, Qemu, Settings};
use berth_tests_framework::qmp::Qmp;
use berth_tests_framework::relay::Relay;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, BOOT_LIMIT};
use berth_tests_framework::wait::{seconds, until};
use serde_json::{Value, json};

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "migration",
    tier: Tier::Client,
    long: false,
    checks: &[
        "migration.done_under_load",
        "migration.page_cache_as_read",
        "migration.memory_as_written",
        "migration.load_goes_on",
        "migration.card_announces_itself",
        "migration.transfers_whole",
        "migration.image_as_written",
    ],
    run: migrate_under_load,
}];

const HOST: Ipv4Addr = Ipv4Addr::new(10, 61, 4, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 61, 4, 2);
const MAC: &str = "52:54:00:be:47:04";
/// Ethernet's types.
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const HOST_MAC: &str = "52:54:00:be:47:84";
/// Files that are read during the migration, and their size.
const FILES: u64 = 16;
const FILE_BYTES: u64 = 4 << 20;

/// One side: the daemons and QEMU's view of them.
struct Side {
    _daemons: [Daemon; 2],
    devices: Devices,
}

impl Side {
    fn start(context: &Context, name: &str, tap: &str, image: &Path) -> Result<Self> {
        let settings = BlkSettings {
            queues: 2,
            more: &["--lock=running"],
            ..Default::default()
        };
        let blk = Daemon::blk(context, &format!("{name}-blk"), image, settings)?;
        let more = ["--create".to_owned()];
        let net = Daemon::net(context, &format!("{name}-net"), tap, &more)?;
        // The guest meets the same neighbour on its new wire.
        run("ip", &["link", "set", tap, "address", HOST_MAC, "up"])?;
        let devices =
            Devices::default()
                .disk("disk", blk.socket(), 2)
                .net("card", net.socket(), MAC);
        Ok(Self {
            _daemons: [blk, net],
            devices,
        })
    }
}

fn migrate_under_load(context: &Context) -> Result<()> {
    let image = context.scratch("disk.img");
    let sums = make_image(context, &image)?;
    let page = context.scratch("page");
    image::random(&page, 1 << 20, 77)?;

    context.step("start the daemons of both sides");
    let here = Side::start(context, "source", "tap0", &image)?;
    let there = Side::start(context, "destination", "tap1", &image)?;
    run("ip", &["addr", "add", &format!("{HOST}/32"), "dev", "lo"])?;
    route_to("tap0")?;
    let server = PageServer::start(HOST, &page)?;

    context.step("boot the source");
    let append = "init_on_alloc=0";
    let settings = Settings {
        append,
        ..Default::default()
    };
    let mut source = Qemu::start(context, "source", &here.devices, &settings)?;
    source.console.wait_ready(BOOT_LIMIT)?;
    vmm::bring_up(&mut source.console, "eth0", GUEST)?;
    context.step("start the load");
    start_load(&mut source.console, &server.url())?;

    context.step("start the destination");
    let (socket, relayed) = (context.scratch("migration"), context.scratch("relayed"));
    let settings = Settings {
        append,
        incoming: true,
    };
    let mut target = Qemu::start(context, "destination", &there.devices, &settings)?;
    listen(&mut target.control()?, &socket)?;
    let relay = Relay::start(&relayed, &socket)?;
    let announcements = [ARP, RARP].map(|kind| FrameSocket::of_type("tap1", kind));
    let announcements = announcements.into_iter().collect::<Result<Vec<_>>>()?;
    context.check("migration.done_under_load", || {
        let mut control = source.control()?;
        migrate(&mut control, &mut source.console, &relayed, &relay)
    })?;
    route_to("tap1")?;

    let console = &mut target.console;
    context.check("migration.page_cache_as_read", || {
        // The files are still in the page cache: nothing is read again.
        let seen = console.sh("cd /mnt/fixed && md5sum *")?;
        ensure!(seen == sums, "files in the page cache: {seen}\nnot {sums}");
        Ok(())
    })?;
    context.check("migration.load_goes_on", || goes_on(console))?;
    context.check("migration.card_announces_itself", || {
        announced(&announcements)
    })?;
    context.step("stop the load");
    console.sh("touch /tmp/stop")?;
    until("end of the load", seconds(60), || {
        Ok(console.run("test -e /tmp/stopped")?.rc == 0).map(|done| done.then_some(()))
    })?;
    context.check("migration.memory_as_written", || {
        console.sh("cd /dev/shm && md5sum -c sums").map(drop)
    })?;
    context.check("migration.transfers_whole", || whole(console, &page))?;
    context.check("migration.image_as_written", || {
        written(&mut target.console, &sums)?;
        target.power_off()?;
        drop(there);
        // The source's QEMU and daemons are still there, and have let the image go.
        ensure!(source.process.is_running(), "the source ended");
        run("qemu-io", &["-f", "raw", "-c", "write 0 0", text(&image)?])?;
        image::require_clean(&image)
    })
}

/// Every page that the guest has fetched is the one that was served.
fn whole(console: &mut Console, page: &Path) -> Result<()> {
    let sum = image::md5(page)?;
    let seen = console.sh("sort /tmp/pages | uniq -c")?;
    let words: Vec<_> = seen.split_whitespace().collect();
    // One line: how often, which sum, and md5sum's name for its input.
    ensure!(
        words.get(1) == Some(&sum.as_str()) && words.len() == 3,
        "sums of pages, not {sum}: {}",
        seen.replace('\n', "; ")
    );
    Ok(())
}

/// What was written on both sides is on the disk.
fn written(console: &mut Console, sums: &str) -> Result<()> {
    console.sh("echo 3 >/proc/sys/vm/drop_caches; cd /mnt/written && md5sum -c sums")?;
    let seen = console.sh("cd /mnt/fixed && md5sum *")?;
    ensure!(seen == sums, "files on the image: {seen}\nnot {sums}");
    console.sh("umount /mnt").map(drop)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
}

/// The files that are read during the migration; what md5sum says of them.
fn make_image(context: &Context, image: &Path) -> Result<String> {
    let tree = context.scratch("tree");
    let fixed = tree.join("fixed");
    std::fs::create_dir_all(&fixed)?;
    std::fs::create_dir(tree.join("written"))?;
    let mut sums = String::new();
    for n in 0..FILES {
        let name = format!("{n:02}");
        image::random(&fixed.join(&name), FILE_BYTES, 1001 + 2 * n)?;
        sums += &format!("{}  {name}\n", image::md5(&fixed.join(&name))?);
    }
    image::ext4(image, 160 << 20, &tree)?;
    Ok(sums)
}

/// Frames to the guest go out on `tap`.
fn route_to(tap: &str) -> Result<()> {
    let guest = format!("{GUEST}/32");
    let source = HOST.to_string();
    let words = ["route", "replace", &guest, "dev", tap, "src", &source];
    run("ip", &words).map(drop)
}

/// Three loops in the guest, until /tmp/stop: memory is written and summed, and goes to the disk and is
/// summed there; pages come by HTTP; and, once /tmp/read is there, the disk's files are read, each once.
/// Returns when the first two turn.
fn start_load(console: &mut Console, url: &str) -> Result<()> {
    let load = format!(
        "mount -t ext4 /dev/vda /mnt && cat >/tmp/memory <<'END'
n=0
while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    file=$((n % 8))
    dd if=/dev/urandom of=/dev/shm/$file bs=64k count=8 2>/dev/null
    cp /dev/shm/$file /mnt/written/$file
    dd if=/dev/shm/$file of=/mnt/written/direct bs=64k count=8 oflag=direct conv=notrunc 2>/dev/null
    echo $n >/tmp/rounds
done
(cd /dev/shm && md5sum 0 1 2 3 4 5 6 7 >sums)
cp /dev/shm/sums /mnt/written/sums
sync
touch /tmp/stopped
END
cat >/tmp/pages.sh <<'END'
while [ ! -e /tmp/stop ]; do
    if wget -q -O /tmp/page {url}; then md5sum </tmp/page; fi >>/tmp/pages 2>>/tmp/complaints
done
END
cat >/tmp/files.sh <<'END'
until [ -e /tmp/read ]; do usleep 20000; done
for file in /mnt/fixed/*; do cat $file >/dev/null; done
touch /tmp/files-read
END
for script in memory pages.sh files.sh; do setsid sh /tmp/$script </dev/null >/dev/null 2>&1 & done"
    );
    console.sh(&load)?;
    until("the load to turn", seconds(60), || {
        let ready = console.run("[ $(cat /tmp/rounds) -ge 8 ] && [ -s /tmp/pages ]")?;
        Ok((ready.rc == 0).then_some(()))
    })
}

/// Has the guest read the files between the passes of a migration that may not end; then lets it end.
///
/// The source ends it only with the destination's consent (switchover-ack), which the relay holds back.
fn migrate(control: &mut Qmp, console: &mut Console, socket: &Path, relay: &Relay) -> Result<()> {
    let passes = |state: &Value| state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
    let uri = format!("unix:{}", socket.display());
    control.run("migrate-set-capabilities", consent())?;
    control.run("migrate", json!({ "uri": uri }))?;
    // All of memory has been sent once.
    control.wait_migration(
        "the first pass",
        seconds(90),
        |state| Ok(passes(state) >= 2),
    )?;
    console.sh("touch /tmp/read")?;
    until("files to be read", seconds(90), || {
        Ok((console.run("test -e /tmp/files-read")?.rc == 0).then_some(()))
    })?;
    let state = control.run("query-migrate", json!({}))?;
    ensure!(state["status"] == "active", "over too early: {state}");
    relay.release();
    control.wait_migration("end of the migration", seconds(90), |state| {
        Ok(state["status"] == "completed")
    })?;
    Ok(())
}

/// The destination waits for a guest on `socket`.
fn listen(control: &mut Qmp, socket: &Path) -> Result<()> {
    control.run("migrate-set-capabilities", consent())?;
    let uri = format!("unix:{}", socket.display());
    control
        .run("migrate-incoming", json!({ "uri": uri }))
        .map(drop)
}

/// Capabilities of both sides.
fn consent() -> Value {
    let on = |name: &str| json!({"capability": name, "state": true});
    json!({"capabilities": [on("return-path"), on("switchover-ack")]})
}

/// Memory and disk are written on the destination, and pages come through its card.
fn goes_on(console: &mut Console) -> Result<()> {
    let counts = console.sh("cat /tmp/rounds; wc -l </tmp/pages")?;
    let counts: Result<Vec<u64>, _> = counts.split_whitespace().map(str::parse).collect();
    let [rounds, pages] = counts?[..] else {
        bail!("the load counts nothing");
    };
    until("rounds and pages after the switch", seconds(60), || {
        let more = format!(
            "[ $(cat /tmp/rounds) -gt {} ] && [ $(wc -l </tmp/pages) -gt {} ]",
            rounds + 2,
            pages + 1
        );
        Ok((console.run(&more)?.rc == 0).then_some(()))
    })
}

/// The guest said on its new wire where it is: a gratuitous ARP, or a RARP by the daemon.
fn announced(frames: &[FrameSocket]) -> Result<()> {
    let mut buffer = [0; 2048];
    until("an announcement", seconds(30), || {
        for socket in frames {
            while let Some(frame) = socket.receive(&mut buffer, Duration::ZERO)? {
                if is_announcement(frame) {
                    return Ok(Some(()));
                }
            }
        }
        Ok(None)
    })
}

fn is_announcement(frame: &[u8]) -> bool {
    if frame.len() < 42 {
        return false;
    }
    match u16::from_be_bytes([frame[12], frame[13]]) {
        RARP => true,
        // Sender and target are the guest.
        ARP => frame[28..32] == GUEST.octets() && frame[38..42] == GUEST.octets(),
        _ => false,
    }
}
