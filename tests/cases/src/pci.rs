//! PCI: a BAR that Linux moves, or switches off and on, takes its registers and doorbells along; devices go
//! and come back.

use anyhow::{Result, ensure};
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
        "pci.driver_bound_again",
        "pci.port_removed_and_found_again",
        "pci.reset_of_its_bus",
    ],
    run: moves_a_bar,
}];

/// A function of the guest and its first memory BAR.
#[derive(Debug, Clone)]
pub(crate) struct Function {
    /// `0000:01:00.0`.
    address: String,
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
        for line in table.lines().take(6) {
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
}

fn moves_a_bar(context: &Context) -> Result<()> {
    let image = context.scratch("disk.img");
    image::sparse(&image, 64 << 20)?;
    let daemon = Daemon::blk(context, "blk", &image, BlkSettings::default())?;
    context.step("boot");
    // iomem=relaxed lets devmem read the BAR of a device that has a driver.
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
    context.check("pci.driver_bound_again", || {
        away_and_back(
            &mut vm.console,
            "d=$(basename $(readlink -f /sys/block/vda/device))
             echo $d >/sys/bus/virtio/drivers/virtio_blk/unbind",
            "echo $d >/sys/bus/virtio/drivers/virtio_blk/bind",
        )
    })?;
    let function = Function::of_disk(&mut vm.console, "vda")?;
    context.check("pci.port_removed_and_found_again", || {
        let remove = format!("echo 1 >$(readlink -f {}/..)/remove", function.sysfs());
        let console = &mut vm.console;
        away_and_back(console, &remove, "echo 1 >/sys/bus/pci/rescan")?;
        // Its port has no I/O window, so Linux gave it none when it booted.
        console
            .sh("! grep 'PCI Bus 0000:02' /proc/ioports")
            .map(drop)
    })?;
    context.check("pci.reset_of_its_bus", || {
        let (address, sysfs) = (&function.address, function.sysfs());
        let driver = "/sys/bus/pci/drivers/virtio-pci";
        away_and_back(
            &mut vm.console,
            &format!("echo {address} >{driver}/unbind; echo 1 >{sysfs}/reset"),
            &format!("echo {address} >{driver}/bind"),
        )
    })?;
    vm.power_off()
}

/// The disk goes by one command and comes by another, with what was on it.
fn away_and_back(console: &mut Console, away: &str, back: &str) -> Result<()> {
    console.sh(&format!(
        "set -e\n{away}\ntest ! -e /dev/vda\n{back}\n{DISK_IS_THERE}"
    ))?;
    console.sh("mount -t ext4 /dev/vda /mnt")?;
    disk::verify(console)?;
    console.sh("umount /mnt").map(drop)
}

/// Waits until Linux has found the disk.
const DISK_IS_THERE: &str =
    "i=0; until test -b /dev/vda; do i=$((i + 1)); test $i -lt 200; usleep 50000; done";

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

/// Has Linux move the BAR, and the window of the port above it: the next time that it finds them it is to
/// align the BAR to 2 MiB.
fn move_bar(console: &mut Console, before: &Function) -> Result<()> {
    const ALIGNMENT: u64 = 2 << 20;
    ensure!(
        !before.start.is_multiple_of(ALIGNMENT),
        "{before:x?} is aligned already"
    );
    let order = ALIGNMENT.trailing_zeros();
    console.sh(&format!(
        "echo {order}@{} >/sys/bus/pci/resource_alignment",
        before.address
    ))?;
    away_and_back(
        console,
        &format!("echo 1 >$(readlink -f {}/..)/remove", before.sysfs()),
        "echo 1 >/sys/bus/pci/rescan",
    )?;
    let after = Function::of_disk(console, "vda")?;
    ensure!(
        after.start.is_multiple_of(ALIGNMENT),
        "Linux has it at {after:x?}, before at {before:x?}"
    );
    let old = console.sh(&format!("devmem {:#x} 32", before.start))?;
    ensure!(
        old.trim() == "0xFFFFFFFF",
        "the old place still answers {old:?}"
    );
    Ok(())
}
