//! Real guests under berth-vmm and its peers, all alike: one kernel, one initramfs, one disk, one network card.
//!
//! ```text
//!   Stage: kernel, image, namespace           once for a scenario
//!     └ start(kind) ─▶ Machine                VMM ── stdin/stdout ── Console (the agent of tests/lab)
//!                        ├ processes          the VMM, what it has started, and what we start beside it
//!                        └ drop               kills them
//! ```
//!
//! Guests run where the host's KVM runs them, or in the lab. A tap for each machine, in a network namespace that
//! goes with the last process. This is no scenario.

pub(crate) mod command;
pub(crate) mod first_entry;
pub(crate) mod memory;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use berth_tests_framework::console::Console;
use berth_tests_framework::net;
use berth_tests_framework::process::Process;

use self::command::{Kind, Shape};
use self::memory::Memory;
use super::Subject;
use crate::context::Context;
use crate::sys;

/// How long a guest may take to boot, in an emulated host.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(150);
/// How long a command in it may take.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(120);
const DISK_BYTES: usize = 64 << 20;

/// Who runs a guest, and with what.
#[derive(Clone, Debug)]
pub(crate) struct Runner {
    pub(crate) subject: Subject,
    kind: Kind,
    program: PathBuf,
    /// The disk's daemon where it does not start one itself.
    daemon: Option<PathBuf>,
}

/// What guests of one scenario have in common.
pub(crate) struct Stage {
    pub(crate) runners: Vec<Runner>,
    kernel: PathBuf,
    initramfs: PathBuf,
    folder: PathBuf,
    vhost_net: bool,
    /// Machines started so far: each has a folder, a tap and an address of its own.
    started: u8,
}

/// A guest that boots or runs. Dropping it kills it.
pub(crate) struct Machine {
    pub(crate) console: Console,
    pub(crate) vmm: Process,
    pub(crate) guest_bytes: u64,
    /// Addresses of the host and the guest on its tap.
    host: Ipv4Addr,
    guest: Ipv4Addr,
    /// Ends after the VMM.
    daemon: Option<Process>,
    tap: String,
}

impl Stage {
    /// Finds programs and assets, and enters a network namespace.
    pub(crate) fn new(context: &mut Context, scenario: &str) -> Result<Stage> {
        let assets = context.assets()?;
        let folder = context.folder(scenario)?;
        let mut runners = Vec::new();
        for ours in context.ours("berth-vmm")? {
            for daemon in ["berth-blk", "berth-net"] {
                // It looks for them beside itself.
                context.ours(daemon)?;
            }
            runners.push(Runner {
                subject: ours.subject,
                kind: Kind::Berth,
                program: ours.program,
                daemon: None,
            });
        }
        for (name, kind) in [
            ("qemu-q35", Kind::Q35),
            ("cloud-hypervisor", Kind::CloudHypervisor),
            ("firecracker", Kind::Firecracker),
        ] {
            if let Some(program) = context.peer(name) {
                runners.push(Runner {
                    subject: Subject::peer(name),
                    kind,
                    program,
                    daemon: None,
                });
            }
        }
        sys::own_network().context("cannot make a network namespace (as root)")?;
        // Where it is a module that is not loaded yet; where it cannot be, the table says so.
        let _ = std::process::Command::new("modprobe")
            .arg("vhost_net")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status();
        Ok(Stage {
            runners,
            kernel: assets.join("vmlinux"),
            initramfs: assets.join("guest-initramfs.cpio"),
            folder,
            vhost_net: std::path::Path::new("/dev/vhost-net").exists(),
            started: 0,
        })
    }

    /// One more peer: QEMU with the disk in a daemon, as ours is.
    pub(crate) fn add_storage_daemon(&mut self, context: &mut Context) {
        let qemu = context.peer("qemu-q35");
        if let (Some(program), Some(daemon)) = (qemu, context.peer("qemu-storage-daemon")) {
            self.runners.push(Runner {
                subject: Subject::peer("qemu-q35+qsd"),
                kind: Kind::Q35Daemon,
                program,
                daemon: Some(daemon),
            });
        }
    }

    /// In the order of running.
    pub(crate) fn subjects(&self) -> Vec<Subject> {
        let subjects = self.runners.iter().map(|runner| runner.subject.clone());
        subjects.collect()
    }

    /// Starts a guest. `before` is called when everything is there but the VMM.
    pub(crate) fn start(
        &mut self,
        runner: usize,
        cpus: u32,
        memory_mib: u64,
        before: impl FnOnce() -> Result<()>,
    ) -> Result<(Machine, Instant)> {
        let runner = self.runners[runner].clone();
        self.started = self
            .started
            .checked_add(1)
            .context("more than 255 guests")?;
        let number = self.started;
        let folder = self.folder.join(number.to_string());
        std::fs::create_dir(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let shape = Shape {
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cpus,
            memory_mib,
            disk: folder.join("disk.raw"),
            tap: format!("perf{number}"),
            mac: format!("52:54:00:be:70:{number:02x}"),
            vhost_net: self.vhost_net,
        };
        // Blocks that are there: holes are answered without the disk.
        std::fs::write(&shape.disk, vec![0x5a; DISK_BYTES])?;
        net::make_tap(&shape.tap)?;
        let [host, guest] = [1, 2].map(|last| Ipv4Addr::new(10, 70, number, last));
        net::bring_up(&shape.tap, host)?;
        let socket = folder.join("disk.sock");
        let daemon = runner.daemon.as_ref().map(|program| {
            let command = command::storage_daemon(program, &shape.disk, &socket);
            let daemon = Process::spawn("disk daemon", command, &folder.join("daemon.log"))?;
            daemon.wait_path(&socket, Duration::from_secs(30))?;
            anyhow::Ok(daemon)
        });
        let daemon = daemon.transpose()?;
        let place = daemon.as_ref().map(|_| socket.as_path());
        let command = runner
            .kind
            .command(&runner.program, &shape, &folder, place)?;
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        let stdio = (Stdio::from(theirs.try_clone()?), Stdio::from(theirs));
        before()?;
        let began = Instant::now();
        let name = &runner.subject.name;
        let vmm = Process::spawn_with_stdio(name, command, stdio, &folder.join("vmm.log"))?;
        let machine = Machine {
            console: Console::new(ours, &folder.join("serial.log"))?,
            vmm,
            guest_bytes: memory_mib << 20,
            host,
            guest,
            daemon,
            tap: shape.tap,
        };
        Ok((machine, began))
    }

    /// Starts a guest and waits until its agent is there.
    pub(crate) fn boot(&mut self, runner: usize, cpus: u32, memory_mib: u64) -> Result<Machine> {
        let (mut machine, _) = self.start(runner, cpus, memory_mib, || Ok(()))?;
        machine.wait_ready()?;
        Ok(machine)
    }
}

impl Machine {
    /// Waits until its agent is there; where the VMM ends instead, its last words say why.
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        self.console.wait_ready(BOOT_LIMIT).map_err(|error| {
            let said = self.vmm.output().unwrap_or_default();
            match said.lines().rev().find(|line| !line.trim().is_empty()) {
                Some(last) => error.context(format!("{} said: {last}", self.vmm.name())),
                None => error,
            }
        })
    }

    /// Gives its card an address and waits for an answer of the host.
    pub(crate) fn network_up(&mut self) -> Result<()> {
        let Machine { host, guest, .. } = self;
        let command = format!(
            "ip addr add {guest}/24 dev eth0 && ip link set eth0 up && \
             for n in $(seq 50); do ping -c 1 -W 1 {host} >/dev/null && exit 0; done; exit 1"
        );
        let up = self.console.sh_within(&command, COMMAND_LIMIT);
        up.map(drop).context("the guest's network does not come up")
    }

    /// The VMM, all that it has started, and what we have started beside it.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        let mut all = memory::family(self.vmm.pid())?;
        all.extend(self.daemon.as_ref().map(Process::pid));
        Ok(all)
    }

    /// Of each of its processes: its name, and its memory.
    pub(crate) fn memory(&self) -> Result<Vec<(String, Memory)>> {
        let of = |pid: u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"))?;
            let memory = memory::of_process(pid, self.guest_bytes)?;
            Ok((name.trim_end().to_owned(), memory))
        };
        self.processes()?.into_iter().map(of).collect()
    }

    /// Numbers of all threads of its processes.
    pub(crate) fn threads(&self) -> Result<Vec<i32>> {
        let mut all = Vec::new();
        for pid in self.processes()? {
            for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                all.extend(
                    entry?
                        .file_name()
                        .to_str()
                        .and_then(|tid| tid.parse::<i32>().ok()),
                );
            }
        }
        Ok(all)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vmm.kill();
        // The namespace would end it too; a hundred of them are in the way until then.
        let _ = berth_tests_framework::process::run("ip", &["link", "del", &self.tap]);
    }
}
