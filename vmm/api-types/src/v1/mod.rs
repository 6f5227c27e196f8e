//! Version 1, below `/api/v1/`.
//!
//! | request | body | answer |
//! |---|---|---|
//! | GET `vmm.ping` | | [`VmmPing`] |
//! | GET `vm.info` | | [`VmInfo`] |
//! | GET `vm.counters` | | [`VmCounters`] |
//! | PUT `vm.boot`, `vm.pause`, `vm.resume`, `vm.power-button`, `vm.reboot`, `vm.shutdown`, `vmm.shutdown` | | 204 |
//!
//! An error is 400 (not understood), 404 (no such request, or no guest running), or 500 (refused or
//! failed), with an [`ErrorMessages`].

mod config;
mod vm;

pub use config::{
    ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig,
    PlatformConfig, RngConfig, VmConfig,
};
pub use vm::{DeviceNode, ErrorMessages, VmCounters, VmInfo, VmState, VmmPing};
