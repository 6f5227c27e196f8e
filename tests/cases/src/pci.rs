//! PCI: a BAR that the guest moves, or switches off and on, takes its registers and doorbells along.

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::kernel_counts::kvm_stat;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::VmBuilder;

use crate::disk;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "pci",
    tier: Tier::Guest,
    long: false,
    checks: &[
        "pci.bar_off_and_on",
        "pci.bar_moved",
        "pci.doorbells_moved_along",
    ],
    run: moves_a_bar,
}];

/// A function of the guest and its first memory BAR.
#[derive(Debug, Clone)]
pub(crate) struct Function {
    /// `0000:01:00.0`.
    address: String,
    /// Index of the BAR's first register.
    bar: usize,
    /// Address of its first byte.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) size: u64,
}

impl Function {
    /// The function behind a disk of the guest.
    pub(crate) fn of_disk(console: &mut Console, disk: &str) -> Result<Self> {
        let path = console.sh(&format!(
            "basename $(readlink -f /sys/block/{disk}/device/..)"
        ))?;
        Self::at(console, path.trim())
    }

    fn at(console: &mut Console, address: &str) -> Result<Self> {
        const IORESOURCE_MEM: u64 = 0x200;
        let table = console.sh(&format!("cat /sys/bus/pci/devices/{address}/resource"))?;
        for (bar, line) in table.lines().take(6).enumerate() {
            let fields: Result<Vec<_>, _> = line
                .split_whitespace()
                .map(|field| u64::from_str_radix(field.trim_start_matches("0x"), 16))
                .collect();
            if let [start, end, flags] = fields?[..]
                && flags & IORESOURCE_MEM != 0
            {
                let (address, size) = (address.to_owned(), end - start + 1);
                return Ok(Self {
                    address,
                    bar,
                    start,
                    size,
                });
            }
        }
        anyhow::bail!("{address} has no memory BAR: {table}")
    }

    fn sysfs(&self) -> String {
        format!("/sys/bus/pci/devices/{}", self.address)
    }

    /// Where ECAM has configuration register `offset` of this function.
    fn ecam(&self, console: &mut Console, offset: u64) -> Result<u64> {
        let iomem = console.sh("grep -E 'PCI (ECAM|MMCONFIG)' /proc/iomem")?;
        let base = iomem.trim().split('-').next().unwrap_or_default();
        let base = u64::from_str_radix(base, 16).with_context(|| iomem.clone())?;
        let parts: Result<Vec<_>, _> = self
            .address
            .split([':', '.'])
            .map(|part| u64::from_str_radix(part, 16))
            .collect();
        let [0, bus, device, function] = parts?[..] else {
            anyhow::bail!("not a function of segment 0: {}", self.address)
        };
        Ok(base + (bus << 20 | device << 15 | function << 12) + offset)
    }
}

fn moves_a_bar(context: &Context) -> Result<()> {
    let image = context.scratch("disk.img");
    image::sparse(&image, 64 << 20)?;
    let daemon = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    context.step("boot");
    // iomem=relaxed lets devmem write to configuration space.
    let mut vm = VmBuilder::new(context, "vmm")
        .append("iomem=relaxed")
        .disk(daemon.socket(), "")
        .boot(context)?;
    disk::make_and_mount(&mut vm.console, "/dev/vda")?;
    disk::random_writes(&mut vm.console)?;
    vm.sh("umount /mnt")?;
    let before = Function::of_disk(&mut vm.console, "vda")?;

    context.check("pci.bar_off_and_on", || {
        off_and_on(&mut vm.console, &before)
    })?;
    context.check("pci.bar_moved", || move_bar(&mut vm.console, &before))?;
    context.check("pci.doorbells_moved_along", || {
        vm.sh("mount -t ext4 /dev/vda /mnt")?;
        let (exits, kicks) = (
            kvm_stat(&vm.process, "mmio_exits")?,
            daemon.total("berth_kicks_total")?,
        );
        disk::verify(&mut vm.console)?;
        disk::random_writes(&mut vm.console)?;
        let exits = kvm_stat(&vm.process, "mmio_exits")? - exits;
        let kicks = daemon.total("berth_kicks_total")? - kicks;
        ensure!(kicks > 50, "{kicks} doorbells reached the daemon");
        ensure!(
            exits == 0,
            "{exits} MMIO exits to user space with {kicks} doorbells"
        );
        Ok(())
    })?;
    vm.sh("umount /mnt")?;
    vm.power_off()
}

/// Without memory decoding the BAR's addresses are nobody's; with it again, the device goes on.
fn off_and_on(console: &mut Console, function: &Function) -> Result<()> {
    let config = format!("{}/config", function.sysfs());
    let command = console.sh(&format!("hexdump -s 4 -n 2 -e '1/2 \"%u\"' {config}"))?;
    let command: u16 = command.trim().parse()?;
    ensure!(
        command & 2 != 0,
        "command register {command:#x} without memory decoding"
    );
    let set = |value: u16| {
        let [low, high] = value.to_le_bytes();
        format!(
            "printf '\\x{low:02x}\\x{high:02x}' | dd of={config} bs=1 seek=4 conv=notrunc 2>/dev/null"
        )
    };
    let read = format!("devmem {:#x} 32", function.start);
    let claimed = console.sh(&read)?;
    let off = console.sh(&format!("{}; {read}; {}", set(command & !2), set(command)))?;
    ensure!(
        off.trim() == "0xFFFFFFFF",
        "with decoding off the BAR reads {off:?}"
    );
    let again = console.sh(&read)?;
    ensure!(
        again == claimed && claimed != off,
        "the BAR read {claimed:?}, then {again:?}"
    );
    console.sh("mount -t ext4 /dev/vda /mnt")?;
    disk::verify(console)?;
    console.sh("umount /mnt").map(drop)
}

/// Moves the BAR while Linux does not know the device, and lets Linux find it at its new place.
fn move_bar(console: &mut Console, before: &Function) -> Result<()> {
    let register = before.ecam(console, 0x10 + 4 * before.bar as u64)?;
    // The next place of its size, in the same window of the root port, which is at least 1 MiB.
    let target = before.start + before.size;
    ensure!(
        target >> 20 == before.start >> 20,
        "no room for {before:x?} in its window"
    );
    console.sh(&format!(
        "echo 1 >{}/remove && ! test -e /dev/vda",
        before.sysfs()
    ))?;
    let low = u32::try_from(target & 0xffff_ffff)?;
    console.sh(&format!(
        "devmem {register:#x} 32 {low:#x}; echo 1 >/sys/bus/pci/rescan"
    ))?;
    console
        .sh("i=0; until test -b /dev/vda; do i=$((i + 1)); test $i -lt 200; usleep 50000; done")?;
    let after = Function::of_disk(console, "vda")?;
    ensure!(
        after.start == target,
        "moved to {target:#x}, but Linux has it at {after:x?}"
    );
    let old = console.sh(&format!("devmem {:#x} 32", before.start))?;
    ensure!(
        old.trim() == "0xFFFFFFFF",
        "the old place still answers {old:?}"
    );
    Ok(())
}
