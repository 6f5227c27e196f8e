//! The four guests: one kernel, one initramfs, one vCPU, 256 MiB of shared memory; another card each.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::net;
use berth_tests_framework::process::Process;
use berth_tests_framework::story::Context;
use berth_tests_framework::vmm::{self, BOOT_LIMIT, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

use crate::counts::{Counters, Counts};
use crate::transfer::{Direction, host_end};

/// What is measured; the first is what the others are measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// QEMU with the kernel's vhost-net.
    VhostNet,
    /// QEMU's own virtio-net.
    InProcess,
    /// QEMU with berth-net.
    BerthNet,
    /// berth-vmm with berth-net.
    BerthVmm,
}

impl Subject {
    pub(crate) const ALL: [Self; 4] = [
        Self::VhostNet,
        Self::InProcess,
        Self::BerthNet,
        Self::BerthVmm,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::VhostNet => "vhost-net",
            Self::InProcess => "qemu",
            Self::BerthNet => "berth-net",
            Self::BerthVmm => "berth-vmm",
        }
    }

    /// Who runs the guest.
    pub(crate) const fn machine(self) -> &'static str {
        match self {
            Self::BerthVmm => "berth-vmm",
            _ => "QEMU",
        }
    }

    /// Who serves the card.
    pub(crate) const fn card(self) -> &'static str {
        match self {
            Self::VhostNet => "tap, vhost=on",
            Self::InProcess => "tap, vhost=off",
            Self::BerthNet | Self::BerthVmm => "berth-net",
        }
    }

    /// Whether it is ours.
    pub(crate) const fn has_goal(self) -> bool {
        matches!(self, Self::BerthNet | Self::BerthVmm)
    }

    /// Number in names and addresses.
    const fn number(self) -> u8 {
        self as u8
    }
}

/// A running guest with an address. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) subject: Subject,
    host: Ipv4Addr,
    console: Console,
    machine: Process,
    counters: Counters,
    /// Ends after the machine.
    _daemon: Option<Daemon>,
}

impl Guest {
    /// What `bytes` take.
    ///
    /// # Errors
    /// They do not arrive.
    pub(crate) fn transfer(&mut self, direction: Direction, bytes: u64) -> Result<Duration> {
        let listener = TcpListener::bind((self.host, 0))?;
        let command = format!(
            "berth-net-lab guest {} {} {bytes}",
            direction.word(),
            listener.local_addr()?
        );
        let id = self.console.start(&command)?;
        let took = host_end(direction, &listener, bytes);
        drop(listener);
        let output = self.console.finish(id, &command, seconds(60))?;
        took.with_context(|| format!("the guest's end says: {output:?}"))
    }

    /// KVM's counters of it.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn counts(&self) -> Result<Counts> {
        self.counters.read()
    }

    /// What the guest tells the time by.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) fn clock(&mut self) -> Result<String> {
        let file = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        let clock = self.console.sh(&format!("cat {file}"))?;
        Ok(clock.trim().to_owned())
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// It does not end with 0.
    pub(crate) fn power_off(mut self) -> Result<()> {
        self.console.start("poweroff -f")?;
        self.machine.wait_success(seconds(60))
    }
}

/// Boots a subject on a tap of its own and gives both ends of it an address.
pub(crate) fn boot(context: &Context, subject: Subject) -> Result<Guest> {
    let number = subject.number();
    let tap = format!("tap{number}");
    let (host, guest) = (
        Ipv4Addr::new(10, 62, number, 1),
        Ipv4Addr::new(10, 62, number, 2),
    );
    let mac = format!("52:54:00:be:62:{number:02x}");
    net::make_tap(&tap)?;
    let daemon = match subject {
        Subject::VhostNet | Subject::InProcess => None,
        Subject::BerthNet | Subject::BerthVmm => {
            let name = format!("daemon-{}", subject.name());
            Some(Daemon::net(context, &name, &tap, &[])?)
        }
    };
    net::bring_up(&tap, host)?;
    let by_tap = |vhost| format!("tap,id=card,ifname={tap},script=no,downscript=no,vhost={vhost}");
    let (mut console, machine) = match (subject, &daemon) {
        (Subject::BerthVmm, Some(daemon)) => {
            let Vm {
                console, process, ..
            } = VmBuilder::new(context, subject.name())
                .append("mitigations=off")
                .memory("256M")
                .net(daemon.socket(), &format!(",mac={mac}"))
                .boot(context)?;
            (console, process)
        }
        (_, Some(daemon)) => {
            let chardev = format!("socket,id=peer,path={}", daemon.socket().display());
            let netdev = [
                "-chardev",
                &chardev,
                "-netdev",
                "vhost-user,id=card,chardev=peer",
            ];
            boot_qemu(context, subject, &mac, &netdev)?
        }
        (Subject::VhostNet, None) => {
            boot_qemu(context, subject, &mac, &["-netdev", &by_tap("on")])?
        }
        (_, None) => boot_qemu(context, subject, &mac, &["-netdev", &by_tap("off")])?,
    };
    vmm::bring_up(&mut console, "eth0", guest)?;
    Ok(Guest {
        subject,
        host,
        console,
        counters: Counters::of(machine.pid())?,
        machine,
        _daemon: daemon,
    })
}

/// The guest under QEMU on KVM, its card as berth-vmm's: modern, on PCI, with MSI-X.
fn boot_qemu(
    context: &Context,
    subject: Subject,
    mac: &str,
    netdev: &[&str],
) -> Result<(Console, Process)> {
    let name = subject.name();
    let serial = context.scratch(&format!("{name}.serial"));
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args([
            "-no-reboot",
            "-M",
            "q35,memory-backend=ram",
            "-accel",
            "kvm",
        ])
        .args(["-cpu", "host", "-smp", "1", "-m", "256"])
        .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"])
        .arg("-kernel")
        .arg(context.asset("vmlinux"))
        .arg("-initrd")
        .arg(context.asset("guest-initramfs.cpio"))
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
        .arg("-chardev")
        .arg(format!(
            "socket,id=serial,path={},server=on",
            serial.display()
        ))
        .args(["-serial", "chardev:serial"])
        .args(netdev)
        .arg("-device")
        .arg(format!(
            "virtio-net-pci,netdev=card,mac={mac},disable-legacy=on,romfile="
        ));
    let process = Process::spawn(name, command, &context.log(name))?;
    // server=on waits for us before the guest starts, so that no line is lost.
    let stream = process.connect(&serial, seconds(30))?;
    let mut console = Console::new(stream, &context.log(&format!("{name}-serial")))?;
    console.wait_ready(BOOT_LIMIT)?;
    Ok((console, process))
}
