//! Pages of guests with disks are merged: KSM over two guests in window mode that have the same contents, and a third
//! that is eligible and that nobody told the kernel of.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::process::Process;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "merging",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "merging.two_guests_with_disks_share_pages",
            "merging.eligible_is_not_advised",
            "merging.a_write_stays_in_its_guest",
        ],
        run: two_guests,
    },
    Story {
        name: "merging-kernel",
        tier: Tier::Guest,
        long: true,
        checks: &["merging.kernel_above_the_window_is_shared"],
        run: kernels,
    },
];

const KSM: &str = "/sys/kernel/mm/ksm";
/// Contents that both guests have in memory beside their kernels: pages of it are all different.
const SAME: u64 = 48 << 20;
const PAGE: u64 = 4096;

/// KSM as it was is back when this is dropped.
struct Ksm {
    before: Vec<(&'static str, String)>,
}

impl Ksm {
    /// Has it look at many pages at once.
    fn hurry() -> Result<Self> {
        let mut ksm = Self { before: Vec::new() };
        for (knob, value) in [
            ("pages_to_scan", "20000"),
            ("sleep_millisecs", "20"),
            ("run", "1"),
        ] {
            let path = format!("{KSM}/{knob}");
            let old = fs::read_to_string(&path).with_context(|| path.clone())?;
            ksm.before.push((knob, old));
            fs::write(&path, value).with_context(|| path.clone())?;
        }
        Ok(ksm)
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (knob, value) in self.before.iter().rev() {
            // There is nobody to tell.
            let _ = fs::write(format!("{KSM}/{knob}"), value.trim());
        }
    }
}

/// Pages of a process that are merged with others.
fn merged_pages(process: &Process) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/ksm_stat", process.pid()))?;
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("ksm_merging_pages"))
        .with_context(|| format!("ksm_stat: {stat:?}"))?;
    Ok(line.trim().parse()?)
}

/// A guest with a disk of its own, of which it has a copy in memory beside its page cache.
fn guest(context: &Context, name: &str, mergeable: &str, data: &Path) -> Result<(Vm, Daemon)> {
    let read_only = BlkSettings {
        read_only: true,
        ..Default::default()
    };
    let daemon = Daemon::blk(context, &format!("blk-{name}"), data, read_only)?;
    let mut vm = VmBuilder::new(context, name)
        .memory(&format!("512M,mergeable={mergeable}"))
        .disk(daemon.socket(), ",readonly=on")
        .boot(context)?;
    vm.sh("mkdir -p /tmp/t && mount -t tmpfs t /tmp/t && cp /dev/vda /tmp/t/data")?;
    Ok((vm, daemon))
}

fn two_guests(context: &Context) -> Result<()> {
    let data = context.scratch("data");
    image::random(&data, SAME, 3)?;
    let sum = image::md5(&data)?;
    context.step("boot");
    let (mut one, _disk_one) = guest(context, "one", "always", &data)?;
    let (mut two, _disk_two) = guest(context, "two", "always", &data)?;
    let (mut quiet, _disk_quiet) = guest(context, "quiet", "on", &data)?;
    let _ksm = Ksm::hurry()?;

    context.check("merging.two_guests_with_disks_share_pages", || {
        // As many as one of the copies has, nearly; some of either may be in the window.
        let enough = SAME / PAGE / 10 * 9;
        let pages = until("merged pages in both guests", seconds(120), || {
            let pages = [merged_pages(&one.process)?, merged_pages(&two.process)?];
            Ok(pages.iter().all(|&pages| pages >= enough).then_some(pages))
        })?;
        let line = format!("merged pages of each guest: {pages:?}\n");
        fs::write(context.log("pages"), line)?;
        Ok(())
    })?;
    context.check("merging.eligible_is_not_advised", || {
        let pages = merged_pages(&quiet.process)?;
        ensure!(pages == 0, "{pages} pages of a guest that nobody advised");
        ensure!(quiet.sh("md5sum </tmp/t/data")?.starts_with(&sum));
        Ok(())
    })?;
    context.check("merging.a_write_stays_in_its_guest", || {
        let before = merged_pages(&one.process)?;
        one.sh("dd if=/dev/zero of=/tmp/t/data bs=1M count=24 conv=notrunc 2>/dev/null")?;
        let seen = two.sh("md5sum </tmp/t/data")?;
        ensure!(seen.starts_with(&sum), "the other guest has {seen}");
        ensure!(before > 0, "nothing was merged to write to");
        Ok(())
    })
}

/// Passes of KSM over all memory from now on that make what is merged stay the same: it takes two to find a page, and one
/// more for what the guests did meanwhile.
const PASSES: u64 = 4;

fn passes() -> Result<u64> {
    let path = format!("{KSM}/full_scans");
    let text = fs::read_to_string(&path).context(path)?;
    Ok(text.trim().parse()?)
}

/// Two guests that do nothing, with kernel and initramfs loaded above the window, and two with both in it (`entry=pvh`): what
/// of each is merged, once KSM has seen all of it.
fn kernels(context: &Context) -> Result<()> {
    let data = context.scratch("data");
    image::random(&data, 1 << 20, 3)?;
    let ksm = Ksm::hurry()?;
    let merged = |entry: &str| -> Result<[u64; 2]> {
        context.step("boot");
        let boot = |number: usize| -> Result<(Vm, Daemon)> {
            let name = format!("{entry}-{number}");
            let read_only = BlkSettings {
                read_only: true,
                ..Default::default()
            };
            let daemon = Daemon::blk(context, &format!("blk-{name}"), &data, read_only)?;
            let vm = VmBuilder::new(context, &name)
                .kernel(format!(
                    "{},entry={entry}",
                    context.asset("vmlinux").display()
                ))
                .memory("512M,mergeable=always")
                .disk(daemon.socket(), ",readonly=on")
                .boot(context)?;
            Ok((vm, daemon))
        };
        let guests = [boot(1)?, boot(2)?];
        context.step("let KSM see all of it");
        let end = passes()? + PASSES;
        until("passes of KSM", seconds(300), || {
            Ok((passes()? >= end).then_some(()))
        })?;
        let [one, two] = &guests;
        Ok([merged_pages(&one.0.process)?, merged_pages(&two.0.process)?])
    };
    context.check("merging.kernel_above_the_window_is_shared", || {
        let above = merged("linux64")?;
        let below = merged("pvh")?;
        let figures = serde_json::json!({"above_the_window": above, "in_the_window": below});
        crate::balloon::note(context, "kernel", &figures)?;
        // Text, constants and initramfs of two equal guests: 10 MiB at the least.
        let more = above[0].saturating_sub(below[0]);
        ensure!(more > (10 << 20) / PAGE, "{figures}");
        Ok(())
    })?;
    drop(ksm);
    Ok(())
}
