//! Another program in place of a disk's daemon, under a guest that goes on writing.
//!
//! ```text
//!   QEMU's guest ── writes ──▶ ring        SIGTERM: drained, ends     the new one, on the same socket
//!        │                      │                  │                         │
//!        │        berth-blk ◀───┘ ─────────────────┘      QEMU dials again ──┴──▶ berth-blk
//!        └── waits meanwhile, and sees no error
//! ```
//!
//! The listening socket is the supervisor's (here: ours). It outlives both processes, so that QEMU, which
//! dials every 100 ms, is never refused.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::process::Signal;
use berth_tests_framework::qemu::{Devices, Qemu};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::wait::{seconds, until};

use crate::kill_storm::guest::{add_program, finish_load, start_load};

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "upgrade",
    tier: Tier::Client,
    long: false,
    checks: &["upgrade.guest_writes_on", "upgrade.image_clean"],
    run: upgrade_under_a_guest,
}];

/// How often.
const UPGRADES: u32 = 3;

fn upgrade_under_a_guest(context: &Context) -> Result<()> {
    let (image, contents) = (context.scratch("disk.img"), context.scratch("contents"));
    fs::create_dir(&contents)?;
    add_program(context, &contents)?;
    image::ext4(&image, 128 << 20, &contents)?;
    let settings = BlkSettings {
        queues: 2,
        ..Default::default()
    };
    let mut daemon = Daemon::blk_on_inherited(context, "blk", &image, settings)?;
    let devices = Devices::default().disk("disk", daemon.socket(), 2);
    context.step("boot");
    let mut guest = Qemu::boot(context, "qemu", &devices)?;
    context.check("upgrade.guest_writes_on", || {
        guest.console.sh("mount -t ext4 /dev/vda /mnt")?;
        start_load(&mut guest.console, "/mnt", "/mnt")?;
        let mut longest = Duration::ZERO;
        for _ in 0..UPGRADES {
            longest = longest.max(upgrade(&mut daemon)?);
        }
        finish_load(&mut guest.console)?;
        println!(
            "upgrade: longest pause of {UPGRADES} under QEMU {longest:.1?}, until the next answers"
        );
        Ok(())
    })?;
    context.check("upgrade.image_clean", || {
        guest.console.sh("umount /mnt")?;
        guest.power_off()?;
        image::require_clean(&image)
    })
}

/// From the end of one process, which works, to the first answer of the next.
fn upgrade(daemon: &mut Daemon) -> Result<Duration> {
    works(daemon, 50)?;
    let begin = Instant::now();
    daemon.signal(Signal::Term)?;
    daemon.process_mut().wait_success(seconds(30))?;
    daemon.start_again()?;
    works(daemon, 1)?;
    Ok(begin.elapsed())
}

/// Waits until this process has answered `count` requests, none of them with an error.
fn works(daemon: &Daemon, count: u64) -> Result<()> {
    until("requests to be answered", seconds(60), || {
        Ok((daemon.total("berth_requests_total")? >= count).then_some(()))
    })?;
    let errors = daemon.total("berth_errors_total")?;
    ensure!(errors == 0, "{errors} requests failed");
    Ok(())
}
