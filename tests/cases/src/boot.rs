//! Boot by each entry, and with it machines of different sizes.

use anyhow::{Result, ensure};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};

use crate::{cpu, memory};

/// Stories of this file.
pub const STORIES: &[Story] = &[
    Story {
        name: "boot-pvh",
        tier: Tier::Guest,
        long: false,
        checks: &["boot.vmlinux_by_pvh", "cpu.1_online", "memory.512_mib"],
        run: pvh,
    },
    Story {
        name: "boot-linux64",
        tier: Tier::Guest,
        long: false,
        checks: &["boot.vmlinux_by_linux64", "cpu.4_online", "memory.5_gib"],
        run: linux64,
    },
    Story {
        name: "boot-bzimage",
        tier: Tier::Guest,
        long: false,
        checks: &["boot.bzimage_unpacked", "cpu.2_online", "boot.cmos_clock"],
        run: bzimage_unpacked,
    },
    Story {
        name: "boot-bzimage-entry",
        tier: Tier::Guest,
        long: false,
        checks: &["boot.bzimage_by_its_entry"],
        run: bzimage_by_its_entry,
    },
];

/// What is true of every guest that has booted well.
fn booted_well(vm: &mut Vm) -> Result<()> {
    let clock = vm.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    ensure!(
        matches!(clock.trim(), "kvm-clock" | "tsc"),
        "clock source {clock:?}"
    );
    let cmdline = vm.sh("cat /proc/cmdline")?;
    ensure!(
        cmdline.contains("berth.mark=here"),
        "command line {cmdline:?}"
    );
    // Anything the kernel itself takes for a broken machine.
    let complaints = vm.sh("dmesg -r | grep -E '^<[0-3]>' || true")?;
    ensure!(
        complaints.is_empty(),
        "errors in the guest's kernel log: {complaints}"
    );
    let acpi = vm.sh("dmesg | grep -iE 'ACPI (BIOS )?(Error|Warning)|firmware bug' || true")?;
    ensure!(
        acpi.is_empty(),
        "the guest's kernel about its firmware: {acpi}"
    );
    Ok(())
}

fn builder(context: &Context, image: &str, entry: &str) -> VmBuilder {
    context.step("boot");
    let kernel = format!("{}{entry}", context.asset(image).display());
    VmBuilder::new(context, "vmm")
        .kernel(kernel)
        .append("berth.mark=here")
}

fn pvh(context: &Context) -> Result<()> {
    let mut vm = builder(context, "vmlinux", ",entry=pvh").boot(context)?;
    context.check("boot.vmlinux_by_pvh", || booted_well(&mut vm))?;
    context.check("cpu.1_online", || cpu::online(&mut vm.console, 1))?;
    context.check("memory.512_mib", || {
        memory::is_there(&mut vm.console, 512 << 20)
    })?;
    vm.power_off()
}

fn linux64(context: &Context) -> Result<()> {
    let builder = builder(context, "vmlinux", ",entry=linux64");
    let mut vm = builder.cpus(4).memory("5G").boot(context)?;
    context.check("boot.vmlinux_by_linux64", || booted_well(&mut vm))?;
    context.check("cpu.4_online", || cpu::online(&mut vm.console, 4))?;
    context.check("memory.5_gib", || {
        memory::is_there(&mut vm.console, 5 << 30)?;
        memory::on_both_sides_of_the_hole(&mut vm.console)
    })?;
    vm.power_off()
}

fn bzimage_unpacked(context: &Context) -> Result<()> {
    let mut vm = builder(context, "vmlinuz", "").cpus(2).boot(context)?;
    context.check("boot.bzimage_unpacked", || booted_well(&mut vm))?;
    context.check("cpu.2_online", || cpu::online(&mut vm.console, 2))?;
    context.check("boot.cmos_clock", || {
        let now = |text: String| -> Result<i64> { Ok(text.trim().parse()?) };
        let guest = now(vm.sh("cat /sys/class/rtc/rtc0/since_epoch")?)?;
        let host = now(berth_tests_framework::process::run("date", &["+%s"])?)?;
        ensure!(
            (guest - host).abs() < 60,
            "the guest's CMOS clock says {guest}, the host {host}"
        );
        Ok(())
    })?;
    vm.power_off()
}

fn bzimage_by_its_entry(context: &Context) -> Result<()> {
    let mut vm = builder(context, "vmlinuz", ",entry=bzimage").boot(context)?;
    context.check("boot.bzimage_by_its_entry", || booted_well(&mut vm))?;
    vm.power_off()
}
