//! What the API answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::VmConfig;

/// `vmm.ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmPing {
    /// Version and build.
    #[serde(default)]
    pub build_version: String,
    /// Version.
    pub version: String,
    /// Process id of the VMM.
    #[serde(default)]
    pub pid: i64,
    /// Names of what was compiled in.
    #[serde(default)]
    pub features: Vec<String>,
}

/// State of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Being put together.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
    /// No machine.
    Shutdown,
}

/// `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// What it is made of.
    pub config: VmConfig,
    /// Its state.
    pub state: VmState,
    /// Guest RAM in bytes, less what a balloon has taken.
    #[serde(default)]
    pub memory_actual_size: u64,
    /// The balloon, while there is a machine with one. Ours alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonInfo>,
    /// Devices by id, while there is a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// A balloon in `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// Bytes that were asked for.
    pub target: u64,
    /// Bytes that the guest says it gave.
    pub actual: u64,
    /// What the guest last said of its memory, by name; absent, nothing yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<BTreeMap<String, u64>>,
    /// How long ago that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats_age_ms: Option<u64>,
}

/// A device in `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Its id.
    pub id: String,
    /// Address ranges; not told.
    #[serde(default)]
    pub resources: Vec<serde_json::Value>,
    /// Id of the device that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Ids of devices that belong to it.
    #[serde(default)]
    pub children: Vec<String>,
    /// Its PCI address, such as `0000:01:00.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// A device that was added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    /// Its id.
    pub id: String,
    /// Its PCI address, such as `0000:01:00.0`.
    pub bdf: String,
}

/// A device that is to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRemoveDevice {
    /// Its id.
    pub id: String,
}

/// What a guest is to have from now on; what is absent stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmResize {
    /// vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// Bytes of RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Bytes in the balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// `vm.counters`: by device or vCPU, then by name. What cannot be counted on a host is absent.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;

/// Body of every answer that is an error: what failed, then why.
pub type ErrorMessages = Vec<String>;
