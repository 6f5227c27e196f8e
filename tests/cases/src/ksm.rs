//! berth-tuner with the kernel's own merging: micro-guests of equal content, which any KVM runs.
//!
//! ```text
//!   a, b: trust_domain=farm ─┐ the same 16 MiB as initramfs
//!   c:    trust_domain=other ┘
//!   berth-tuner (farm) ─▶ a and b share pages, c none ─▶ killed ─▶ started again without a domain: all is put back
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
    "ksm.guests_of_one_domain_share_pages",
    "ksm.status_explain_and_metrics_say_so",
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
    context.check("ksm.guests_of_one_domain_share_pages", || farm.merges())?;
    context.check("ksm.status_explain_and_metrics_say_so", || farm.says_so())?;
    context.check("ksm.another_domain_shares_none", || {
        farm.keeps_domains_apart()
    })?;
    context.check("ksm.what_a_killed_tuner_changed_is_put_back", || {
        farm.puts_back(&host)
    })?;
    context.check("ksm.a_tuner_that_is_told_to_end_puts_back", || {
        farm.ends_well(&host)
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
        fs::write(context.scratch("content"), content())?;
        let vms = context.scratch("vms");
        fs::create_dir_all(&vms)?;
        let mut guests = Vec::new();
        for (name, domain) in [("a", "farm"), ("b", "farm"), ("c", "other")] {
            let socket = vms.join(format!("{name}.sock"));
            let mut command = Command::new(context.bin("berth-vmm"));
            command
                .arg("--kernel")
                .arg(context.scratch("kernel"))
                .arg("--initramfs")
                .arg(context.scratch("content"))
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
        let merge = domain.map_or_else(String::new, |domain| format!("domain = \"{domain}\"\n"));
        let text = format!(
            "[general]\nvms = \"{}\"\nrun_dir = \"{}\"\ninterval_ms = 500\n[merge]\n{merge}",
            self.vms.display(),
            self.run_dir.display()
        );
        let config = self.context.scratch("tuner.toml");
        fs::write(&config, text)?;
        let mut command = Command::new(self.context.bin("berth-tuner"));
        command.arg("run").arg("--config").arg(config);
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

    fn merges(&mut self) -> Result<()> {
        self.tune(Some("farm"))?;
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

    fn ends_well(&mut self, host: &Host) -> Result<()> {
        self.tune(Some("farm"))?;
        until("the tuner to change something", seconds(120), || {
            Ok(host.check().is_err().then_some(()))
        })?;
        self.end()?;
        host.check()?;
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

/// Pages of which no two are equal (xorshift64).
fn content() -> Vec<u8> {
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number.to_le_bytes()
    };
    (0..CONTENT_MIB << 17).flat_map(|_| next()).collect()
}
