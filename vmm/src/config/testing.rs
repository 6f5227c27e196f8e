//! A configuration for unit tests.

use super::{
    CpusConfig, KernelEntry, MemoryConfig, PayloadConfig, RngConfig, SerialConfig, VmConfig,
    convert,
};

/// One vCPU, 512 MiB, no device that another process serves.
pub(crate) fn config() -> VmConfig {
    VmConfig {
        cpus: CpusConfig::of(1),
        affinity: Vec::new(),
        memory: MemoryConfig::of(512 << 20),
        payload: PayloadConfig {
            kernel: "/k".into(),
            entry: KernelEntry::Auto,
            initramfs: None,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        fs: Vec::new(),
        generics: Vec::new(),
        serial: SerialConfig::Null,
        serial_is_console: false,
        rng: RngConfig {
            src: "/dev/urandom".into(),
        },
        balloon: None,
        platform: convert::platform("root_port_vendor=1").unwrap(),
    }
}
