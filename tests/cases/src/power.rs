//! Ends and new beginnings: power-off, power button, reboot, and the API's shutdown.

use anyhow::{Result, ensure};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "shutdown",
    tier: Tier::Guest,
    long: false,
    checks: &["api.ping", "api.vm_info", "power.vm_shutdown_by_api"],
    run: shutdown_by_api,
}];

/// The guest comes back under the same VMM, and is a new boot.
pub(crate) fn reboots(vm: &mut Vm) -> Result<()> {
    let boot_id = |vm: &mut Vm| vm.sh("cat /proc/sys/kernel/random/boot_id");
    let before = boot_id(vm)?;
    vm.reboot()?;
    let after = boot_id(vm)?;
    ensure!(
        before != after,
        "the guest says that it has not booted again"
    );
    Ok(())
}

/// The power button makes the guest end in order.
pub(crate) fn button(vm: &mut Vm) -> Result<()> {
    vm.api.put("vm.power-button")?;
    vm.console
        .wait_line("berth-agent power button", seconds(60))?;
    vm.wait_off()
}

fn shutdown_by_api(context: &Context) -> Result<()> {
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .memory("1G")
        .boot(context)?;
    context.check("api.ping", || {
        let ping = vm.api.get("vmm.ping")?;
        ensure!(ping["version"].is_string(), "vmm.ping says {ping}");
        Ok(())
    })?;
    context.check("api.vm_info", || {
        let info = vm.api.get("vm.info")?;
        ensure!(info["state"] == "Running", "state {}", info["state"]);
        let config = &info["config"];
        ensure!(config["cpus"]["boot_vcpus"] == 2, "cpus {}", config["cpus"]);
        ensure!(
            config["memory"]["size"] == 1u64 << 30,
            "memory {}",
            config["memory"]
        );
        Ok(())
    })?;
    context.check("power.vm_shutdown_by_api", || {
        vm.api.put("vm.shutdown")?;
        ensure!(vm.state()? == "Shutdown", "state {} after it", vm.state()?);
        // The VMM outlives its guest until it is told to end too.
        vm.api.put("vmm.shutdown")?;
        vm.wait_off()
    })
}
