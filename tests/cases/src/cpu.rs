//! vCPUs: all there, all at work, and one package of cores.

use anyhow::{Result, ensure};
use berth_tests_framework::console::Console;

/// The guest has `count` CPUs online, each a core of one package, and each runs a process.
pub(crate) fn online(vm: &mut Console, count: usize) -> Result<()> {
    let expected = if count == 1 {
        "0".to_owned()
    } else {
        format!("0-{}", count - 1)
    };
    for list in ["possible", "present", "online"] {
        let cpus = vm.sh(&format!("cat /sys/devices/system/cpu/{list}"))?;
        ensure!(
            cpus.trim() == expected,
            "CPUs {list}: {cpus:?}, not {expected}"
        );
    }
    topology(vm, count)?;
    let script = "for cpu in $(seq 0 $(($(nproc) - 1))); do
            taskset $(printf %x $((1 << cpu))) cut -d' ' -f39 /proc/self/stat; done";
    let ran_on = vm.sh(script)?;
    let expected: Vec<_> = (0..count).map(|cpu| cpu.to_string()).collect();
    ensure!(
        ran_on.lines().eq(expected.iter().map(String::as_str)),
        "processes ran on {ran_on:?}"
    );
    let interrupts = vm.sh("grep LOC: /proc/interrupts")?;
    let ticks = interrupts.split_whitespace().skip(1).take(count);
    ensure!(ticks.clone().count() == count, "local timers: {interrupts}");
    ensure!(
        ticks.clone().all(|tick| tick != "0"),
        "a CPU without timer interrupts: {interrupts}"
    );
    Ok(())
}

/// One package with `count` cores of one thread, by sysfs (ACPI, CPUID leaf 0xb) and by /proc/cpuinfo.
fn topology(vm: &mut Console, count: usize) -> Result<()> {
    let read = |vm: &mut Console, file: &str| -> Result<Vec<String>> {
        let text = vm.sh(&format!(
            "cat /sys/devices/system/cpu/cpu[0-9]*/topology/{file}"
        ))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let packages = read(vm, "physical_package_id")?;
    ensure!(
        packages.len() == count && packages.iter().all(|id| *id == packages[0]),
        "packages: {packages:?}"
    );
    let mut cores = read(vm, "core_id")?;
    cores.sort();
    cores.dedup();
    ensure!(cores.len() == count, "core ids: {cores:?}");
    let threads = read(vm, "thread_siblings_list")?;
    ensure!(
        threads.iter().all(|list| list.parse::<u32>().is_ok()),
        "threads: {threads:?}"
    );
    let info = vm.sh("grep -E '^(siblings|cpu cores)' /proc/cpuinfo")?;
    let all = info
        .lines()
        .all(|line| line.ends_with(&format!(": {count}")));
    ensure!(
        all && info.lines().count() == 2 * count,
        "/proc/cpuinfo: {info}"
    );
    Ok(())
}
