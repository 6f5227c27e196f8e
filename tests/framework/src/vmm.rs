//! A guest under berth-vmm: its process, console and API.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::console::{Console, Output};
use crate::http::Api;
use crate::process::Process;
use crate::story::Context;
use crate::wait::seconds;

/// How long a guest may take to boot, in an emulated host with other guests beside it.
pub const BOOT_LIMIT: Duration = seconds(150);
/// How long the API may take to answer, whatever the guest and its backends do.
pub const API_LIMIT: Duration = seconds(10);

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct VmBuilder {
    name: String,
    kernel: String,
    initramfs: Option<PathBuf>,
    cmdline: String,
    cpus: u32,
    memory: String,
    devices: Vec<String>,
    api: Option<PathBuf>,
}

impl VmBuilder {
    /// A guest of one vCPU and 512 MiB that boots vmlinux to the agent.
    #[must_use]
    pub fn new(context: &Context, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            kernel: context.asset("vmlinux").display().to_string(),
            initramfs: Some(context.asset("guest-initramfs.cpio")),
            cmdline: "console=ttyS0 quiet panic=-1".to_owned(),
            cpus: 1,
            memory: "512M".to_owned(),
            devices: Vec::new(),
            api: None,
        }
    }

    /// Another kernel, with `,entry=` or without.
    #[must_use]
    pub fn kernel(mut self, kernel: impl Into<String>) -> Self {
        self.kernel = kernel.into();
        self
    }

    /// Another initramfs.
    #[must_use]
    pub fn initramfs(mut self, path: PathBuf) -> Self {
        self.initramfs = Some(path);
        self
    }

    /// No initramfs: the kernel mounts its root itself.
    #[must_use]
    pub fn no_initramfs(mut self) -> Self {
        self.initramfs = None;
        self
    }

    /// More words for the kernel.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// vCPUs.
    #[must_use]
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// Memory, as `--memory size=` takes it.
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        size.clone_into(&mut self.memory);
        self
    }

    /// The board, as `--platform` takes it.
    #[must_use]
    pub fn platform(mut self, value: &str) -> Self {
        self.devices
            .extend(["--platform".to_owned(), value.to_owned()]);
        self
    }

    /// A disk behind the daemon at `socket`; `more` as in `,num_queues=2`.
    #[must_use]
    pub fn disk(mut self, socket: &Path, more: &str) -> Self {
        let value = format!("vhost_user=on,socket={}{more}", socket.display());
        self.devices.extend(["--disk".to_owned(), value]);
        self
    }

    /// A network card behind the daemon at `socket`; `more` as in `,mac=52:54:00:00:00:01`.
    #[must_use]
    pub fn net(mut self, socket: &Path, more: &str) -> Self {
        let value = format!("vhost_user=on,socket={}{more}", socket.display());
        self.devices.extend(["--net".to_owned(), value]);
        self
    }

    /// Any other device: a flag and its value.
    #[must_use]
    pub fn device(mut self, flag: &str, value: impl Into<String>) -> Self {
        self.devices.extend([flag.to_owned(), value.into()]);
        self
    }

    /// The socket of the API at this path, for who looks for VMs in a folder.
    #[must_use]
    pub fn api_socket(mut self, path: PathBuf) -> Self {
        self.api = Some(path);
        self
    }

    /// The command line but for the serial line, and the socket of the API.
    fn command(&self, context: &Context) -> (Command, PathBuf) {
        let api = match &self.api {
            Some(path) => path.clone(),
            None => context.scratch(&format!("{}.api", self.name)),
        };
        let mut command = Command::new(context.bin("berth-vmm"));
        command.args(["--kernel", &self.kernel, "--cmdline", &self.cmdline]);
        if let Some(initramfs) = &self.initramfs {
            command.arg("--initramfs").arg(initramfs);
        }
        command.args(["--cpus", &format!("boot={}", self.cpus)]);
        command.args(["--memory", &format!("size={}", self.memory)]);
        command.args(&self.devices);
        command.args(["--api-socket", &format!("path={}", api.display())]);
        (command, api)
    }

    /// A command that runs the guest on the caller's terminal.
    #[must_use]
    pub fn command_on_terminal(&self, context: &Context) -> Command {
        let (mut command, _) = self.command(context);
        command.args(["--serial", "tty"]);
        command
    }

    /// Starts the VMM and joins its serial line; the guest boots meanwhile.
    ///
    /// # Errors
    /// The VMM ends before its serial line is there.
    pub fn start(&self, context: &Context) -> Result<Vm> {
        let serial = context.scratch(&format!("{}.serial", self.name));
        let (mut command, api) = self.command(context);
        command.args(["--serial", &format!("socket={}", serial.display())]);
        let process = Process::spawn(&self.name, command, &context.log(&self.name))?;
        let stream = process.connect(&serial, seconds(30))?;
        let log = context.log(&format!("{}-serial", self.name));
        Ok(Vm {
            console: Console::new(stream, &log)?,
            api: Api::new(&api, API_LIMIT),
            process,
        })
    }

    /// Starts the VMM and waits for the agent in the guest.
    ///
    /// # Errors
    /// The guest does not come up.
    pub fn boot(&self, context: &Context) -> Result<Vm> {
        let mut vm = self.start(context)?;
        vm.console.wait_ready(BOOT_LIMIT)?;
        // What the boot cost in exits, for whoever wonders.
        let counters = context.log(&self.name).with_extension("counters.json");
        std::fs::write(&counters, format!("{:#}\n", vm.counters()?))?;
        Ok(vm)
    }
}

/// A running guest. Dropping it kills the VMM.
#[derive(Debug)]
pub struct Vm {
    /// The guest's serial line.
    pub console: Console,
    /// The VMM's API.
    pub api: Api,
    /// The VMM.
    pub process: Process,
}

impl Vm {
    /// Runs a command in the guest that must succeed.
    ///
    /// # Errors
    /// It failed, or the guest does not answer.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.console.sh(command)
    }

    /// Runs a command in the guest.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn run(&mut self, command: &str) -> Result<Output> {
        self.console.run(command)
    }

    /// `state` of vm.info.
    ///
    /// # Errors
    /// The API does not answer.
    pub fn state(&self) -> Result<String> {
        let info = self.api.get("vm.info")?;
        info["state"]
            .as_str()
            .map(str::to_owned)
            .context("vm.info without a state")
    }

    /// `vm.counters`.
    ///
    /// # Errors
    /// The API does not answer.
    pub fn counters(&self) -> Result<Value> {
        self.api.get("vm.counters")
    }

    /// The guest powers itself off; the VMM must end with 0.
    ///
    /// # Errors
    /// It does not.
    pub fn power_off(&mut self) -> Result<()> {
        self.console.start("sync; poweroff -f")?;
        self.wait_off()
    }

    /// Waits for the VMM's end with 0.
    ///
    /// # Errors
    /// It ends otherwise, or not at all.
    pub fn wait_off(&mut self) -> Result<()> {
        self.process.wait_success(seconds(60))
    }

    /// Waits until the guest, told to reboot, has its agent again; the same VMM must run it.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reboot(&mut self) -> Result<()> {
        self.console.start("sync; reboot -f")?;
        self.console.wait_ready(BOOT_LIMIT)?;
        if !self.process.is_running() {
            bail!("the VMM ended at the guest's reboot");
        }
        Ok(())
    }
}

/// Brings a guest's network interface up with an address of a /24.
///
/// # Errors
/// The guest has no such interface.
pub fn bring_up(console: &mut Console, interface: &str, address: Ipv4Addr) -> Result<()> {
    console
        .sh(&format!(
            "ip addr add {address}/24 dev {interface} && ip link set {interface} up"
        ))
        .map(drop)
}
