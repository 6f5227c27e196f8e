//! berth-tuner with guests that have balloons, and a host that is told to be short of memory.
//!
//! ```text
//!   pressure.available_low = 0.99 ─▶ PRESSURE ─▶ the guest's balloon grows ─▶ the guest wants memory ─▶ it gets some back
//!   balloons off, reclaim on, zram ─▶ PRESSURE ─▶ memory.reclaim of the VMM's cgroup ─▶ the guest's data is what it was
//! ```
//!
//! The tuner records what it sees (`trace.jsonl` beside the logs).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests_framework::process::{self, Process, Signal};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};
use serde_json::Value;

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "tuner-balloon",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "tuner-balloon.a_host_that_is_short_takes_what_a_guest_can_spare",
            "tuner-balloon.a_guest_that_needs_it_gets_it_back_and_kills_nothing",
            "tuner-balloon.the_end_puts_the_balloon_back",
        ],
        run: balloon,
    },
    Story {
        name: "tuner-reclaim",
        tier: Tier::Guest,
        long: false,
        checks: &["tuner-reclaim.the_host_swaps_and_the_guests_data_is_what_it_was"],
        run: reclaim,
    },
];

const MIB: u64 = 1 << 20;
/// What the host never has available, so that it is short.
const SHORT: &str = "[pressure]\navailable_low = 0.99\navailable_high = 0.995\n";

/// A running tuner.
struct Tuner {
    process: Process,
    program: String,
    run_dir: PathBuf,
}

impl Tuner {
    fn start(context: &Context, vms: &Path, more: &str) -> Result<Self> {
        let run_dir = context.scratch("run");
        let text = format!(
            "[general]\nvms = {:?}\nrun_dir = {:?}\ninterval_ms = 500\n{SHORT}{more}",
            vms.display().to_string(),
            run_dir.display().to_string()
        );
        let config = context.scratch("tuner.toml");
        fs::write(&config, text)?;
        let program = context.bin("berth-tuner");
        let mut command = Command::new(&program);
        command.arg("run").arg("--config").arg(config);
        command
            .arg("--record")
            .arg(context.log("trace").with_extension("jsonl"));
        Ok(Self {
            process: Process::spawn("tuner", command, &context.log("tuner"))?,
            program: program.display().to_string(),
            run_dir,
        })
    }

    fn ask(&self, words: &[&str]) -> Result<Value> {
        if !self.process.is_running() {
            bail!("the tuner ended: {}", self.process.output()?);
        }
        let run_dir = self.run_dir.display().to_string();
        let text = process::run(
            &self.program,
            &[words, &["--json", "--run-dir", &run_dir]].concat(),
        )?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Reasons of all decisions whose actions have this name.
    fn reasons(&self, action: &str) -> Result<Vec<String>> {
        let explained = self.ask(&["explain", "500"])?;
        let decisions = explained.as_array().into_iter().flatten();
        let steps =
            decisions.flat_map(|decision| decision["steps"].as_array().into_iter().flatten());
        Ok(steps
            .filter(|step| step["action"].get(action).is_some())
            .filter_map(|step| Some(step["why"].as_str()?.to_owned()))
            .collect())
    }

    fn end(&mut self) -> Result<()> {
        self.process.signal(Signal::Term)?;
        self.process.wait_success(seconds(60))
    }
}

/// A guest whose API socket is where the tuner looks, with a balloon.
fn guest(context: &Context) -> Result<(Vm, PathBuf)> {
    let vms = context.scratch("vms");
    fs::create_dir_all(&vms)?;
    let vm = VmBuilder::new(context, "vmm")
        .memory("512M,mergeable=on")
        .platform("trust_domain=farm")
        .device("--balloon", "size=0,deflate_on_oom=on")
        .api_socket(vms.join("guest.sock"))
        .start(context)?;
    Ok((vm, vms))
}

fn target(vm: &Vm) -> Result<u64> {
    let info = vm.api.get("vm.info")?;
    info["balloon"]["target"].as_u64().context("no balloon")
}

fn balloon(context: &Context) -> Result<()> {
    context.step("boot");
    let (mut vm, vms) = guest(context)?;
    vm.console
        .wait_ready(berth_tests_framework::vmm::BOOT_LIMIT)?;
    let mut tuner = Tuner::start(context, &vms, "")?;
    context.check(
        "tuner-balloon.a_host_that_is_short_takes_what_a_guest_can_spare",
        || {
            until("a balloon of 128 MiB", seconds(240), || {
                Ok((target(&vm)? >= 128 * MIB).then_some(()))
            })?;
            let why = tuner.reasons("balloon")?;
            ensure!(
                why.iter().all(|why| why.contains("MiB to spare")),
                "{why:?}"
            );
            ensure!(tuner.ask(&["status"])?["state"] == "PRESSURE");
            Ok(())
        },
    )?;
    context.check("tuner-balloon.a_guest_that_needs_it_gets_it_back_and_kills_nothing", || {
        let before = target(&vm)?;
        // More than it has left beside the balloon, and not more than it has without.
        let script = "mkdir -p /tmp/f && mount -t tmpfs -o size=95% f /tmp/f &&
            left=$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo) &&
            dd if=/dev/zero of=/tmp/f/all bs=1M count=$((left + 48)) 2>/dev/null && grep -x 'oom_kill 0' /proc/vmstat";
        vm.console.sh_within(script, seconds(120))?;
        until("the tuner to give memory back", seconds(60), || {
            let why = tuner.reasons("balloon")?;
            let given = why.iter().any(|why| why.contains("the guest ") && !why.contains("to spare"));
            Ok((given && target(&vm)? < before).then_some(()))
        })?;
        vm.sh("grep -x 'oom_kill 0' /proc/vmstat; umount /tmp/f").map(drop)
    })?;
    context.check("tuner-balloon.the_end_puts_the_balloon_back", || {
        tuner.end()?;
        ensure!(
            target(&vm)? == 0,
            "the balloon is to hold {} bytes",
            target(&vm)?
        );
        vm.power_off()
    })
}

/// Swap in compressed memory, for as long as this lives.
struct Zram;

impl Zram {
    fn on() -> Result<Self> {
        process::run("modprobe", &["zram"])?;
        let this = Self;
        fs::write("/sys/block/zram0/disksize", "512M")?;
        process::run("mkswap", &["/dev/zram0"])?;
        process::run("swapon", &["/dev/zram0"])?;
        Ok(this)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // What is not on cannot be turned off; nobody is there to be told.
        let _ = process::run("swapoff", &["/dev/zram0"]);
        let _ = fs::write("/sys/block/zram0/reset", "1");
    }
}

/// A cgroup with one process in it.
struct Cgroup(PathBuf);

impl Cgroup {
    fn with(pid: u32) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        let folder = root.join(format!("berth-test-{pid}"));
        fs::create_dir(&folder)?;
        let this = Self(folder);
        fs::write(this.0.join("cgroup.procs"), pid.to_string())?;
        Ok(this)
    }

    fn bytes(&self, name: &str) -> Result<u64> {
        Ok(fs::read_to_string(self.0.join(name))?.trim().parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Only an empty one goes; the VMM may be still in it.
        let _ = fs::remove_dir(&self.0);
    }
}

fn reclaim(context: &Context) -> Result<()> {
    let check = "tuner-reclaim.the_host_swaps_and_the_guests_data_is_what_it_was";
    if !fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .is_ok_and(|all| all.contains("memory"))
    {
        context.skip(
            check,
            "no memory controller in the unified cgroup hierarchy",
        );
        return Ok(());
    }
    if std::env::var_os("BERTH_LAB").is_none() {
        context.skip(check, "swap of the whole host is changed in the lab only");
        return Ok(());
    }
    let _zram = Zram::on()?;
    context.step("boot");
    let (mut vm, vms) = guest(context)?;
    let cgroup = Cgroup::with(vm.process.pid())?;
    vm.console
        .wait_ready(berth_tests_framework::vmm::BOOT_LIMIT)?;
    let script = "mkdir -p /tmp/f && mount -t tmpfs f /tmp/f && dd if=/dev/urandom of=/tmp/f/a bs=1M count=8 2>/dev/null &&
        for i in 1 2 3 4 5 6 7 8 9 10 11; do cat /tmp/f/a; done >/tmp/f/all && md5sum </tmp/f/all";
    let sum = vm.console.sh_within(script, seconds(120))?;
    let more =
        "[balloon]\nenabled = false\n[reclaim]\nenabled = true\nstep_mib = 16\nwaiting = 50.0\n";
    let mut tuner = Tuner::start(context, &vms, more)?;
    let outcome = context.check(check, || {
        until("64 MiB of the VM in swap", seconds(240), || {
            Ok((cgroup.bytes("memory.swap.current")? >= 64 * MIB).then_some(()))
        })?;
        let why = tuner.reasons("reclaim")?;
        ensure!(
            why.iter()
                .all(|why| why.contains("no guest has memory to spare")),
            "{why:?}"
        );
        let now = vm.console.sh_within("md5sum </tmp/f/all", seconds(120))?;
        ensure!(now == sum, "the guest had {sum}, and has {now}");
        tuner.end()?;
        vm.power_off()
    });
    drop(vm);
    outcome
}
