//! From what clients send to the internal configuration.
//!
//! Fields that are not known are ignored, as clients send more than they need. What is known and changes
//! what the guest can do, but is not served, is refused or, where clients send it always, logged.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use berth_irqchip::Mode;
use berth_vmm_api_types::v1 as wire;
use berth_vmm_api_types::v1::ConsoleMode;

use crate::config::affinity::VcpuAffinity;
use crate::config::{
    ArgError, BalloonConfig, CpusConfig, DiskConfig, HugePages, KernelEntry, MemoryConfig,
    Mergeable, NetConfig, PayloadConfig, PlatformConfig, RngConfig, SerialConfig, VmConfig,
    convert, device_wire, shared_fd::SharedFd,
};
use crate::cpu::features::Features;

/// Devices that a guest would miss.
const REFUSED: [&str; 5] = ["devices", "user_devices", "vdpa", "pmem", "tpm"];
/// Devices that known clients always ask for, and that a guest can do without.
const IGNORED: [&str; 3] = ["vsock", "watchdog", "pvpanic"];

/// Why a body cannot be served.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Error {
    /// Not JSON, or not of this shape.
    #[error("{what}: {reason}")]
    Json {
        /// What it should be.
        what: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{field}: {value:?} is not {expected}")]
    Value {
        /// Where.
        field: &'static str,
        /// As sent.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Something that is needed.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A device.
    #[error(transparent)]
    Device(#[from] ArgError),
    /// Understood, and not served.
    #[error("{what} is not supported{hint}")]
    Unsupported {
        /// What.
        what: String,
        /// What to do instead, after a colon, or nothing.
        hint: &'static str,
    },
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::Unsupported {
        what: what.into(),
        hint: "",
    }
}

/// Reads a body.
pub(super) fn json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    body: &[u8],
) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| Error::Json {
        what,
        reason: error.to_string(),
    })
}

/// The body of `vm.create`.
pub(super) fn vm_config(config: wire::VmConfig) -> Result<VmConfig, Error> {
    check_others(&config)?;
    let (serial, serial_is_console) = serial(config.serial, config.console)?;
    let disks = config.disks.into_iter().flatten().enumerate();
    let nets = config.net.into_iter().flatten().enumerate();
    let fs = config.fs.into_iter().flatten().enumerate();
    let generics = config.generic_vhost_user.into_iter().flatten().enumerate();
    Ok(VmConfig {
        cpus: CpusConfig {
            // More than fits is refused by validation, which knows the limit.
            boot: u16::try_from(config.cpus.boot_vcpus).unwrap_or(u16::MAX),
            features: Features::parse(config.cpus.feature_flags.iter().map(String::as_str))
                .map_err(ArgError::Features)?,
        },
        affinity: config
            .cpus
            .affinity
            .iter()
            .flatten()
            .map(affinity)
            .collect(),
        memory: memory(&config.memory)?,
        payload: payload(config.payload.ok_or(Error::Missing("payload"))?)?,
        disks: disks
            .map(|(index, disk)| disk_config(&disk, &format!("_disk{index}")))
            .collect::<Result<_, _>>()?,
        nets: nets
            .map(|(index, net)| net_config(&net, &format!("_net{index}"), Vec::new()))
            .collect::<Result<_, _>>()?,
        fs: fs
            .map(|(index, fs)| device_wire::fs(&fs, &format!("_fs{index}"), "fs"))
            .collect::<Result<_, _>>()?,
        generics: generics
            .map(|(index, generic)| {
                let id = format!("_generic_vhost_user{index}");
                device_wire::generic(&generic, &id, "generic_vhost_user")
            })
            .collect::<Result<_, _>>()?,
        serial,
        serial_is_console,
        rng: RngConfig {
            src: config.rng.src,
        },
        balloon: config.balloon.map(balloon),
        platform: platform(config.platform.unwrap_or_default())?,
    })
}

fn affinity(of: &wire::CpuAffinity) -> VcpuAffinity {
    VcpuAffinity {
        // As with the number of vCPUs.
        vcpu: u16::try_from(of.vcpu).unwrap_or(u16::MAX),
        host_cpus: of.host_cpus.clone(),
    }
}

fn check_others(config: &wire::VmConfig) -> Result<(), Error> {
    for (name, value) in &config.other {
        let empty = value.is_null()
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_bool() == Some(false);
        if empty {
            continue;
        }
        if REFUSED.contains(&name.as_str()) {
            return Err(unsupported(name.clone()));
        }
        if IGNORED.contains(&name.as_str()) {
            tracing::warn!(name, "vm.create: not served, the guest does without");
        }
    }
    Ok(())
}

fn memory(memory: &wire::MemoryConfig) -> Result<MemoryConfig, Error> {
    let zones = memory.zones.iter().flatten();
    let size_bytes = match memory.size {
        0 => zones.fold(0, |sum, zone| zone.size.saturating_add(sum)),
        size => size,
    };
    let huge_pages = match (memory.hugepages, memory.hugepage_size) {
        (false, _) => None,
        (true, None) => Some(HugePages::Mib2),
        (true, Some(bytes)) => Some(HugePages::of(bytes).ok_or_else(|| Error::Unsupported {
            what: format!("memory.hugepage_size={bytes}"),
            hint: ": 2 MiB or 1 GiB",
        })?),
    };
    Ok(MemoryConfig {
        size_bytes,
        shared: memory.shared,
        mergeable: match memory.mergeable {
            wire::Mergeable::Eligible(false) => Mergeable::Off,
            wire::Mergeable::Eligible(true) => Mergeable::Eligible,
            wire::Mergeable::Word(wire::MergeableWord::Always) => Mergeable::Always,
        },
        huge_pages,
        thp: memory.thp.unwrap_or(true),
        prefault: memory.prefault,
        window_bytes: memory.window,
    })
}

fn balloon(balloon: wire::BalloonConfig) -> BalloonConfig {
    BalloonConfig {
        size_bytes: balloon.size,
        deflate_on_oom: balloon.deflate_on_oom,
        free_page_reporting: balloon.free_page_reporting,
    }
}

fn payload(payload: wire::PayloadConfig) -> Result<PayloadConfig, Error> {
    if payload.igvm.is_some() {
        return Err(unsupported("payload.igvm"));
    }
    let Some(kernel) = payload.kernel else {
        return Err(match payload.firmware {
            Some(_) => Error::Unsupported {
                what: "payload.firmware".to_owned(),
                hint: ": give payload.kernel",
            },
            None => Error::Missing("payload.kernel"),
        });
    };
    let entry = match payload.entry.as_deref() {
        None => KernelEntry::Auto,
        Some("pvh") => KernelEntry::Pvh,
        Some("linux64") => KernelEntry::Linux64,
        Some("bzimage") => KernelEntry::BzImage,
        Some("multiboot") => KernelEntry::Multiboot,
        Some(other) => {
            return Err(Error::Value {
                field: "payload.entry",
                value: other.to_owned(),
                expected: "pvh, linux64, bzimage or multiboot",
            });
        }
    };
    Ok(PayloadConfig {
        kernel,
        entry,
        // Clients send an empty path for none.
        initramfs: payload
            .initramfs
            .filter(|path| !path.as_os_str().is_empty()),
        cmdline: payload.cmdline.unwrap_or_default(),
    })
}

/// Where the one serial port goes: there is no other console, so a client that asks for a `console` and no
/// `serial` gets the serial port in its place. Returns whether that was so.
fn serial(
    serial: Option<wire::ConsoleConfig>,
    console: Option<wire::ConsoleConfig>,
) -> Result<(SerialConfig, bool), Error> {
    let has_place = |config: &wire::ConsoleConfig| {
        matches!(
            config.mode,
            ConsoleMode::Pty | ConsoleMode::File | ConsoleMode::Socket
        )
    };
    let console = console.filter(has_place);
    match (serial, console) {
        (Some(serial), Some(_)) if has_place(&serial) => Err(Error::Unsupported {
            what: "a console beside the serial port".to_owned(),
            hint: ": give one of serial and console a place",
        }),
        (_, Some(console)) => Ok((place("console", console)?, true)),
        (Some(serial), None) => Ok((place("serial", serial)?, false)),
        (None, None) => Ok((SerialConfig::Null, false)),
    }
}

fn place(field: &'static str, config: wire::ConsoleConfig) -> Result<SerialConfig, Error> {
    let path = |path: Option<PathBuf>, missing| path.ok_or(Error::Missing(missing));
    Ok(match config.mode {
        ConsoleMode::Off => SerialConfig::Off,
        ConsoleMode::Null => SerialConfig::Null,
        ConsoleMode::Tty => SerialConfig::Tty,
        ConsoleMode::Pty => SerialConfig::Pty,
        ConsoleMode::File => SerialConfig::File(path(
            config.file,
            match field {
                "console" => "console.file",
                _ => "serial.file",
            },
        )?),
        ConsoleMode::Socket => SerialConfig::Socket(path(
            config.socket,
            match field {
                "console" => "console.socket",
                _ => "serial.socket",
            },
        )?),
    })
}

fn platform(platform: wire::PlatformConfig) -> Result<PlatformConfig, Error> {
    let default = PlatformConfig::default();
    let irqchip = match platform.irqchip.as_deref() {
        None => default.irqchip,
        Some("kernel") => Mode::Kernel,
        Some("split") => Mode::Split,
        Some(other) => {
            return Err(Error::Value {
                field: "platform.irqchip",
                value: other.to_owned(),
                expected: "kernel or split",
            });
        }
    };
    Ok(PlatformConfig {
        root_port_vendor: platform
            .root_port_vendor
            .unwrap_or(default.root_port_vendor),
        hotplug_ports: platform.hotplug_ports.unwrap_or(default.hotplug_ports),
        test_device: platform.test_device,
        irqchip,
        halt_poll_ns: platform.halt_poll_ns,
        trust_domain: match platform.trust_domain {
            Some(name) if !convert::is_domain(&name) => {
                return Err(Error::Value {
                    field: "platform.trust_domain",
                    value: name,
                    expected: convert::DOMAIN_NAME,
                });
            }
            name => name,
        },
    })
}

/// One disk; `id` is its name unless the client gave one.
pub(super) fn disk_config(disk: &wire::DiskConfig, id: &str) -> Result<DiskConfig, Error> {
    Ok(device_wire::disk(disk, id, "disk")?)
}

/// One network card; `id` is its name unless the client gave one, `fds` are the descriptors of its tap
/// that came with the request.
pub(super) fn net_config(
    net: &wire::NetConfig,
    id: &str,
    fds: Vec<SharedFd>,
) -> Result<NetConfig, Error> {
    Ok(device_wire::net(net, id, "net", fds)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::convert;

    fn created(text: &str) -> Result<VmConfig, String> {
        let wire = json::<wire::VmConfig>("VmConfig", text.as_bytes());
        wire.and_then(vm_config).map_err(|error| error.to_string())
    }

    #[test]
    fn a_kernel_is_enough() {
        let config = created(r#"{"payload": {"kernel": "/k"}}"#).unwrap();
        assert_eq!(config.cpus.boot, 1);
        assert_eq!(config.memory.size_bytes, 512 << 20);
        assert_eq!(config.serial, SerialConfig::Null);
        assert_eq!(
            config.platform.hotplug_ports,
            convert::DEFAULT_HOTPLUG_PORTS
        );
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (text, reason) in [
            ("", "VmConfig: EOF while parsing a value at line 1 column 0"),
            ("{}", "payload is missing"),
            (r#"{"payload": {}}"#, "payload.kernel is missing"),
            (
                r#"{"payload": {"firmware": "/f"}}"#,
                "payload.firmware is not supported: give payload.kernel",
            ),
            (
                r#"{"payload": {"kernel": "/k", "entry": "uefi"}}"#,
                r#"payload.entry: "uefi" is not pvh, linux64, bzimage or multiboot"#,
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "platform": {"trust_domain": "a b"}}"#,
                r#"platform.trust_domain: "a b" is not 1 to 64 letters, digits, '.', '_' or '-'"#,
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "platform": {"irqchip": "on"}}"#,
                r#"platform.irqchip: "on" is not kernel or split"#,
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "disks": [{}]}"#,
                "disk: path= is missing",
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "pmem": [{"file": "/p"}]}"#,
                "pmem is not supported",
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "serial": {"mode": "File"}}"#,
                "serial.file is missing",
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "serial": {"mode": "Pty"}, "console": {"mode": "Pty"}}"#,
                "a console beside the serial port is not supported: give one of serial and console a place",
            ),
            (
                r#"{"payload": {"kernel": "/k"}, "net": [{"tap": "t", "mac": "nonsense"}]}"#,
                r#"net: mac=nonsense is not a unicast address xx:xx:xx:xx:xx:xx"#,
            ),
        ] {
            assert_eq!(created(text).unwrap_err(), reason, "{text}");
        }
    }

    #[test]
    fn a_console_with_a_place_is_the_serial_port() {
        let serial = |text: &str| {
            let config = created(&format!(r#"{{"payload": {{"kernel": "/k"}}, {text}}}"#)).unwrap();
            (config.serial, config.serial_is_console)
        };
        assert_eq!(
            serial(r#""console": {"mode": "Pty"}"#),
            (SerialConfig::Pty, true)
        );
        assert_eq!(
            serial(r#""console": {"mode": "Pty"}, "serial": {"mode": "Null"}"#),
            (SerialConfig::Pty, true)
        );
        assert_eq!(
            serial(r#""console": {"mode": "Off"}, "serial": {"mode": "Tty"}"#),
            (SerialConfig::Tty, false)
        );
    }

    #[test]
    fn what_a_guest_can_do_without_is_let_pass() {
        let config = created(
            r#"{"payload": {"kernel": "/k", "initramfs": ""}, "vsock": {"cid": 3}, "pmem": [],
                "devices": null, "memory": {"size": 0, "zones": [{"id": "mem0", "size": 1048576}]}}"#,
        )
        .unwrap();
        assert_eq!(config.memory.size_bytes, 1 << 20);
        assert_eq!(config.payload.initramfs, None);
    }
}
