//! berth-tuner with the kernel's own merging: micro-guests of equal content, which any KVM runs.
//!
//! ```text
//!   a, b: trust_domain=farm ─┐ the same 16 MiB as initramfs, and 32 MiB of which no other has more than a page in 32
//!   c:    trust_domain=other ┘
//!   berth-tuner --dry-run ─▶ (farm) a and b share pages, c none ─▶ killed ─▶ without a domain: all is put back
//!   ─▶ the scanner runs already ─▶ (farm) again ─▶ told to end: all is put back, what was merged is taken apart
//! ```
//!
//! KSM is the host's, so this is one story, and a lock keeps other runs of it on this host out. The kernel's settings are put
//! back when it ends, however it ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::process::{self, Process, Signal};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::wait::{seconds, until};
use serde_json::Value;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "ksm",
    tier: Tier::Client,
    long: false,
    checks: CHECKS,
    run: ksm,
}];

const CHECKS: &[&str] = &[
    "ksm.a_dry_run_changes_nothing",
    "ksm.guests_of_one_domain_share_pages",
    "ksm.status_explain_and_metrics_say_so",
    "ksm.huge_pages_with_little_to_merge_stay_whole",
    "ksm.another_domain_shares_none",
    "ksm.what_a_killed_tuner_changed_is_put_back",
    "ksm.a_tuner_that_is_told_to_end_puts_back",
];

const KSM: &str = "/sys/kernel/mm/ksm";
/// What the tuner changes.
const SETTINGS: [&str; 6] = [
    "run",
    "advisor_mode",
    "pages_to_scan",
    "sleep_millisecs",
    "smart_scan",
    "use_zero_pages",
];
/// What the guests have in common.
const CONTENT_MIB: u64 = 16;
/// What each has for itself.
const OWN_MIB: u64 = 32;
/// Of a huge page.
const HUGE_MIB: u64 = 2;
/// Merged pages of a guest from which it has been merged: most of the content.
const MERGED_PAGES: u64 = CONTENT_MIB * 256 * 3 / 4;

fn ksm(context: &Context) -> Result<()> {
    let writable = |path: &str| File::options().read(true).write(true).open(path).is_ok();
    let missing = [
        (
            writable(&format!("{KSM}/run")),
            "KSM cannot be set here: no CONFIG_KSM, or not root",
        ),
        (writable("/dev/kvm"), "no /dev/kvm"),
        (
            fs::exists("/proc/self/ksm_stat")?,
            "this kernel does not count merged pages by process",
        ),
    ];
    if let Some((_, why)) = missing.iter().find(|(is_there, _)| !is_there) {
        CHECKS.iter().for_each(|check| context.skip(check, why));
        return Ok(());
    }
    context.step("waiting for other runs of this story");
    let lock = File::create(std::env::temp_dir().join("berth-tests-ksm.lock"))?;
    lock.lock()?;
    let host = Host::take()?;
    let mut farm = Farm::start(context)?;
    context.check("ksm.a_dry_run_changes_nothing", || farm.runs_dry(&host))?;
    let huge = farm.huge_mib(0)?;
    context.check("ksm.guests_of_one_domain_share_pages", || farm.merges())?;
    context.check("ksm.status_explain_and_metrics_say_so", || farm.says_so())?;
    let check = "ksm.huge_pages_with_little_to_merge_stay_whole";
    if huge < OWN_MIB / 2 {
        context.skip(check, "the host has made hardly any huge pages");
    } else {
        context.check(check, || farm.keeps_huge_pages(huge))?;
    }
    context.check("ksm.another_domain_shares_none", || {
        farm.keeps_domains_apart()
    })?;
    context.check("ksm.what_a_killed_tuner_changed_is_put_back", || {
        farm.puts_back(&host)
    })?;
    context.check("ksm.a_tuner_that_is_told_to_end_puts_back", || {
        farm.ends_well()
    })
}

/// The kernel's settings as they were, put back at the end.
struct Host(Vec<(&'static str, String)>);

impl Host {
    fn take() -> Result<Self> {
        let there = SETTINGS
            .into_iter()
            .filter(|name| Path::new(KSM).join(name).exists());
        let values = there.map(|name| Ok((name, setting(name)?)));
        Ok(Self(values.collect::<Result<_>>()?))
    }

    fn check(&self) -> Result<()> {
        for (name, value) in &self.0 {
            let now = setting(name)?;
            ensure!(now == *value, "{name} is {now}, and was {value}");
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The advisor locks what follows; the scanner goes first and comes last.
        let _ = set("run", "0");
        let _ = set("advisor_mode", "none");
        for (name, value) in self.0.iter().rev() {
            if let Err(error) = set(name, value) {
                eprintln!("{error:#}");
            }
        }
    }
}

fn setting(name: &str) -> Result<String> {
    let text = fs::read_to_string(format!("{KSM}/{name}")).with_context(|| name.to_owned())?;
    // One of several words is in brackets.
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    Ok(chosen.map_or(text.trim(), |(word, _)| word).to_owned())
}

fn set(name: &str, value: &str) -> Result<()> {
    fs::write(format!("{KSM}/{name}"), value).with_context(|| format!("{name} = {value}"))
}

fn number(name: &str) -> Result<u64> {
    Ok(setting(name)?.parse()?)
}

/// Three guests and a tuner.
struct Farm<'a> {
    context: &'a Context,
    guests: Vec<Process>,
    vms: PathBuf,
    run_dir: PathBuf,
    tuner: Option<Process>,
}

impl<'a> Farm<'a> {
    fn start(context: &'a Context) -> Result<Self> {
        context.step("starting three guests with equal memory");
        fs::write(context.scratch("kernel"), kernel())?;
        let vms = context.scratch("vms");
        fs::create_dir_all(&vms)?;
        let mut guests = Vec::new();
        for (name, domain) in [("a", "farm"), ("b", "farm"), ("c", "other")] {
            let socket = vms.join(format!("{name}.sock"));
            let mut content = content(1, CONTENT_MIB);
            content.extend(own_content(2 + guests.len() as u64));
            let initramfs = context.scratch(&format!("content-{name}"));
            fs::write(&initramfs, content)?;
            let mut command = Command::new(context.bin("berth-vmm"));
            command
                .arg("--kernel")
                .arg(context.scratch("kernel"))
                .arg("--initramfs")
                .arg(initramfs)
                .args(["--memory", "size=64M,mergeable=on", "--serial", "null"])
                .args(["--platform", &format!("trust_domain={domain}")])
                .args(["--api-socket", &format!("path={}", socket.display())]);
            let guest = Process::spawn(name, command, &context.log(name))?;
            guest.wait_path(&socket, seconds(60))?;
            guests.push(guest);
        }
        Ok(Self {
            context,
            guests,
            vms,
            run_dir: context.scratch("run"),
            tuner: None,
        })
    }

    /// Starts a tuner that merges this domain, or none.
    fn tune(&mut self, domain: Option<&str>) -> Result<()> {
        self.start_tuner(domain, &[])
    }

    fn start_tuner(&mut self, domain: Option<&str>, more: &[&str]) -> Result<()> {
        let merge = domain.map_or_else(String::new, |domain| format!("domain = \"{domain}\"\n"));
        let text = format!(
            "[general]\nvms = \"{}\"\nrun_dir = \"{}\"\ninterval_ms = 500\n[merge]\n{merge}",
            self.vms.display(),
            self.run_dir.display()
        );
        let config = self.context.scratch("tuner.toml");
        fs::write(&config, text)?;
        let mut command = Command::new(self.context.bin("berth-tuner"));
        command.arg("run").arg("--config").arg(config).args(more);
        command
            .arg("--metrics-socket")
            .arg(self.context.scratch("metrics"));
        let tuner = Process::spawn("tuner", command, &self.context.log("tuner"))?;
        self.tuner = Some(tuner);
        until("the tuner to answer", seconds(60), || {
            Ok(self.ask(&["status", "--json"]).ok().map(drop))
        })
    }

    fn ask(&self, words: &[&str]) -> Result<String> {
        let program = self.context.bin("berth-tuner").display().to_string();
        let run_dir = self.run_dir.display().to_string();
        let args = [words, &["--run-dir", &run_dir]].concat();
        process::run(&program, &args)
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ask(&["status", "--json"])?)?)
    }

    /// A figure of a VM in the status.
    fn figure(&self, name: &str, figure: &str) -> Result<u64> {
        let status = self.status()?;
        let vms = status["vms"].as_array().into_iter().flatten();
        let vm = vms.into_iter().find(|vm| vm["name"] == name);
        vm.and_then(|vm| vm[figure].as_u64())
            .with_context(|| format!("{figure} of {name} in {status}"))
    }

    /// Merged pages of a guest, as the kernel counts them.
    fn merged(&self, index: usize) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/ksm_stat", self.guests[index].pid()))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("ksm_merging_pages"));
        Ok(line.context("ksm_merging_pages")?.trim().parse()?)
    }

    /// Memory of a guest that is in huge pages.
    fn huge_mib(&self, index: usize) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.guests[index].pid());
        let text = fs::read_to_string(&path)?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("AnonHugePages:"));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.context("AnonHugePages")? / 1024)
    }

    /// What a guest says that it offers, in bytes.
    fn offered(&self, name: &str) -> Result<u64> {
        let socket = self.vms.join(format!("{name}.sock"));
        let api = berth_tests_framework::http::Api::new(&socket, seconds(30));
        let sample = api.get("vm.memory-sample")?;
        let ranges = sample["offered"]
            .as_array()
            .context("no list of what is offered")?;
        Ok(ranges
            .iter()
            .filter_map(|range| range["len"].as_u64())
            .sum())
    }

    /// It says what it would offer, and offers nothing.
    fn runs_dry(&mut self, host: &Host) -> Result<()> {
        self.start_tuner(Some("farm"), &["--dry-run"])?;
        until("a dry run to say what it would offer", seconds(120), || {
            let why = self.ask(&["explain", "500"])?;
            Ok(["a", "b"]
                .iter()
                .all(|name| why.contains(&format!("runs of {name}: of ")))
                .then_some(()))
        })?;
        ensure!(self.status()?["dry_run"] == true);
        self.end()?;
        host.check()?;
        for name in ["a", "b", "c"] {
            ensure!(self.offered(name)? == 0, "{name} offers memory");
        }
        ensure!(
            !self.run_dir.join("state.json").exists(),
            "it noted something"
        );
        Ok(())
    }

    /// Merging splits huge pages, and is not worth that for a page in 32.
    fn keeps_huge_pages(&self, before: u64) -> Result<()> {
        until("all that pays to be merged", seconds(240), || {
            Ok((self.status()?["state"] == "TRICKLE").then_some(()))
        })?;
        // Those with common content, and the two that it begins and ends in.
        let unique = before.saturating_sub(CONTENT_MIB + 2 * HUGE_MIB);
        let after = self.huge_mib(0)?;
        let figures =
            format!("{before} MiB before, {after} MiB after, {unique} MiB with few equals\n");
        fs::write(self.context.log("huge-pages"), &figures)?;
        ensure!(after * 10 >= unique * 8, "{figures}");
        Ok(())
    }

    fn merges(&mut self) -> Result<()> {
        self.tune(Some("farm"))?;
        self.wait_merged()
    }

    fn wait_merged(&self) -> Result<()> {
        until(
            "two guests to share most of their content",
            seconds(240),
            || {
                let both = self.merged(0)? > MERGED_PAGES && self.merged(1)? > MERGED_PAGES;
                Ok(both.then_some(()))
            },
        )
    }

    fn says_so(&self) -> Result<()> {
        until("the status to say what is saved", seconds(60), || {
            let saved = self.status()?["saved_mib"].as_u64();
            Ok((saved >= Some(CONTENT_MIB / 2)).then_some(()))
        })?;
        let table = self.ask(&["watch", "--count=1"])?;
        ensure!(
            table.contains("domain farm") && table.contains("PROFIT KiB"),
            "{table}"
        );
        let why = self.ask(&["explain", "500"])?;
        for part in ["BURST", "offer", "have equals", "scanner runs", "new"] {
            ensure!(why.contains(part), "no {part:?} in\n{why}");
        }
        let metrics = self.context.scratch("metrics");
        let answer =
            berth_tests_framework::http::request(&metrics, "GET", "/metrics", seconds(30))?;
        ensure!(
            answer
                .body
                .contains("berth_tuner_vm_merged_bytes{vm=\"a\"}"),
            "{}",
            answer.body
        );
        ensure!(
            self.figure("a", "offered_mib")? < 64,
            "memory without equals is offered too"
        );
        Ok(())
    }

    /// With the tuner, and with the scanner running and no tuner.
    fn keeps_domains_apart(&mut self) -> Result<()> {
        ensure!(
            self.figure("c", "mergeable_mib")? == 64,
            "it could be merged"
        );
        ensure!(self.figure("c", "offered_mib")? == 0, "it is offered");
        if let Some(tuner) = &mut self.tuner {
            tuner.kill();
        }
        ensure!(self.run_dir.join("state.json").exists(), "it noted nothing");
        set("pages_to_scan", "5000")?;
        set("run", "1")?;
        let passes = number("full_scans")? + 3;
        until("three passes without a tuner", seconds(300), || {
            Ok((number("full_scans")? >= passes).then_some(()))
        })?;
        let merged = self.merged(2)?;
        ensure!(merged == 0, "{merged} pages of another domain are merged");
        ensure!(
            self.merged(0)? > MERGED_PAGES,
            "what was merged stays merged"
        );
        Ok(())
    }

    /// Without a domain the next tuner puts everything back and takes the guests out of merging.
    fn puts_back(&mut self, host: &Host) -> Result<()> {
        self.tune(None)?;
        host.check()?;
        until("the tuner to see the guests", seconds(60), || {
            Ok(self.figure("b", "pid").ok())
        })?;
        until("the guests to be taken out", seconds(120), || {
            // The kernel's counts stay until its scanner comes by, which stands still now.
            let offered = self.figure("a", "offered_mib")? + self.figure("b", "offered_mib")?;
            Ok((offered == 0).then_some(()))
        })?;
        self.end()?;
        host.check()
    }

    /// The scanner runs already when the tuner comes, and runs on when it has ended.
    fn ends_well(&mut self) -> Result<()> {
        set("pages_to_scan", "5000")?;
        set("run", "1")?;
        let host = Host::take()?;
        self.tune(Some("farm"))?;
        self.wait_merged()?;
        let foreign = (self.offered("c")?, self.merged(2)?);
        ensure!(
            foreign == (0, 0),
            "bytes offered, pages merged: {foreign:?}"
        );
        self.end()?;
        host.check()?;
        for name in ["a", "b"] {
            ensure!(self.offered(name)? == 0, "{name} still offers memory");
        }
        until("what was merged to be taken apart", seconds(240), || {
            let left = self.merged(0)? + self.merged(1)?;
            Ok((left == 0).then_some(()))
        })?;
        ensure!(
            !self.run_dir.join("state.json").exists(),
            "it left its notes"
        );
        ensure!(
            !self.run_dir.join("control.sock").exists(),
            "it left its socket"
        );
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let tuner = self.tuner.as_mut().context("no tuner")?;
        tuner.signal(Signal::Term)?;
        tuner.wait_success(seconds(60))
    }
}

/// A multiboot image at 1 MiB that does nothing for ever: `cli`, `hlt`, and again.
fn kernel() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const MAGIC: u32 = 0x1bad_b002;
    const HAS_ADDRESSES: u32 = 1 << 16;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(HAS_ADDRESSES);
    let header = [MAGIC, HAS_ADDRESSES, checksum, LOAD, LOAD, 0, 0, LOAD + 32];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend([0xfa, 0xf4, 0xeb, 0xfd]);
    image
}

/// Pages of which no two are equal, others with another seed (xorshift64).
fn content(seed: u64, mib: u64) -> Vec<u8> {
    let mut number = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
    let mut next = || {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number.to_le_bytes()
    };
    (0..mib << 17).flat_map(|_| next()).collect()
}

/// Contents of one guest, but for a page in 32, which all have.
fn own_content(seed: u64) -> Vec<u8> {
    const PAGE: usize = 4096;
    let (mut own, common) = (content(seed, OWN_MIB), content(99, OWN_MIB));
    let pages = own.chunks_mut(PAGE).zip(common.chunks(PAGE));
    pages
        .step_by(32)
        .for_each(|(own, common)| own.copy_from_slice(common));
    own
}
