//! The same guest under QEMU's software CPU, with our daemons as its devices: needs no KVM.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::console::Console;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::story::Context;
use crate::vmm::BOOT_LIMIT;
use crate::wait::seconds;

/// A running guest. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Qemu {
    /// The guest's serial line.
    pub console: Console,
    /// QEMU.
    pub process: Process,
    qmp: PathBuf,
}

/// QEMU's arguments for devices that other processes serve.
#[derive(Debug, Default)]
pub struct Devices(Vec<String>);

impl Devices {
    /// A disk with `queues` virtqueues behind the daemon at `socket`.
    #[must_use]
    pub fn disk(mut self, id: &str, socket: &Path, queues: u16) -> Self {
        self.socket(id, socket);
        self.0.extend([
            "-device".to_owned(),
            format!("vhost-user-blk-pci,chardev={id},num-queues={queues},disable-legacy=on"),
        ]);
        self
    }

    /// A network card of one queue pair behind the daemon at `socket`.
    #[must_use]
    pub fn net(mut self, id: &str, socket: &Path, mac: &str) -> Self {
        self.socket(id, socket);
        self.0.extend([
            "-netdev".to_owned(),
            format!("vhost-user,id={id}-peer,chardev={id}"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev={id}-peer,mac={mac},disable-legacy=on,romfile="),
        ]);
        self
    }

    fn socket(&mut self, id: &str, socket: &Path) {
        // QEMU dials again when a daemon has died, and hands a disk's inflight region back.
        let chardev = format!("socket,id={id},path={},reconnect-ms=100", socket.display());
        self.0.extend(["-chardev".to_owned(), chardev]);
    }
}

/// How to start QEMU.
#[derive(Debug, Default)]
pub struct Settings<'a> {
    /// Words added to the guest's kernel command line.
    pub append: &'a str,
    /// Waits for a migrated guest, instead of booting one; `migrate-incoming` will say where.
    pub incoming: bool,
}

impl Qemu {
    /// Boots the test guest with two CPUs and waits for its agent.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot(context: &Context, name: &str, devices: &Devices) -> Result<Self> {
        let mut qemu = Self::start(context, name, devices, &Settings::default())?;
        qemu.console.wait_ready(BOOT_LIMIT)?;
        Ok(qemu)
    }

    /// Starts QEMU with the test guest in two CPUs.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(
        context: &Context,
        name: &str,
        devices: &Devices,
        settings: &Settings<'_>,
    ) -> Result<Self> {
        let serial = context.scratch(&format!("{name}.serial"));
        let qmp = context.scratch(&format!("{name}.qmp"));
        // Early in its boot Linux counts interrupts of the PIT during a busy loop of ten ticks, and panics
        // ("IO-APIC + timer doesn't work!") where a loaded host gave the emulator no time for them.
        let append = format!(
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check {}",
            settings.append
        );
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-M", "q35,memory-backend=ram", "-accel", "tcg,thread=multi"])
            .args(["-cpu", "max", "-smp", "2", "-m", "512"])
            .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
            .arg("-kernel")
            .arg(context.asset("vmlinux"))
            .arg("-initrd")
            .arg(context.asset("guest-initramfs.cpio"))
            .args(["-append", &append])
            .args([
                "-chardev",
                &format!("socket,id=serial,path={},server=on", serial.display()),
            ])
            .args(["-serial", "chardev:serial"])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", qmp.display()),
            ])
            .args(&devices.0);
        if settings.incoming {
            command.args(["-incoming", "defer"]);
        }
        let process = Process::spawn(name, command, &context.log(name))?;
        // server=on waits for us before the guest starts, so that no line is lost.
        let stream = process.connect(&serial, seconds(30))?;
        let mut console = Console::new(stream, &context.log(&format!("{name}-serial")))?;
        console.resend_lost(seconds(10));
        Ok(Self {
            console,
            process,
            qmp,
        })
    }

    /// Its control socket, for one at a time.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn control(&self) -> Result<Qmp> {
        Qmp::new(self.process.connect(&self.qmp, seconds(30))?)
    }

    /// The guest powers itself off; QEMU must end with 0.
    ///
    /// # Errors
    /// It does not.
    pub fn power_off(&mut self) -> Result<()> {
        self.console.start("sync; poweroff -f")?;
        self.process.wait_success(seconds(60))
    }
}
