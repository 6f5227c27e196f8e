//! The command line as typed, and what it comes to.
//!
//! Flags follow Cloud Hypervisor. [`parse`] turns the words into [`Options`], or says why not in one
//! line: exit code 2 where the words are wrong, 1 where they are understood and cannot be done.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Parser};

use crate::config::{ArgError, PayloadConfig, VmConfig, convert, device_flags};
use crate::sandbox;
use crate::socket::ApiSocket;
use crate::telemetry::events::EventMonitor;

const EXAMPLES: &str = "\
Examples:
  A kernel with an initramfs on this terminal (leave it by 'poweroff' in the guest, or by SIGTERM;
  Ctrl-C goes to the guest):
    berth-vmm --kernel vmlinux --initramfs root.cpio --cmdline 'console=ttyS0' --memory size=512M

  Two vCPUs, the root on an image, a network card, the console in a file, an API socket; a berth-blk and
  a berth-net are started for the guest and end with it:
    berth-vmm --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda1' \\
      --cpus boot=2 --memory size=1G \\
      --disk path=disk.img --net tap=tap0,mac=52:54:00:12:34:56 \\
      --serial file=serial.log --api-socket path=/run/vm.sock
    curl --unix-socket /run/vm.sock http://localhost/api/v1/vm.info

  Daemons that are started by somebody else, a folder shared by virtiofsd, a device of another type:
    berth-blk --socket-path=/run/disk.sock --blk-file=disk.img &
    virtiofsd --socket-path=/run/fs.sock --shared-dir=/srv &
    berth-vmm --kernel vmlinuz --disk vhost_user=on,socket=/run/disk.sock \\
      --fs tag=srv,socket=/run/fs.sock \\
      --generic-vhost-user device_type=rng,socket=/run/rng.sock,queue_sizes=[64]

  Free memory of the guest goes back to the host, and 256 MiB more, unless the guest needs them (docs/balloon.md):
    berth-vmm --kernel vmlinuz --memory size=1G --api-socket path=/run/vm.sock \\
      --balloon size=256M,deflate_on_oom=on,free_page_reporting=on
    curl --unix-socket /run/vm.sock -X PUT http://localhost/api/v1/vm.resize -d '{\"desired_balloon\": 0}'

  A guest whose pages can be merged with those of others, beside its disk daemon:
    berth-vmm --kernel vmlinuz --disk path=disk.img --memory size=2G,mergeable=on

  A guest none of whose memory another process has: this one copies what its disk reads and writes:
    berth-vmm --kernel vmlinuz --disk path=disk.img --memory size=2G,shared=off

  No guest yet: it is created and booted through the API (docs/api.md):
    berth-vmm --api-socket path=/run/vm.sock

  A program of kvm-unit-tests (docs/kvm-unit-tests.md); the exit code is the program's:
    berth-vmm --kernel x86/apic.flat --initramfs environment --cpus boot=2 --platform test-device=on

  No PIC and no PIT, the IOAPIC in this process, halted vCPUs sleep at once:
    berth-vmm --kernel vmlinux --initramfs root.cpio --platform irqchip=split,halt_poll_ns=0

A value with a comma in it is written in double quotes: --kernel '\"/boot/a,b\",entry=pvh'.
Exit code: 0 the guest powered off or was told to, 1 it could not run or died, 2 wrong usage; with
test-device=on, what the guest wrote to port 0xf4, doubled and one added.";

#[derive(Debug, Parser)]
#[command(
    name = "berth-vmm",
    version,
    about = "Runs one KVM guest whose disks and network cards are vhost-user daemons",
    after_help = EXAMPLES,
    disable_help_subcommand = true
)]
struct Flags {
    /// Kernel: ELF vmlinux, bzImage or multiboot image; entered as fits it unless entry= says. Without
    /// it the VMM waits for vm.create on its API socket
    #[arg(long, value_name = "PATH[,entry=pvh|linux64|bzimage|multiboot]")]
    kernel: Option<String>,
    /// Initial root file system
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// Virtual CPUs, 1 to 255 (1024 with --platform irqchip=split), features to add or take away (docs/cpu.md), the host's CPUs that each may run on
    #[arg(
        long,
        value_name = "boot=N,features=+NAME,-NAME,affinity=[VCPU@[CPU,CPU-CPU],...]",
        default_value = "boot=1"
    )]
    cpus: String,
    /// Guest memory, a multiple of 2 MiB. mergeable: whether KSM may merge it, where it is told to (on) or all from the
    /// start (always); vhost-user devices then reach a window of it only, and with shared=off nothing (docs/memory.md)
    #[arg(
        long,
        value_name = "size=SIZE,shared=on|off,mergeable=on|off|always,window=SIZE,hugepages=on|off,hugepage_size=2M|1G,thp=on|off,prefault=on|off",
        default_value = "size=512M"
    )]
    memory: String,
    /// A disk: an image, for which a berth-blk is started, or the socket of a vhost-user-blk daemon; also
    /// serial=, backend=PROGRAM, bw_size=, bw_one_time_burst=, bw_refill_time=, ops_size= …; dma=shadow: the daemon gets
    /// none of the guest's memory, dma=window: nothing but a window of it (docs/memory.md)
    /// [default: num_queues=1,queue_size=128]
    #[arg(long, action = ArgAction::Append, num_args = 1..,
          value_name = "path=IMAGE|socket=PATH,readonly=on|off,direct=on|off,num_queues=N,queue_size=N,dma=window|shadow,id=ID")]
    disk: Vec<String>,
    /// A network card: a tap, for which a berth-net is started, or the socket of a vhost-user-net daemon,
    /// where with vhost_mode=server the VMM listens; also backend=PROGRAM, bw_size= … as for a disk
    /// [default: num_queues=2,queue_size=256]
    #[arg(long, action = ArgAction::Append, num_args = 1..,
          value_name = "tap=NAME|fd=[N,N]|socket=PATH,mac=MAC,mtu=N,vhost_mode=client|server,num_queues=N,queue_size=N,dma=window|shadow,id=ID")]
    net: Vec<String>,
    /// A shared folder: the socket of a virtiofs daemon; the guest mounts it by its tag
    /// [default: num_queues=1,queue_size=1024]
    #[arg(long, action = ArgAction::Append, num_args = 1..,
          value_name = "tag=TAG,socket=PATH,num_queues=N,queue_size=N,dma=window|shadow,id=ID")]
    fs: Vec<String>,
    /// A device of any other type: the socket of its vhost-user daemon
    #[arg(long, action = ArgAction::Append, num_args = 1..,
          value_name = "device_type=NAME|NUMBER,socket=PATH,queue_sizes=[N,N],dma=window|shadow,id=ID")]
    generic_vhost_user: Vec<String>,
    /// First serial port
    #[arg(
        long,
        value_name = "tty|pty|null|off|file=PATH|socket=PATH",
        default_value = "tty"
    )]
    serial: String,
    /// Source of the guest's entropy
    #[arg(long, value_name = "src=PATH", default_value = "src=/dev/urandom")]
    rng: String,
    /// A memory balloon: what it takes from the guest at boot (vm.resize changes it), whether the guest takes it back
    /// when it is out of memory, whether the guest's free pages go back to the host (docs/balloon.md)
    #[arg(
        long,
        value_name = "size=SIZE,deflate_on_oom=on|off,free_page_reporting=on|off"
    )]
    balloon: Option<String>,
    /// The board: vendor of root ports, and how many of them wait for devices that are added later; who has the
    /// interrupt controllers (kernel: all in KVM; split: the IOAPIC here, no PIC and no PIT); how many ns KVM
    /// polls for a halted vCPU before it sleeps, at most; the domain whose guests may share pages with this one
    #[arg(
        long,
        value_name = "root_port_vendor=0xID,hotplug_ports=N,irqchip=kernel|split,halt_poll_ns=N,test-device=on|off,trust_domain=NAME",
        default_value = "root_port_vendor=0x1b36,hotplug_ports=8,irqchip=kernel"
    )]
    platform: String,
    /// Unix socket of the REST API: where to listen, or one that listens
    #[arg(long, value_name = "path=PATH|fd=N")]
    api_socket: Option<String>,
    /// Where events go as JSON: a FIFO or file, or a descriptor; what its reader does not take is dropped
    #[arg(long, value_name = "path=PATH|fd=N")]
    event_monitor: Option<String>,
    /// Unix socket that answers with counters as Prometheus text
    #[arg(long, value_name = "PATH")]
    metrics_socket: Option<PathBuf>,
    /// Print what each step to the guest's first instruction took, on standard error
    #[arg(long)]
    startup_trace: bool,
    /// Whether the process confines itself [default: on]; log: the kernel logs what would be refused
    #[arg(long, value_name = "on|off|log")]
    sandbox: Option<String>,
    /// The same, in Cloud Hypervisor's words
    #[arg(long, value_name = "true|false|log")]
    seccomp: Option<String>,
    /// Confine files also where system calls are not confined
    #[arg(long)]
    landlock: bool,
    /// A file or folder that requests of the API may name later
    #[arg(long, action = ArgAction::Append, num_args = 1.., value_name = "path=PATH,access=r|w|rw")]
    landlock_rules: Vec<String>,
    /// File for the log, else standard error
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// More log: debug, trace (-vv); RUST_LOG overrides
    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
}

/// The command line, read.
#[derive(Debug)]
pub struct Options {
    /// The guest; none, one is to be created through the API.
    pub config: Option<VmConfig>,
    /// Where the API listens.
    pub api_socket: Option<ApiSocket>,
    /// Where events go.
    pub event_monitor: Option<EventMonitor>,
    /// Where metrics are served.
    pub metrics_socket: Option<PathBuf>,
    /// Whether the way to the first instruction is timed.
    pub startup_trace: bool,
    /// What the process gives up.
    pub sandbox: sandbox::Settings,
    /// Where the log goes, else standard error.
    pub log_file: Option<PathBuf>,
    /// How many `-v`.
    pub verbosity: u8,
}

/// What to do instead of running a guest.
#[derive(Debug)]
pub enum Stop {
    /// Print this text on standard output and exit with 0 (`--help`, `--version`).
    Print(String),
    /// Print this line on standard error and exit with 2.
    Usage(String),
}

impl From<ArgError> for Stop {
    fn from(error: ArgError) -> Self {
        Self::Usage(error.to_string())
    }
}

/// Reads the command line; the first word is the program's name.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Options, Stop> {
    let flags = Flags::try_parse_from(words).map_err(|error| stop(&error))?;
    let api_socket = flags.api_socket.as_deref().map(convert::api_socket);
    let api_socket = api_socket.transpose()?;
    if flags.kernel.is_none() && api_socket.is_none() {
        let line = "--kernel is missing (or --api-socket, for a guest that is created later)";
        return Err(Stop::Usage(line.to_owned()));
    }
    Ok(Options {
        api_socket,
        event_monitor: flags
            .event_monitor
            .as_deref()
            .map(convert::event_monitor)
            .transpose()?,
        metrics_socket: flags.metrics_socket.clone(),
        startup_trace: flags.startup_trace,
        sandbox: sandbox::Settings::from_flags(
            flags.sandbox.as_deref(),
            flags.seccomp.as_deref(),
            flags.landlock,
            &flags.landlock_rules,
        )?,
        log_file: flags.log_file.clone(),
        verbosity: flags.verbose,
        config: guest(flags)?,
    })
}

/// The guest. Its flags are read also where there is no kernel, so that a wrong one is never silent.
fn guest(flags: Flags) -> Result<Option<VmConfig>, Stop> {
    let disks = flags.disk.iter().enumerate();
    let nets = flags.net.iter().enumerate();
    let fs = flags.fs.iter().enumerate();
    let generics = flags.generic_vhost_user.iter().enumerate();
    let kernel = flags.kernel.as_deref().unwrap_or("none");
    let (kernel, entry) = convert::kernel(kernel)?;
    let config = VmConfig {
        cpus: convert::cpus(&flags.cpus)?,
        affinity: convert::affinity(&flags.cpus)?,
        memory: convert::memory(&flags.memory)?,
        payload: PayloadConfig {
            kernel,
            entry,
            initramfs: flags.initramfs,
            cmdline: flags.cmdline,
        },
        disks: disks
            .map(|(index, text)| device_flags::disk(text, index))
            .collect::<Result<_, _>>()?,
        nets: nets
            .map(|(index, text)| device_flags::net(text, index))
            .collect::<Result<_, _>>()?,
        fs: fs
            .map(|(index, text)| device_flags::fs(text, index))
            .collect::<Result<_, _>>()?,
        generics: generics
            .map(|(index, text)| device_flags::generic(text, index))
            .collect::<Result<_, _>>()?,
        serial: convert::serial(&flags.serial)?,
        serial_is_console: false,
        rng: convert::rng(&flags.rng)?,
        balloon: flags.balloon.as_deref().map(convert::balloon).transpose()?,
        platform: convert::platform(&flags.platform)?,
    };
    Ok(flags.kernel.map(|_| config))
}

/// One line out of clap's paragraphs.
fn stop(error: &clap::Error) -> Stop {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return Stop::Print(error.to_string());
    }
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim);
    let mut line = lines
        .next()
        .unwrap_or_default()
        .trim_start_matches("error: ")
        .to_owned();
    if line.ends_with(':') {
        // "the following required arguments were not provided:" and their names below.
        let rest = lines.take_while(|line| !line.is_empty());
        line = format!("{line} {}", rest.collect::<Vec<_>>().join(" "));
    }
    if let Some(ContextValue::String(near)) = error.get(ContextKind::SuggestedArg) {
        line.push_str(&format!(" (nearest: '{near}')"));
    }
    Stop::Usage(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Options, Stop> {
        let words = format!("berth-vmm {line}");
        parse(words.split_whitespace().map(OsString::from))
    }

    fn usage(line: &str) -> String {
        match run(line) {
            Err(Stop::Usage(text)) => text,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn disks_may_follow_one_flag_or_several() {
        let options =
            run("--kernel /k --disk socket=/a socket=/b --net socket=/n --disk socket=/c");
        let config = options.unwrap().config.unwrap();
        let ids: Vec<_> = config.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["_disk0", "_disk1", "_disk2"]);
        assert_eq!(config.nets.len(), 1);
    }

    #[test]
    fn a_command_line_for_the_guest_may_begin_with_a_dash() {
        let options = run("--kernel /k --cmdline --").unwrap();
        assert_eq!(options.config.unwrap().payload.cmdline, "--");
    }

    #[test]
    fn wrong_words_get_one_line_that_names_the_nearest() {
        let text = usage("--kernel /k --cpu boot=1");
        assert!(
            text.contains("'--cpu'") && text.contains("nearest: '--cpus'"),
            "{text}"
        );
        let text = usage("--memory size=1G");
        assert!(text.contains("--kernel"), "{text}");
        for line in [
            "--kernel /k --disk sokcet=/a",
            "--kernel",
            "--kernel /k stray",
        ] {
            assert_eq!(usage(line).lines().count(), 1, "{line}");
        }
    }

    #[test]
    fn without_a_kernel_there_must_be_an_api() {
        let options = run("--api-socket path=/a").unwrap();
        assert_eq!(options.config, None);
        assert_eq!(options.api_socket, Some(ApiSocket::Path("/a".into())));
        let text = usage("--api-socket /a --disk sokcet=/a");
        assert!(text.contains("'sokcet'"), "{text}");
    }

    #[test]
    fn version_and_help_are_printed() {
        let Err(Stop::Print(version)) = run("--version") else {
            panic!("no version");
        };
        assert_eq!(
            version,
            format!("berth-vmm {}\n", env!("CARGO_PKG_VERSION"))
        );
        let Err(Stop::Print(help)) = run("--help") else {
            panic!("no help");
        };
        assert!(help.contains("Examples:"));
    }
}
