//! Version 1, below `/api/v1/`.
//!
//! | request | body | answer |
//! |---|---|---|
//! | GET `vmm.ping` | | [`VmmPing`] |
//! | GET `vm.info` | | [`VmInfo`] |
//! | GET `vm.counters` | | [`VmCounters`] |
//! | PUT `vm.create` | [`VmConfig`] | 204 |
//! | PUT `vm.boot`, `vm.pause`, `vm.resume`, `vm.power-button`, `vm.reboot`, `vm.shutdown`, `vm.delete`, `vmm.shutdown` | | 204 |
//! | PUT `vm.add-disk`, `vm.add-net` | [`DiskConfig`], [`NetConfig`] | [`PciDeviceInfo`], or 204 without a machine |
//! | GET `vm.memory-sample` | | [`MemoryMergeable`] |
//! | PUT `vm.memory-sample` | [`MemorySample`] | [`MemoryHashes`] |
//! | PUT `vm.memory-advice` | [`MemoryAdvice`] | 204 |
//! | PUT `vm.resize` | [`VmResize`] | 204 |
//! | PUT `vm.remove-device` | [`VmRemoveDevice`] | 204 |
//!
//! An error has an [`ErrorMessages`]; docs/api.md has the codes.

mod config;
mod devices;
mod memory;
mod vm;

pub use config::{
    BalloonConfig, ConsoleConfig, ConsoleMode, CpuAffinity, CpusConfig, MemoryConfig, MemoryZone,
    Mergeable, MergeableWord, PayloadConfig, PlatformConfig, RngConfig, VmConfig,
};
pub use devices::{
    DiskConfig, Dma, FsConfig, GenericVhostUserConfig, NetConfig, RateLimiterConfig,
    TokenBucketConfig, VhostMode,
};
pub use memory::{
    Advice, MemoryAdvice, MemoryExtent, MemoryHashes, MemoryMergeable, MemoryRange, MemorySample,
};
pub use vm::{
    BalloonInfo, DeviceNode, ErrorMessages, PciDeviceInfo, VmCounters, VmInfo, VmRemoveDevice,
    VmResize, VmState, VmmPing,
};
