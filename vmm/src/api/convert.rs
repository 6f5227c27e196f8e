//! From the internal configuration to the wire's.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

use berth_irqchip::Mode as Irqchip;
use berth_vmm_api_types::v1 as wire;

use crate::config::affinity::VcpuAffinity;
use crate::config::{
    BalloonConfig, HugePages, KernelEntry, Mergeable, PlatformConfig, SerialConfig, VmConfig,
    device_wire,
};
use crate::devices::virtio::balloon;
use crate::memory::Mode;
use crate::vm::state::VmState;

/// State on the wire.
pub(super) fn vm_state(state: VmState) -> wire::VmState {
    match state {
        // `NotCreated` has no `vm.info`.
        VmState::NotCreated | VmState::Created | VmState::Booting => wire::VmState::Created,
        VmState::Running => wire::VmState::Running,
        VmState::Paused => wire::VmState::Paused,
        VmState::Shutdown => wire::VmState::Shutdown,
    }
}

/// Configuration on the wire; `pty` is the serial port's pseudo-terminal.
pub(super) fn vm_config(config: &VmConfig, pty: Option<&Path>) -> wire::VmConfig {
    let cpus = u32::from(config.cpus.boot);
    wire::VmConfig {
        cpus: wire::CpusConfig {
            boot_vcpus: cpus,
            max_vcpus: cpus,
            feature_flags: config.cpus.features.names(),
            affinity: some(config.affinity.iter().map(affinity)),
        },
        memory: memory(config),
        payload: Some(payload(config)),
        disks: some(config.disks.iter().map(device_wire::disk_to_wire)),
        net: some(config.nets.iter().map(device_wire::net_to_wire)),
        fs: some(config.fs.iter().map(device_wire::fs_to_wire)),
        generic_vhost_user: some(config.generics.iter().map(device_wire::generic_to_wire)),
        rng: wire::RngConfig {
            src: config.rng.src.clone(),
        },
        balloon: config.balloon.as_ref().map(balloon),
        console: Some(match config.serial_is_console {
            true => serial(&config.serial, pty),
            false => wire::ConsoleConfig::default(),
        }),
        serial: Some(serial(&config.serial, pty)),
        platform: Some(platform(&config.platform)),
        other: BTreeMap::new(),
    }
}

fn memory(config: &VmConfig) -> wire::MemoryConfig {
    let memory = &config.memory;
    // What came of it, where nothing was said and there is a yes or a no to it.
    let shared = match Mode::of(config) {
        Ok(Mode::Shared) => Some(true),
        Ok(Mode::Private) => Some(false),
        Ok(Mode::Window { .. }) | Err(_) => None,
    };
    wire::MemoryConfig {
        size: memory.size_bytes,
        shared: memory
            .shared
            .or(shared.filter(|_| memory.mergeable == Mergeable::Off)),
        mergeable: match memory.mergeable {
            Mergeable::Off => wire::Mergeable::Eligible(false),
            Mergeable::Eligible => wire::Mergeable::Eligible(true),
            Mergeable::Always => wire::Mergeable::Word(wire::MergeableWord::Always),
        },
        hugepages: memory.huge_pages.is_some(),
        hugepage_size: memory.huge_pages.map(HugePages::bytes),
        thp: Some(memory.thp),
        prefault: memory.prefault,
        window: memory.window_bytes,
        zones: None,
    }
}

fn platform(platform: &PlatformConfig) -> wire::PlatformConfig {
    let irqchip = match platform.irqchip {
        Irqchip::Kernel => "kernel",
        Irqchip::Split => "split",
    };
    wire::PlatformConfig {
        root_port_vendor: Some(platform.root_port_vendor),
        hotplug_ports: Some(platform.hotplug_ports),
        test_device: platform.test_device,
        irqchip: Some(irqchip.to_owned()),
        halt_poll_ns: platform.halt_poll_ns,
        trust_domain: platform.trust_domain.clone(),
    }
}

fn balloon(balloon: &BalloonConfig) -> wire::BalloonConfig {
    wire::BalloonConfig {
        size: balloon.size_bytes,
        deflate_on_oom: balloon.deflate_on_oom,
        free_page_reporting: balloon.free_page_reporting,
    }
}

/// What a balloon has come to, on the wire.
pub(super) fn balloon_info(info: &balloon::Info) -> wire::BalloonInfo {
    let stats = info.stats.as_ref();
    let named = |stats: &balloon::Stats| {
        let named = stats.named();
        named
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    };
    wire::BalloonInfo {
        target: info.target_bytes,
        actual: info.actual_bytes,
        stats: stats.map(|(stats, _)| named(stats)),
        stats_age_ms: stats.map(|(_, age)| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
    }
}

fn affinity(of: &VcpuAffinity) -> wire::CpuAffinity {
    wire::CpuAffinity {
        vcpu: of.vcpu.into(),
        host_cpus: of.host_cpus.clone(),
    }
}

fn some<T>(items: impl ExactSizeIterator<Item = T>) -> Option<Vec<T>> {
    (items.len() > 0).then(|| items.collect())
}

fn payload(config: &VmConfig) -> wire::PayloadConfig {
    let payload = &config.payload;
    let entry = match payload.entry {
        KernelEntry::Auto => None,
        KernelEntry::Pvh => Some("pvh"),
        KernelEntry::Linux64 => Some("linux64"),
        KernelEntry::BzImage => Some("bzimage"),
        KernelEntry::Multiboot => Some("multiboot"),
    };
    wire::PayloadConfig {
        kernel: Some(payload.kernel.clone()),
        entry: entry.map(str::to_owned),
        cmdline: Some(payload.cmdline.clone()),
        initramfs: payload.initramfs.clone(),
        ..wire::PayloadConfig::default()
    }
}

fn serial(serial: &SerialConfig, pty: Option<&Path>) -> wire::ConsoleConfig {
    let (mode, file, socket) = match serial {
        SerialConfig::Tty => (wire::ConsoleMode::Tty, None, None),
        SerialConfig::Pty => (wire::ConsoleMode::Pty, pty.map(Into::into), None),
        SerialConfig::Null => (wire::ConsoleMode::Null, None, None),
        SerialConfig::Off => (wire::ConsoleMode::Off, None, None),
        SerialConfig::File(path) => (wire::ConsoleMode::File, Some(path.clone()), None),
        SerialConfig::Socket(path) => (wire::ConsoleMode::Socket, None, Some(path.clone())),
    };
    wire::ConsoleConfig { mode, file, socket }
}
