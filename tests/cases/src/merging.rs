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
pub const STORIES: &[Story] = &[Story {
    name: "merging",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "merging.two_guests_with_disks_share_pages",
        "merging.eligible_is_not_advised",
        "merging.a_write_stays_in_its_guest",
    ],
    run: two_guests,
}];

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
