//! What a guest is made of: the internal, validated configuration.
//!
//! Arguments as typed ([`crate::args`]) and the wire types of the API convert to these; nothing else in
//! the VMM reads either. Alternatives are enums, never groups of `Option`. [`convert`] makes a
//! configuration from text, [`validate`] holds it against the host.

pub mod affinity;
pub mod convert;
mod device;
pub mod device_flags;
pub mod device_wire;
pub mod keys;
mod memory;
pub mod shared_fd;
#[cfg(test)]
pub(crate) mod testing;
pub mod validate;

use std::path::PathBuf;

use berth_irqchip::Mode;

use crate::cpu::features::Features;

pub use self::device::{
    Bucket, Daemon, DiskConfig, Dma, FsConfig, GenericConfig, Image, Link, NetConfig, RateLimit,
    Serves, Tap, TapSource, VhostUserConfig,
};
pub use self::memory::{HugePages, MemoryConfig, Mergeable};

/// What was typed and cannot be read; the command line is at fault (exit code 2).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgError {
    /// A key that the flag does not have.
    #[error("{flag}: unknown key '{key}' ({hint})")]
    UnknownKey {
        /// The flag.
        flag: &'static str,
        /// The key as typed.
        key: String,
        /// The nearest known key.
        hint: String,
    },
    /// One key, two values.
    #[error("{flag}: '{key}' is given twice")]
    KeyTwice {
        /// The flag.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A word where `key=value` is expected.
    #[error("{flag}: '{item}' has no value, write it as key=value")]
    NoValue {
        /// The flag.
        flag: &'static str,
        /// The word.
        item: String,
    },
    /// A double quote that is never closed.
    #[error("{flag}: a quote is left open in '{text}'")]
    OpenQuote {
        /// The flag.
        flag: &'static str,
        /// All of the list.
        text: String,
    },
    /// A square bracket that is never closed.
    #[error("{flag}: a bracket is left open in '{text}'")]
    OpenBracket {
        /// The flag.
        flag: &'static str,
        /// All of the list.
        text: String,
    },
    /// A key that must be there.
    #[error("{flag}: {key}= is missing")]
    Missing {
        /// The flag.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong kind.
    #[error("{flag}: {key}={value} is not {expected}")]
    BadValue {
        /// The flag.
        flag: &'static str,
        /// The key.
        key: &'static str,
        /// The value as typed.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A list of CPU features.
    #[error("--cpus: {0}")]
    Features(#[from] crate::cpu::features::Error),
    /// A value that is understood and that this VMM does not do.
    #[error("{flag}: {what}")]
    Unsupported {
        /// The flag.
        flag: &'static str,
        /// What is not done, and what to write instead.
        what: String,
    },
    /// Two keys, of which one can be given.
    #[error("{flag}: {first}= and {second}= exclude each other")]
    Excluding {
        /// The flag.
        flag: &'static str,
        /// The one.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// A word that none of the flag's alternatives matches.
    #[error("{flag}: unknown value '{value}' ({hint})")]
    UnknownValue {
        /// The flag.
        flag: &'static str,
        /// The value as typed.
        value: String,
        /// The nearest known value.
        hint: String,
    },
}

/// A guest, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Where vCPUs may run; those that are not named run anywhere.
    pub affinity: Vec<affinity::VcpuAffinity>,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// What is started.
    pub payload: PayloadConfig,
    /// Block devices, in the order given.
    pub disks: Vec<DiskConfig>,
    /// Network cards, in the order given.
    pub nets: Vec<NetConfig>,
    /// Shared folders, in the order given.
    pub fs: Vec<FsConfig>,
    /// vhost-user devices of other types, in the order given.
    pub generics: Vec<GenericConfig>,
    /// Where the first serial port goes.
    pub serial: SerialConfig,
    /// Whether a client asked for it as `console`: there is no other console, so both names show it.
    pub serial_is_console: bool,
    /// Source of the guest's entropy device.
    pub rng: RngConfig,
    /// Memory that the guest lends to the host, if it has a device for that.
    pub balloon: Option<BalloonConfig>,
    /// What the board says it is.
    pub platform: PlatformConfig,
}

/// `--cpus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpusConfig {
    /// vCPUs present at boot, 1 to 255 with KVM's interrupt controllers, to 1024 with the split ones.
    pub boot: u16,
    /// Changes to the features that a guest gets.
    pub features: Features,
}

impl CpusConfig {
    /// So many vCPUs, with the features that a guest gets anyway.
    pub fn of(boot: u16) -> Self {
        Self {
            boot,
            features: Features::default(),
        }
    }
}

/// What is started and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadConfig {
    /// ELF vmlinux, bzImage or multiboot image.
    pub kernel: PathBuf,
    /// How the kernel is entered.
    pub entry: KernelEntry,
    /// First root file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line, without a final NUL.
    pub cmdline: String,
}

/// How a kernel is entered. Which of them keep KASLR: docs/boot.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelEntry {
    /// Chosen by what the file is: multiboot for a 32-bit image with its header; PVH for a vmlinux with the note, else linux64; a bzImage is unpacked here
    /// and entered by linux64.
    #[default]
    Auto,
    /// 32-bit entry of an ELF kernel's XEN_ELFNOTE_PHYS32_ENTRY note.
    Pvh,
    /// 64-bit entry of an ELF kernel, with a zero page.
    Linux64,
    /// A bzImage's own 64-bit entry: it unpacks and randomises itself.
    BzImage,
    /// A multiboot (version 1) image's 32-bit entry.
    Multiboot,
}

/// `--serial`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialConfig {
    /// The VMM's own terminal.
    Tty,
    /// A new pseudo-terminal, its name logged and in `vm.info`.
    Pty,
    /// Output dropped, no input.
    Null,
    /// No port at all.
    Off,
    /// Output to a file, made or truncated.
    File(PathBuf),
    /// A unix socket that one client at a time may join.
    Socket(PathBuf),
}

/// `--rng`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngConfig {
    /// Where the bytes come from.
    pub src: PathBuf,
}

/// `--balloon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Bytes that the guest is asked for when it boots.
    pub size_bytes: u64,
    /// Whether the guest takes pages back rather than kill a process for want of memory.
    pub deflate_on_oom: bool,
    /// Whether the guest's free pages go back to the host without being asked for.
    pub free_page_reporting: bool,
}

/// `--platform`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformConfig {
    /// PCI vendor id of the root ports above vhost-user devices.
    pub root_port_vendor: u16,
    /// Root ports without a device, for those that are added while the guest runs; fewer where bus 0 is
    /// full.
    pub hotplug_ports: u8,
    /// Whether there is a device by which test programs drive interrupt lines and end the process.
    pub test_device: bool,
    /// Who has the interrupt controllers (docs/adr/0003-default-irqchip.md).
    pub irqchip: Mode,
    /// How long a vCPU that halts is looked after before its thread sleeps, at most, in nanoseconds; none,
    /// as the host is set up (module parameter `halt_poll_ns` of kvm).
    pub halt_poll_ns: Option<u32>,
    /// Whose guests may share pages with this one: a tuner must name it. None, nobody may tune its memory.
    pub trust_domain: Option<String>,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            root_port_vendor: convert::DEFAULT_ROOT_PORT_VENDOR,
            hotplug_ports: convert::DEFAULT_HOTPLUG_PORTS,
            irqchip: Mode::Kernel,
            test_device: false,
            halt_poll_ns: None,
            trust_domain: None,
        }
    }
}
