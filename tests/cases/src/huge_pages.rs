//! Huge pages under real guests: reserved ones, transparent ones, and what of them goes back to the host. (`thp=off` and
//! `prefault=on` need no guest to be counted: `vmm/tests/memory_modes.rs`.)
//!
//! Counted where they are: the pool's free pages, and `AnonHugePages` of the mapping that is guest memory.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};

use crate::balloon;
use crate::memory::mapping;

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "huge-pages",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "memory.too_few_huge_pages_are_one_line",
            "memory.reserved_huge_pages",
            "balloon.huge_pages_go_back_whole",
            "balloon.huge_pages_come_back",
        ],
        run: reserved,
    },
    Story {
        name: "transparent-huge-pages",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "memory.thp_on",
            "balloon.transparent_huge_pages_go_back_whole",
        ],
        run: transparent,
    },
];

const MIB: u64 = 1 << 20;
const HUGE_PAGE: u64 = 2 * MIB;
/// Memory of the guests.
const SIZE_MIB: u64 = 320;
const SIZE: u64 = SIZE_MIB * MIB;
/// What they fill.
const PIECE_MIB: u64 = 160;
/// What the balloon takes.
const BALLOON: u64 = 128 * MIB;

/// The host's pool of pages of 2 MiB; what it was is back when this is dropped.
struct Pool {
    before: String,
}

impl Pool {
    fn path(name: &str) -> PathBuf {
        PathBuf::from("/sys/kernel/mm/hugepages/hugepages-2048kB").join(name)
    }

    fn read(name: &str) -> Result<String> {
        let path = Self::path(name);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// The pool as it is.
    fn found() -> Result<Self> {
        Ok(Self {
            before: Self::read("nr_hugepages")?,
        })
    }

    /// Has the pool hold `count` pages that nobody has.
    fn set(&self, count: u64) -> Result<()> {
        let before: u64 = self.before.trim().parse()?;
        ensure!(before == 0, "{before} huge pages are reserved already");
        fs::write(Self::path("nr_hugepages"), count.to_string())?;
        let free = Self::free()?;
        ensure!(free == count, "{free} of {count} huge pages are there");
        Ok(())
    }

    fn free() -> Result<u64> {
        Ok(Self::read("free_hugepages")?.trim().parse()?)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = fs::write(Self::path("nr_hugepages"), self.before.trim());
    }
}

fn reserved(context: &Context) -> Result<()> {
    let pool = Pool::found()?;
    let pages = SIZE / HUGE_PAGE;
    context.check("memory.too_few_huge_pages_are_one_line", || {
        pool.set(pages / 2)?;
        too_few(context)
    })?;
    pool.set(pages)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .memory(&format!("{SIZE_MIB}M,hugepages=on,hugepage_size=2M"))
        .device("--balloon", "size=0")
        .boot(context)?;
    context.check("memory.reserved_huge_pages", || {
        let memory = mapping(&vm.process, SIZE)?;
        let page = memory.bytes("KernelPageSize")?;
        ensure!(page == HUGE_PAGE, "pages of {page} bytes");
        balloon::fill(&mut vm, PIECE_MIB)?;
        let taken = pages - Pool::free()?;
        ensure!(taken * HUGE_PAGE > PIECE_MIB * MIB, "{taken} pages taken");
        balloon::free(&mut vm)
    })?;
    context.check("balloon.huge_pages_go_back_whole", || whole(context, &vm))?;
    context.check("balloon.huge_pages_come_back", || {
        balloon::resize(&vm, 0)?;
        balloon::wait_actual(&vm, 0)?;
        balloon::is_good(&mut vm, PIECE_MIB)?;
        vm.power_off()?;
        until("all huge pages in the pool", seconds(30), || {
            Ok((Pool::free()? == pages).then_some(()))
        })
    })
}

/// Without enough of them the VMM says so, and how to reserve them.
fn too_few(context: &Context) -> Result<()> {
    let output = Command::new(context.bin("berth-vmm"))
        .arg("--kernel")
        .arg(context.asset("vmlinux"))
        .args(["--serial=null", "--memory"])
        .arg(format!("size={SIZE_MIB}M,hugepages=on,hugepage_size=2M"))
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = format!("vm.nr_hugepages={}", SIZE / HUGE_PAGE);
    ensure!(
        output.status.code() == Some(1) && said.lines().count() == 1 && said.contains(&expected),
        "{}: {said}",
        output.status
    );
    Ok(())
}

/// A huge page of which the guest gave all is in the pool again, and of no other any part is.
fn whole(context: &Context, vm: &Vm) -> Result<()> {
    let counter = |name: &str| -> Result<u64> {
        let counters = vm.counters()?;
        counters["_balloon"][name].as_u64().context("a counter")
    };
    let before = Pool::free()?;
    balloon::resize(vm, BALLOON)?;
    balloon::wait_actual(vm, BALLOON)?;
    let (calls, bytes) = (counter("discards")?, counter("discarded_bytes")?);
    let back = (Pool::free()? - before) * HUGE_PAGE;
    let figures = serde_json::json!({
        "inflated_mib": BALLOON / MIB,
        "discarded_mib": bytes / MIB,
        "back_in_the_pool_mib": back / MIB,
        "discards": calls,
    });
    balloon::note(context, "huge-pages", &figures)?;
    // Linux gives a block of 4 MiB page by page before it begins the next: most are whole in the end.
    ensure!(
        bytes % HUGE_PAGE == 0 && (BALLOON / 2..=BALLOON).contains(&bytes),
        "{figures}"
    );
    // What was never touched was in the pool before.
    ensure!(0 < back && back <= bytes, "{figures}");
    ensure!(counter("discards_failed")? == 0, "{figures}");
    Ok(())
}

fn transparent(context: &Context) -> Result<()> {
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .memory(&format!("{SIZE_MIB}M,shared=off,thp=on"))
        .device("--balloon", "free_page_reporting=on")
        .boot(context)?;
    let sizes = |vm: &Vm| -> Result<(u64, u64)> {
        let memory = mapping(&vm.process, SIZE)?;
        Ok((memory.bytes("Rss")?, memory.bytes("AnonHugePages")?))
    };
    let mut full = (0, 0);
    context.check("memory.thp_on", || {
        balloon::fill(&mut vm, PIECE_MIB)?;
        full = sizes(&vm)?;
        let (present, huge) = full;
        ensure!(
            huge >= PIECE_MIB * MIB / 2,
            "{huge} of {present} bytes are in huge pages"
        );
        Ok(())
    })?;
    context.check("balloon.transparent_huge_pages_go_back_whole", || {
        balloon::free(&mut vm)?;
        let most = full.0 - PIECE_MIB * MIB / 10 * 9;
        let (present, huge) = until("freed memory at the host", seconds(120), || {
            let now = sizes(&vm)?;
            Ok((now.0 <= most).then_some(now))
        })?;
        let figures = serde_json::json!({
            "present_mib": [full.0 / MIB, present / MIB],
            "in_huge_pages_mib": [full.1 / MIB, huge / MIB],
        });
        balloon::note(context, "transparent", &figures)?;
        // A huge page of which a part had gone would be small pages from then on.
        let (small_before, small) = (full.0 - full.1, present - huge);
        ensure!(small <= small_before + 4 * MIB, "{figures}");
        vm.power_off()
    })
}
