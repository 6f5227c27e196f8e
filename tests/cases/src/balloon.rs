//! Memory that a guest gives back: the balloon, its statistics, reporting, and what happens when the guest wants it again.
//!
//! What the host has back is counted where it was: in the resident memory of the VMM's process, which is all that a
//! guest without daemons has.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Memory of the guest that lends, and what it fills, frees and gives: more than the half of what Linux leaves of it, so that
/// what is given cannot all be pages that were never touched, and less than Linux gives: with transparent huge pages it keeps
/// 45 MiB of two zones free, whoever asks.
const LENDER_MIB: u64 = 384;
const PIECE_MIB: u64 = 208;
const PIECE: u64 = PIECE_MIB * MIB;
/// What it fills again when it has it back, and compares.
const AGAIN_MIB: u64 = 112;
/// How long a guest may take for any of it in an emulated host.
const LIMIT: Duration = seconds(120);

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "balloon",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "balloon.stats",
            "balloon.inflates",
            "balloon.deflates",
            "balloon.deflates_on_oom",
            "balloon.after_a_reboot",
        ],
        run: lends,
    },
    Story {
        name: "reporting",
        tier: Tier::Guest,
        long: false,
        checks: &["balloon.reporting_1_gib", "balloon.reported_pages_are_good"],
        run: |context| reports(context, &PRIVATE),
    },
    Story {
        name: "reporting_shared",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "balloon.reporting_shared",
            "balloon.reported_shared_pages_are_good",
        ],
        run: |context| reports(context, &SHARED),
    },
];

/// A guest that reports its free pages.
struct Reporter {
    memory: &'static str,
    append: &'static str,
    /// What it fills and frees.
    freed_mib: u64,
    checks: [&'static str; 2],
}

const PRIVATE: Reporter = Reporter {
    memory: "1536M",
    append: "",
    freed_mib: 1024,
    checks: ["balloon.reporting_1_gib", "balloon.reported_pages_are_good"],
};

/// This one fills its free pages with zeros and says so: that is what it gets back.
const SHARED: Reporter = Reporter {
    memory: "384M,shared=on",
    append: "init_on_free=1",
    freed_mib: PIECE_MIB,
    checks: [
        "balloon.reporting_shared",
        "balloon.reported_shared_pages_are_good",
    ],
};

/// Resident memory of the VMM.
fn resident(vm: &Vm) -> Result<u64> {
    let path = format!("/proc/{}/status", vm.process.pid());
    let status = fs::read_to_string(&path).context(path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no VmRSS")?.parse::<u64>()? * 1024)
}

/// Bytes that the memfd of guest memory takes.
fn memfd(vm: &Vm) -> Result<u64> {
    for entry in fs::read_dir(format!("/proc/{}/fd", vm.process.pid()))? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:berth-guest") {
            return Ok(fs::metadata(&path)?.blocks() * 512);
        }
    }
    anyhow::bail!("the VMM has no memfd of guest memory")
}

/// Has the guest write to memory.
pub(crate) fn fill(vm: &mut Vm, mib: u64) -> Result<()> {
    let script = format!(
        "mkdir -p /tmp/f; mount -t tmpfs -o size=95% f /tmp/f &&
         dd if=/dev/urandom of=/tmp/f/a bs=1M count=16 2>/dev/null &&
         for i in $(seq {}); do cat /tmp/f/a >>/tmp/f/all || exit 1; done",
        mib / 16 - 1
    );
    vm.console.sh_within(&script, LIMIT)?;
    Ok(())
}

pub(crate) fn free(vm: &mut Vm) -> Result<()> {
    vm.sh("umount /tmp/f").map(drop)
}

/// What the guest fills holds.
pub(crate) fn is_good(vm: &mut Vm, mib: u64) -> Result<()> {
    fill(vm, mib)?;
    let script = format!(
        "set -e; for i in $(seq 0 {}); do
            dd if=/tmp/f/all bs=16M skip=$i count=1 2>/dev/null | cmp - /tmp/f/a; done; umount /tmp/f",
        mib / 16 - 2
    );
    vm.console.sh_within(&script, LIMIT).map(drop)
}

pub(crate) fn resize(vm: &Vm, bytes: u64) -> Result<()> {
    let answer = vm
        .api
        .put_json("vm.resize", &json!({ "desired_balloon": bytes }))?;
    ensure!(
        answer.status == 204,
        "vm.resize: {} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

fn balloon(vm: &Vm) -> Result<Value> {
    Ok(vm.api.get("vm.info")?["balloon"].clone())
}

fn actual(vm: &Vm) -> Result<u64> {
    balloon(vm)?["actual"].as_u64().context("no actual size")
}

pub(crate) fn wait_actual(vm: &Vm, bytes: u64) -> Result<()> {
    let mut last = Value::Null;
    let reached = until(&format!("a balloon of {bytes} bytes"), LIMIT, || {
        last = balloon(vm)?;
        Ok((last["actual"] == bytes).then_some(()))
    });
    reached.with_context(|| format!("the balloon is {last}"))
}

/// Waits until a size is at most so much, and says how long it took.
fn wait_below(what: &str, most: u64, size: impl Fn() -> Result<u64>) -> Result<Duration> {
    let begin = Instant::now();
    until(
        &format!("{what} of at most {} MiB", most / MIB),
        LIMIT,
        || Ok((size()? <= most).then_some(())),
    )?;
    Ok(begin.elapsed())
}

/// Figures for whoever wonders, beside the logs.
pub(crate) fn note(context: &Context, name: &str, figures: &Value) -> Result<()> {
    let path = context.log(name).with_extension("figures.json");
    Ok(fs::write(path, format!("{figures:#}\n"))?)
}

fn lends(context: &Context) -> Result<()> {
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .memory(&format!("{LENDER_MIB}M,shared=on"))
        .device("--balloon", "size=0,deflate_on_oom=on")
        .boot(context)?;
    context.check("balloon.stats", || stats(&vm))?;
    context.check("balloon.inflates", || inflates(context, &mut vm))?;
    context.check("balloon.deflates", || {
        resize(&vm, 0)?;
        wait_actual(&vm, 0)?;
        is_good(&mut vm, AGAIN_MIB)
    })?;
    context.check("balloon.deflates_on_oom", || deflates_on_oom(&mut vm))?;
    context.check("balloon.after_a_reboot", || {
        resize(&vm, 32 * MIB)?;
        vm.reboot()?;
        wait_actual(&vm, 32 * MIB)?;
        vm.power_off()
    })
}

/// A 6.12 guest tells all of its tags, and tells them anew as long as somebody asks.
fn stats(vm: &Vm) -> Result<()> {
    let told = |vm: &Vm| -> Result<u64> {
        let updates = &vm.counters()?["_balloon"]["stats_updates"];
        updates.as_u64().context("no counter of updates")
    };
    let first = told(vm)?;
    until("two more updates of the statistics", LIMIT, || {
        balloon(vm)?;
        Ok((told(vm)? >= first + 2).then_some(()))
    })?;
    let balloon = balloon(vm)?;
    let stats = balloon["stats"].as_object().context("no statistics")?;
    ensure!(stats.len() == 16, "{} statistics: {balloon}", stats.len());
    let stat = |name: &str| stats[name].as_u64().unwrap_or_default();
    let total = stat("total_memory");
    let most = LENDER_MIB * MIB;
    ensure!((PIECE..=most).contains(&total), "{balloon}");
    let (free, available) = (stat("free_memory"), stat("available_memory"));
    ensure!(
        0 < available && free <= total && available <= total,
        "{balloon}"
    );
    ensure!(stat("minor_faults") > 0, "{balloon}");
    let info = vm.api.get("vm.info")?;
    ensure!(info["memory_actual_size"] == most, "{info}");
    Ok(())
}

fn inflates(context: &Context, vm: &mut Vm) -> Result<()> {
    let free_at_first = balloon(vm)?["stats"]["free_memory"].as_u64();
    let free_at_first = free_at_first.context("no free memory")?;
    fill(vm, PIECE_MIB)?;
    free(vm)?;
    let before = (resident(vm)?, memfd(vm)?);
    let calls = |vm: &Vm| -> Result<u64> {
        let discards = &vm.counters()?["_balloon"]["discards"];
        discards.as_u64().context("no counter of discards")
    };
    let first = calls(vm)?;
    resize(vm, PIECE)?;
    wait_actual(vm, PIECE)?;
    let info = vm.api.get("vm.info")?;
    let left = LENDER_MIB * MIB - PIECE;
    ensure!(info["memory_actual_size"] == left, "{info}");
    // So much of what was given had been filled before, whichever pages the guest took; a little may be touched meanwhile.
    let touched = (2 * PIECE).saturating_sub(free_at_first);
    let gone = touched.saturating_sub(16 * MIB);
    ensure!(gone > 32 * MIB, "{free_at_first} bytes free at first");
    wait_below("resident memory", before.0 - gone, || resident(vm))?;
    wait_below("a memfd", before.1 - gone, || memfd(vm))?;
    let figures = json!({
        "free_at_first_mib": free_at_first / MIB,
        "resident_mib": [before.0 / MIB, resident(vm)? / MIB],
        "memfd_mib": [before.1 / MIB, memfd(vm)? / MIB],
        "inflated_mib": PIECE_MIB,
        "discards": calls(vm)? - first,
    });
    note(context, "inflate", &figures)
}

/// A guest that wants more than is free takes pages back, and nothing in it is killed.
fn deflates_on_oom(vm: &mut Vm) -> Result<()> {
    resize(vm, PIECE)?;
    wait_actual(vm, PIECE)?;
    let script = "set -e; mkdir -p /tmp/f; mount -t tmpfs -o size=95% f /tmp/f
        free=$(awk '/^MemFree/ { print int($2 / 1024) }' /proc/meminfo)
        dd if=/dev/zero of=/tmp/f/all bs=1M count=$((free + 16)) 2>/dev/null
        grep -x 'oom_kill 0' /proc/vmstat";
    vm.console.sh_within(script, LIMIT)?;
    let held = actual(vm)?;
    ensure!(
        held < PIECE,
        "the guest still holds {held} bytes of its own memory back"
    );
    resize(vm, 0)?;
    wait_actual(vm, 0)?;
    free(vm)
}

/// What the guest frees is the host's again, without being asked for, and what it gets for it is as good.
fn reports(context: &Context, reporter: &Reporter) -> Result<()> {
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .memory(reporter.memory)
        .append(reporter.append)
        .device("--balloon", "free_page_reporting=on")
        .boot(context)?;
    context.check(reporter.checks[0], || {
        fill(&mut vm, reporter.freed_mib)?;
        let before = resident(&vm)?;
        let freed = reporter.freed_mib * MIB;
        ensure!(before > freed, "{before} bytes are resident");
        free(&mut vm)?;
        // Some of a freed piece stays with the guest: lists of single pages, blocks that are not all free.
        let most = before - freed / 100 * 95;
        let took = wait_below("resident memory", most, || resident(&vm))?;
        let figures = json!({
            "freed_mib": reporter.freed_mib,
            "back_after_s": took.as_secs_f64(),
            "resident_mib": [before / MIB, resident(&vm)? / MIB],
            "counters": vm.counters()?["_balloon"],
        });
        note(context, "reporting", &figures)
    })?;
    context.check(reporter.checks[1], || {
        is_good(&mut vm, AGAIN_MIB)?;
        vm.power_off()
    })
}
