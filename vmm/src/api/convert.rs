//! From the internal configuration to the wire's.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

use berth_vmm_api_types::v1 as wire;

use crate::config::{DiskConfig, KernelEntry, NetConfig, SerialConfig, VmConfig};
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
        },
        memory: wire::MemoryConfig {
            size: config.memory.size_bytes,
            shared: true,
            hugepages: config.memory.hugepages,
            zones: None,
        },
        payload: Some(payload(config)),
        disks: some(config.disks.iter().map(disk)),
        net: some(config.nets.iter().map(net)),
        rng: wire::RngConfig {
            src: config.rng.src.clone(),
        },
        console: Some(match config.serial_is_console {
            true => serial(&config.serial, pty),
            false => wire::ConsoleConfig::default(),
        }),
        serial: Some(serial(&config.serial, pty)),
        platform: Some(wire::PlatformConfig {
            root_port_vendor: Some(config.platform.root_port_vendor),
            hotplug_ports: Some(config.platform.hotplug_ports),
            test_device: config.platform.test_device,
        }),
        other: BTreeMap::new(),
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

fn disk(disk: &DiskConfig) -> wire::DiskConfig {
    wire::DiskConfig {
        id: Some(disk.id.clone()),
        path: None,
        readonly: disk.readonly,
        num_queues: disk.backend.num_queues,
        queue_size: disk.backend.queue_size,
        vhost_user: true,
        vhost_socket: Some(disk.backend.socket.clone()),
    }
}

fn net(net: &NetConfig) -> wire::NetConfig {
    let mac = net
        .mac
        .map(|mac| mac.map(|octet| format!("{octet:02x}")).join(":"));
    wire::NetConfig {
        id: Some(net.id.clone()),
        mac,
        num_queues: net.backend.num_queues,
        queue_size: net.backend.queue_size,
        vhost_user: true,
        vhost_socket: Some(net.backend.socket.clone()),
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
