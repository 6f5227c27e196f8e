//! What a guest is made of, as clients write and read it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig};

/// A guest, whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Memory.
    pub memory: MemoryConfig,
    /// What is started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network cards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Shared folders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// vhost-user devices of any other type.
    #[serde(alias = "generic-vhost-user", skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Entropy.
    pub rng: RngConfig,
    /// Balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// First serial port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<ConsoleConfig>,
    /// Console.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// The board.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// What clients may ask for beside that.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// Virtual CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusConfig {
    /// Present at boot.
    pub boot_vcpus: u32,
    /// Present at most.
    pub max_vcpus: u32,
    /// Features to add (`+x`) and to take away (`-x`). Ours alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub feature_flags: Vec<String>,
    /// Where vCPUs may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
}

/// A vCPU and the CPUs of the host that it may run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuAffinity {
    /// The vCPU.
    pub vcpu: u32,
    /// CPUs of the host.
    pub host_cpus: Vec<usize>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            feature_flags: Vec::new(),
            affinity: None,
        }
    }
}

/// Memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Bytes.
    pub size: u64,
    /// Whether other processes can map it; absent, as fits the devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<bool>,
    /// Whether KSM may merge its pages.
    #[serde(default, skip_serializing_if = "Mergeable::is_off")]
    pub mergeable: Mergeable,
    /// Whether it is made of huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Bytes of a huge page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether it may be made of transparent huge pages; absent, it may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thp: Option<bool>,
    /// Whether all of it is there before the guest starts.
    #[serde(default, skip_serializing_if = "is_false")]
    pub prefault: bool,
    /// How much of it other processes can map where the rest is mergeable, in bytes. Ours alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// Parts of it; read where `size` is 0, and never written.
    #[serde(default, skip_serializing)]
    pub zones: Option<Vec<MemoryZone>>,
}

/// A part of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryZone {
    /// Bytes.
    pub size: u64,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: None,
            mergeable: Mergeable::default(),
            hugepages: false,
            hugepage_size: None,
            thp: None,
            prefault: false,
            window: None,
            zones: None,
        }
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Whether KSM may merge pages: `true` or `false` as elsewhere, or the word `always`, which is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Mergeable {
    /// Where somebody who may says so; or not at all.
    Eligible(bool),
    /// All that can be.
    Word(MergeableWord),
}

/// A word that stands for more than `true`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeableWord {
    /// From the start.
    Always,
}

impl Default for Mergeable {
    fn default() -> Self {
        Self::Eligible(false)
    }
}

impl Mergeable {
    /// Whether no page may be merged.
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

/// What is started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PayloadConfig {
    /// Kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// How it is entered: `pvh`, `linux64`, `bzimage` or `multiboot`; absent, what fits the file. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// Its command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// First root file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Firmware; not served.
    #[serde(skip_serializing)]
    pub firmware: Option<PathBuf>,
    /// A confidential guest's image; not served.
    #[serde(skip_serializing)]
    pub igvm: Option<PathBuf>,
}

/// Entropy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// Where it comes from.
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
        }
    }
}

/// A balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonConfig {
    /// Bytes that it takes from the guest at boot.
    pub size: u64,
    /// Whether the guest takes them back when it is out of memory.
    pub deflate_on_oom: bool,
    /// Whether the guest's free pages go back to the host.
    pub free_page_reporting: bool,
}

/// Where a console goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// There is none.
    #[default]
    Off,
    /// A pseudo-terminal, named by `file`.
    Pty,
    /// The VMM's terminal.
    Tty,
    /// A file, named by `file`.
    File,
    /// A socket, named by `socket`.
    Socket,
    /// Nowhere.
    Null,
}

/// A console.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleConfig {
    /// Where it goes.
    pub mode: ConsoleMode,
    /// File or pseudo-terminal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// The board.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlatformConfig {
    /// PCI vendor id of the root ports. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_port_vendor: Option<u16>,
    /// Root ports for devices that are added later. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_ports: Option<u8>,
    /// Whether test programs find the device that they are ended by. Ours alone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub test_device: bool,
    /// Who has the interrupt controllers: `kernel` or `split`. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub irqchip: Option<String>,
    /// How long KVM polls for a halted vCPU, at most. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub halt_poll_ns: Option<u32>,
    /// Whose guests may share pages with this one. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_send_is_read_and_what_we_do_not_know_ignored() {
        let text = r#"{
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2, "features": {"amx": false}},
            "memory": {"size": 1073741824, "shared": true, "thp": true},
            "payload": {"kernel": "/k", "cmdline": "quiet"},
            "disks": [{"vhost_user": true, "vhost_socket": "/d", "num_queues": 1, "queue_size": 128}],
            "console": {"mode": "Off"},
            "serial": {"mode": "Tty", "iommu": false},
            "watchdog": false
        }"#;
        let config: VmConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.cpus.boot_vcpus, 2);
        assert_eq!(config.serial.unwrap().mode, ConsoleMode::Tty);
        assert_eq!(config.disks.unwrap()[0].vhost_socket, Some("/d".into()));
        assert_eq!(config.rng.src, PathBuf::from("/dev/urandom"));
        assert_eq!(config.other.keys().collect::<Vec<_>>(), ["watchdog"]);
    }

    #[test]
    fn what_we_write_has_their_names() {
        let text = serde_json::to_value(VmConfig::default()).unwrap();
        assert_eq!(text["cpus"]["boot_vcpus"], 1);
        assert_eq!(text["memory"]["size"], 512 << 20);
        assert_eq!(text.get("serial"), None);
        assert_eq!(text.get("disks"), None);
    }
}
