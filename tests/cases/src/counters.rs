//! What vm.counters and the daemons count, against what the kernel counts; and a data path without exits.
//!
//! The kernel's own numbers come from its tracepoints, counted for the vCPU threads alone (exact, nothing is
//! sampled), and from KVM's statistics in debugfs. Both sides are read while the guest is paused.

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::kernel_counts::{TracepointCount, kvm_stat};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::{seconds, until};
use serde_json::Value;

use crate::pci::Function;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "counters",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "counters.no_exits_in_10000_requests",
        "counters.port_exits_agree",
        "counters.mmio_exits_agree",
        "counters.doorbells_agree",
        "counters.interrupts_agree",
    ],
    run: agree_with_the_kernel,
}];

/// Requests that are watched.
const REQUESTS: u64 = 10_000;

/// Exits to user space by their reason in the KVM API: KVM_EXIT_IO and KVM_EXIT_MMIO. A KVM_RUN that a
/// signal ended shows the reason of the one before, with an error.
const PORT_EXITS: &str = "reason == 2 && errno == 0";
const MMIO_EXITS: &str = "reason == 6 && errno == 0";

/// What happened while the guest read blocks and did nothing else.
#[derive(Debug)]
pub struct DataPath {
    /// Blocks read.
    pub requests: u64,
    /// Doorbells that reached the daemon.
    pub doorbells: u64,
    /// Interrupts that the daemon raised.
    pub interrupts: u64,
    /// Exits to user space for ports, as the kernel counts them.
    pub port_exits: u64,
    /// Exits to user space for MMIO, as the kernel counts them.
    pub mmio_exits: u64,
}

impl DataPath {
    /// Lets the guest read blocks of `/dev/vda` and watches ten thousand of them, in the middle of the
    /// command, in which time nothing passes over the console.
    ///
    /// # Errors
    /// The reads fail, or the kernel does not let us count.
    pub fn measure(vm: &mut Vm, disk: &Daemon) -> Result<Self> {
        let tids = vcpu_threads(vm)?;
        let margin = REQUESTS / 10;
        let command = reads(REQUESTS + 2 * margin);
        let before = disk.total("berth_requests_total")?;
        let id = vm.console.start(&command)?;
        let wait = |requests: u64| {
            until(&format!("{requests} requests"), seconds(180), || {
                let done = disk.total("berth_requests_total")?;
                Ok((done >= requests).then_some(done))
            })
        };
        let start = wait(before + margin / 2)?;
        let mut port_exits = user_exits(PORT_EXITS, &tids)?;
        let mut mmio_exits = user_exits(MMIO_EXITS, &tids)?;
        let doorbells = disk.total("berth_kicks_total")?;
        let interrupts = disk.total("berth_calls_total")?;
        let end = wait(start + REQUESTS)?;
        let path = Self {
            requests: end - start,
            doorbells: disk.total("berth_kicks_total")? - doorbells,
            interrupts: disk.total("berth_calls_total")? - interrupts,
            port_exits: port_exits.read()?,
            mmio_exits: mmio_exits.read()?,
        };
        let output = vm.console.finish(id, &command, seconds(180))?;
        ensure!(
            output.rc == 0,
            "the guest's reads failed: {}",
            output.stdout
        );
        Ok(path)
    }
}

/// A command that reads `count` blocks of `/dev/vda`, eight at a time.
fn reads(count: u64) -> String {
    let each = count.div_ceil(8);
    format!(
        "for part in $(seq 0 7); do
             dd if=/dev/vda of=/dev/null bs=4k iflag=direct skip=$((part * {each})) count={each} \
                2>/dev/null &
         done; wait"
    )
}

fn vcpu_threads(vm: &Vm) -> Result<Vec<i32>> {
    let threads = vm.process.threads()?;
    let tids: Vec<_> = threads
        .iter()
        .filter(|(_, name)| name.starts_with("vcpu"))
        .map(|(tid, _)| *tid)
        .collect();
    ensure!(!tids.is_empty(), "no vcpu threads in {threads:?}");
    Ok(tids)
}

fn user_exits(filter: &str, tids: &[i32]) -> Result<TracepointCount> {
    TracepointCount::start("kvm", "kvm_userspace_exit", filter, tids)
}

/// Sum over all vCPUs of a counter in vm.counters.
fn of_vcpus(counters: &Value, name: &str) -> Result<u64> {
    let groups = counters.as_object().context("vm.counters is no object")?;
    let mut sum = None;
    for (_, group) in groups.iter().filter(|(group, _)| group.starts_with("vcpu")) {
        if let Some(value) = group[name].as_u64() {
            sum = Some(sum.unwrap_or(0) + value);
        }
    }
    sum.with_context(|| format!("no {name} of vcpus in vm.counters: {counters}"))
}

/// Both sides' numbers over one stretch of the guest's life.
struct Stretch {
    before: Value,
    after: Value,
    kernel_port_exits: u64,
    kernel_mmio_exits: u64,
    kernel_doorbells: u64,
    kernel_interrupts: u64,
    kicks: u64,
    calls: u64,
}

impl Stretch {
    fn grown(&self, names: &[&str]) -> Result<u64> {
        names.iter().try_fold(0, |sum, name| {
            Ok(sum + of_vcpus(&self.after, name)? - of_vcpus(&self.before, name)?)
        })
    }

    /// Reads all numbers, lets the guest work, and reads them again; the guest is paused at both ends.
    fn watch(vm: &mut Vm, disk: &Daemon, work: &str) -> Result<Self> {
        let tids = vcpu_threads(vm)?;
        let bar = Function::of_disk(&mut vm.console, "vda")?;
        let (first, last) = (bar.start, bar.start + bar.size - 1);
        vm.api.put("vm.pause")?;
        let before = vm.counters()?;
        let mut port_exits = user_exits(PORT_EXITS, &tids)?;
        let mut mmio_exits = user_exits(MMIO_EXITS, &tids)?;
        // Doorbells: writes (type 2) to the device's BAR, of which some processors' KVM takes a fast path.
        let slow = format!("type == 2 && gpa >= {first} && gpa <= {last}");
        let mut slow = TracepointCount::start("kvm", "kvm_mmio", &slow, &tids)?;
        let fast = format!("gpa >= {first} && gpa <= {last}");
        let mut fast = TracepointCount::start("kvm", "kvm_fast_mmio", &fast, &tids)?;
        let interrupts = kvm_stat(&vm.process, "irq_injections")?;
        let (kicks, calls) = (
            disk.total("berth_kicks_total")?,
            disk.total("berth_calls_total")?,
        );
        vm.api.put("vm.resume")?;
        vm.console.sh_within(work, seconds(180))?;
        vm.api.put("vm.pause")?;
        let stretch = Self {
            before,
            after: vm.counters()?,
            kernel_port_exits: port_exits.read()?,
            kernel_mmio_exits: mmio_exits.read()?,
            kernel_doorbells: slow.read()? + fast.read()?,
            kernel_interrupts: kvm_stat(&vm.process, "irq_injections")? - interrupts,
            kicks: disk.total("berth_kicks_total")? - kicks,
            calls: disk.total("berth_calls_total")? - calls,
        };
        vm.api.put("vm.resume")?;
        Ok(stretch)
    }
}

fn agree_with_the_kernel(context: &Context) -> Result<()> {
    let image = context.scratch("disk.img");
    image::sparse(&image, 256 << 20)?;
    let disk = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    context.step("boot");
    let builder = VmBuilder::new(context, "vmm")
        .cpus(2)
        .disk(disk.socket(), "");
    let mut vm = builder.boot(context)?;

    context.check("counters.no_exits_in_10000_requests", || {
        let path = DataPath::measure(&mut vm, &disk)?;
        ensure!(
            path.requests >= REQUESTS && path.doorbells > 0 && path.interrupts > 0,
            "{path:?}"
        );
        ensure!(path.port_exits == 0 && path.mmio_exits == 0, "{path:?}");
        Ok(())
    })?;
    // Ports are read and written too, and unclaimed and claimed MMIO, so that equal means more than zero.
    let work = format!(
        "{}
         for i in $(seq 20); do cat /sys/class/rtc/rtc0/since_epoch; done
         hexdump -n 64 /sys/bus/pci/devices/0000:00:00.0/config",
        reads(REQUESTS)
    );
    context.step("watch 10000 requests on both sides");
    let stretch = Stretch::watch(&mut vm, &disk, &work)?;
    context.check("counters.port_exits_agree", || {
        let ours = stretch.grown(&["exits_io_in", "exits_io_out"])?;
        let kernels = stretch.kernel_port_exits;
        ensure!(
            ours == kernels && ours > 100,
            "vm.counters: {ours}, the kernel: {kernels}"
        );
        Ok(())
    })?;
    context.check("counters.mmio_exits_agree", || {
        let ours = stretch.grown(&["exits_mmio_read", "exits_mmio_write"])?;
        let kernels = stretch.kernel_mmio_exits;
        ensure!(
            ours == kernels && ours > 0,
            "vm.counters: {ours}, the kernel: {kernels}"
        );
        Ok(())
    })?;
    context.check("counters.doorbells_agree", || {
        let (kicks, kernels) = (stretch.kicks, stretch.kernel_doorbells);
        ensure!(
            kicks == kernels && kicks > 0,
            "the daemon: {kicks}, the kernel: {kernels}"
        );
        // Ours are those of all devices: the entropy device may have rung a few times.
        let ours = stretch.grown(&["doorbells"])?;
        ensure!(
            (kernels..kernels + 50).contains(&ours),
            "vm.counters: {ours}, the kernel: {kernels}"
        );
        Ok(())
    })?;
    context.check("counters.interrupts_agree", || {
        let ours = stretch.grown(&["kvm_irq_injections"])?;
        let (kernels, calls) = (stretch.kernel_interrupts, stretch.calls);
        ensure!(
            ours == kernels,
            "vm.counters: {ours}, the kernel: {kernels}"
        );
        ensure!(
            calls > 0 && calls <= ours,
            "the daemon raised {calls}, KVM injected {ours}"
        );
        Ok(())
    })?;
    vm.power_off()
}
