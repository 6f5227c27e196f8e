//! Both irqchips under a real guest: disk, network, serial, power button and reboot need an interrupt each;
//! and clocks that tell the truth after a pause.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::seconds;
use berth_tests_framework::{image, net};

use crate::{cpu, power};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "irqchip-kernel",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "irqchip.kernel.boots",
            "irqchip.kernel.disk_and_net",
            "irqchip.kernel.pause",
            "irqchip.kernel.reboot",
            "irqchip.kernel.power_button",
        ],
        run: kernel,
    },
    Story {
        name: "irqchip-split",
        tier: Tier::Guest,
        long: false,
        checks: &[
            "irqchip.split.boots",
            "irqchip.split.disk_and_net",
            "irqchip.split.pause",
            "irqchip.split.reboot",
            "irqchip.split.power_button",
        ],
        run: split,
    },
];

/// One mode, and the names of its checks in the order in which they are made.
struct Case {
    mode: &'static str,
    tap: &'static str,
    host: Ipv4Addr,
    guest: Ipv4Addr,
    checks: [&'static str; 5],
}

fn kernel(context: &Context) -> Result<()> {
    let case = Case {
        mode: "kernel",
        tap: "berthirqk",
        host: Ipv4Addr::new(10, 77, 1, 1),
        guest: Ipv4Addr::new(10, 77, 1, 2),
        checks: [
            "irqchip.kernel.boots",
            "irqchip.kernel.disk_and_net",
            "irqchip.kernel.pause",
            "irqchip.kernel.reboot",
            "irqchip.kernel.power_button",
        ],
    };
    case.tell(context)
}

fn split(context: &Context) -> Result<()> {
    let case = Case {
        mode: "split",
        tap: "berthirqs",
        host: Ipv4Addr::new(10, 77, 2, 1),
        guest: Ipv4Addr::new(10, 77, 2, 2),
        checks: [
            "irqchip.split.boots",
            "irqchip.split.disk_and_net",
            "irqchip.split.pause",
            "irqchip.split.reboot",
            "irqchip.split.power_button",
        ],
    };
    case.tell(context)
}

impl Case {
    fn tell(&self, context: &Context) -> Result<()> {
        let disk = context.scratch("disk.img");
        image::sparse(&disk, 64 << 20)?;
        let blk = Daemon::blk(context, "blk", &disk, BlkSettings::default())?;
        net::make_tap(self.tap)?;
        let card = Daemon::net(context, "net", self.tap, &[])?;
        net::bring_up(self.tap, self.host)?;
        context.step("boot");
        let mut vm = VmBuilder::new(context, "vmm")
            .cpus(2)
            .platform(&format!("irqchip={}", self.mode))
            .append("watchdog_thresh=2")
            .disk(blk.socket(), "")
            .net(card.socket(), "")
            .boot(context)?;
        let [boots, io, pause, reboot, button] = self.checks;
        context.check(boots, || self.booted_well(&mut vm))?;
        context.check(io, || self.disk_and_net(context, &mut vm))?;
        context.check(pause, || paused(&mut vm))?;
        context.check(reboot, || {
            power::reboots(&mut vm)?;
            self.booted_well(&mut vm)
        })?;
        context.check(button, || power::button(&mut vm))
    }

    fn is_split(&self) -> bool {
        self.mode == "split"
    }

    /// No complaint, all CPUs with their timers, and the serial port's interrupt at the IOAPIC as an edge, the SCI as
    /// a level.
    fn booted_well(&self, vm: &mut Vm) -> Result<()> {
        no_complaint(vm)?;
        cpu::online(&mut vm.console, 2)?;
        let interrupts = vm.sh("cat /proc/interrupts")?;
        let line = |what: &str| interrupts.lines().find(|line| line.ends_with(what));
        let sci = line("acpi").unwrap_or_default();
        let serial = line("ttyS0").unwrap_or_default();
        ensure!(
            sci.contains("IO-APIC") && sci.contains("9-fasteoi"),
            "the SCI: {interrupts}"
        );
        ensure!(
            serial.contains("IO-APIC") && serial.contains("4-edge"),
            "the serial port: {interrupts}"
        );
        ensure!(
            !self.is_split() || !interrupts.contains("XT-PIC"),
            "a PIC in split mode: {interrupts}"
        );
        let clocks =
            vm.sh("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")?;
        ensure!(
            clocks.contains("kvm-clock") && clocks.contains("acpi_pm"),
            "clock sources {clocks:?}"
        );
        let log = vm.sh("dmesg | grep -i 'legacy PIC' || true")?;
        let no_pic = log.contains("NULL legacy PIC");
        ensure!(no_pic == self.is_split(), "about the PIC: {log:?}");
        Ok(())
    }

    fn disk_and_net(&self, context: &Context, vm: &mut Vm) -> Result<()> {
        let script = "dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
            dd if=/tmp/data of=/dev/vda bs=64k conv=fsync 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            dd if=/dev/vda bs=64k count=16 2>/dev/null | cmp - /tmp/data";
        vm.sh(script)?;
        let page = context.scratch("page");
        fs::write(&page, self.mode)?;
        let server = net::PageServer::start(self.host, &page)?;
        let got = vm.sh(&format!(
            "ip link set eth0 up && (ip addr add {}/24 dev eth0 || true) && wget -q -O /tmp/page {} && cat /tmp/page",
            self.guest,
            server.url()
        ))?;
        ensure!(got.trim() == self.mode, "fetched {got:?}");
        Ok(())
    }
}

/// Longer than the guest's watchdogs wait (2 and 4 s, `watchdog_thresh=2`), and nobody complains; the date is the
/// host's.
fn paused(vm: &mut Vm) -> Result<()> {
    let threshold = vm.sh("cat /proc/sys/kernel/watchdog_thresh")?;
    ensure!(threshold.trim() == "2", "watchdog_thresh {threshold:?}");
    vm.api.put("vm.pause")?;
    ensure!(vm.state()? == "Paused", "state {} after it", vm.state()?);
    // What is tested is that this much time passes.
    std::thread::sleep(seconds(12));
    vm.api.put("vm.resume")?;
    let now = |text: &str| -> Result<i64> { Ok(text.trim().parse()?) };
    let before = now(&berth_tests_framework::process::run("date", &["+%s"])?)?;
    let guest = now(&vm.sh("date +%s")?)?;
    let after = now(&berth_tests_framework::process::run("date", &["+%s"])?)?;
    ensure!(
        (before - 2..=after + 2).contains(&guest),
        "the guest's date is {guest}, the host's {before} to {after}"
    );
    // The watchdogs have looked twice since.
    vm.sh("sleep 6")?;
    no_complaint(vm)
}

/// Nothing that the kernel takes for a broken machine, of watchdogs, clocks and interrupts in particular. That two
/// looks at the clocks lay too far apart to compare them ("Long readout interval") is a busy host's doing.
fn no_complaint(vm: &mut Vm) -> Result<()> {
    let script = "dmesg -r | grep -E '^<[0-3]>|lockup|stall|nobody cared|unstable|clocksource.*(skew|watchdog)' \
                  | grep -v 'Long readout interval' || true";
    let complaints = vm.sh(script)?;
    ensure!(complaints.is_empty(), "the guest complains: {complaints}");
    Ok(())
}
