//! From the text of one flag to one part of the configuration.
//!
//! Only what can be said from the text alone is checked here; [`super::validate`] does the rest.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use berth_irqchip::Mode;

use super::affinity::{self, VcpuAffinity};
use super::keys::{Keys, hint};
pub use super::memory::parse as memory;
use super::{
    ArgError, BalloonConfig, CpusConfig, KernelEntry, PlatformConfig, RngConfig, SerialConfig,
};
use crate::cpu::features::Features;
use crate::socket::ApiSocket;
use crate::telemetry::events::EventMonitor;

/// Vendor of the root ports unless given: Red Hat, whose generic root port they resemble.
pub const DEFAULT_ROOT_PORT_VENDOR: u16 = 0x1b36;

/// Root ports for devices that are added later, unless given.
pub const DEFAULT_HOTPLUG_PORTS: u8 = 8;

const CPUS_KEYS: [&str; 3] = ["boot", "features", "affinity"];

/// `--cpus boot=N,features=+x,-y`, or `--cpus N`.
pub fn cpus(text: &str) -> Result<CpusConfig, ArgError> {
    let mut keys = Keys::parse("--cpus", text, &CPUS_KEYS)?;
    let bare = keys.take_bare();
    let boot = match bare.as_deref().or(keys.text("boot")) {
        None => 1,
        Some(value) => value
            .parse::<u32>()
            .map_err(|_| keys.bad("boot", value, "a number"))?,
    };
    Ok(CpusConfig {
        // More than fits is refused by validation, which knows the limit.
        boot: u16::try_from(boot).unwrap_or(u16::MAX),
        features: match keys.text("features") {
            None => Features::default(),
            Some(list) => Features::parse(list.split(','))?,
        },
    })
}

/// `affinity=` of `--cpus`.
pub fn affinity(text: &str) -> Result<Vec<VcpuAffinity>, ArgError> {
    let keys = Keys::parse("--cpus", text, &CPUS_KEYS)?;
    keys.text("affinity")
        .map_or(Ok(Vec::new()), affinity::parse)
}

/// `--kernel PATH[,entry=pvh|linux64|bzimage|multiboot]`.
pub fn kernel(text: &str) -> Result<(PathBuf, KernelEntry), ArgError> {
    let flag = "--kernel";
    let mut keys = Keys::parse(flag, text, &["path", "entry"])?;
    let path = match keys.take_bare() {
        Some(bare) if !bare.is_empty() => PathBuf::from(bare),
        _ => PathBuf::from(keys.required("path")?),
    };
    let entry = match keys.text("entry") {
        None | Some("auto") => KernelEntry::Auto,
        Some("pvh") => KernelEntry::Pvh,
        Some("linux64") => KernelEntry::Linux64,
        Some("bzimage") => KernelEntry::BzImage,
        Some("multiboot") => KernelEntry::Multiboot,
        Some(other) => {
            return Err(keys.bad("entry", other, "pvh, linux64, bzimage or multiboot"));
        }
    };
    Ok((path, entry))
}

/// `--serial tty|pty|null|off|file=PATH|socket=PATH`.
pub fn serial(text: &str) -> Result<SerialConfig, ArgError> {
    let flag = "--serial";
    let mut keys = Keys::parse(flag, text, &["file", "socket"])?;
    if let Some(word) = keys.take_bare() {
        return match word.as_str() {
            "tty" => Ok(SerialConfig::Tty),
            "pty" => Ok(SerialConfig::Pty),
            "null" => Ok(SerialConfig::Null),
            "off" => Ok(SerialConfig::Off),
            _ => Err(ArgError::UnknownValue {
                flag,
                hint: hint(&word, &["tty", "pty", "null", "off", "file=", "socket="]),
                value: word,
            }),
        };
    }
    if keys.text("file").is_some() {
        Ok(SerialConfig::File(keys.required("file")?.into()))
    } else {
        Ok(SerialConfig::Socket(keys.required("socket")?.into()))
    }
}

/// `--rng src=PATH`, or `--rng PATH`.
pub fn rng(text: &str) -> Result<RngConfig, ArgError> {
    Ok(RngConfig {
        src: path("--rng", "src", text)?,
    })
}

/// `--balloon size=SIZE,deflate_on_oom=on|off,free_page_reporting=on|off`.
pub fn balloon(text: &str) -> Result<BalloonConfig, ArgError> {
    let known = ["size", "deflate_on_oom", "free_page_reporting"];
    let keys = Keys::parse("--balloon", text, &known)?;
    keys.no_bare()?;
    Ok(BalloonConfig {
        size_bytes: keys.size("size")?.unwrap_or(0),
        deflate_on_oom: keys.on_off("deflate_on_oom")?.unwrap_or(false),
        free_page_reporting: keys.on_off("free_page_reporting")?.unwrap_or(false),
    })
}

/// `--api-socket path=PATH`, `--api-socket PATH` or `--api-socket fd=N`.
pub fn api_socket(text: &str) -> Result<ApiSocket, ArgError> {
    let flag = "--api-socket";
    let mut keys = Keys::parse(flag, text, &["path", "fd"])?;
    let path = match keys.take_bare() {
        Some(bare) => Some(bare),
        None => keys.text("path").map(str::to_owned),
    };
    match (path, keys.number("fd")?) {
        (Some(path), None) if !path.is_empty() => Ok(ApiSocket::Path(path.into())),
        // Standard input, output and error are not sockets to listen on.
        (None, Some(fd @ 3..)) => Ok(ApiSocket::Fd(fd)),
        (None, Some(fd)) => Err(keys.bad("fd", &fd.to_string(), "a descriptor from 3 on")),
        _ => Err(ArgError::Missing { flag, key: "path" }),
    }
}

/// `--platform root_port_vendor=0x…,hotplug_ports=N,irqchip=kernel|split,halt_poll_ns=N,test-device=on|off`.
pub fn platform(text: &str) -> Result<PlatformConfig, ArgError> {
    let known = [
        "root_port_vendor",
        "hotplug_ports",
        "irqchip",
        "halt_poll_ns",
        "test-device",
        "trust_domain",
    ];
    let keys = Keys::parse("--platform", text, &known)?;
    keys.no_bare()?;
    let default = PlatformConfig::default();
    let root_port_vendor = match keys.text("root_port_vendor") {
        None => default.root_port_vendor,
        Some(value) => vendor(value)
            .ok_or_else(|| keys.bad("root_port_vendor", value, "a PCI vendor id such as 0x1b36"))?,
    };
    let irqchip = match keys.text("irqchip") {
        None => default.irqchip,
        Some("kernel") => Mode::Kernel,
        Some("split") => Mode::Split,
        Some(other) => return Err(keys.bad("irqchip", other, "kernel or split")),
    };
    Ok(PlatformConfig {
        root_port_vendor,
        hotplug_ports: keys
            .number("hotplug_ports")?
            .unwrap_or(default.hotplug_ports),
        irqchip,
        halt_poll_ns: keys.number("halt_poll_ns")?,
        test_device: keys.on_off("test-device")?.unwrap_or(false),
        trust_domain: match keys.text("trust_domain") {
            Some(name) if !is_domain(name) => {
                return Err(keys.bad("trust_domain", name, DOMAIN_NAME));
            }
            name => name.map(str::to_owned),
        },
    })
}

/// What a trust domain may be called.
pub const DOMAIN_NAME: &str = "1 to 64 letters, digits, '.', '_' or '-'";

/// Whether a trust domain may be called that.
pub fn is_domain(name: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(word)
}

fn vendor(text: &str) -> Option<u16> {
    let id = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok()?,
        None => text.parse().ok()?,
    };
    (id != 0 && id != 0xffff).then_some(id)
}

fn path(flag: &'static str, key: &'static str, text: &str) -> Result<PathBuf, ArgError> {
    let mut keys = Keys::parse(flag, text, &[key])?;
    match keys.take_bare() {
        Some(bare) if !bare.is_empty() => Ok(bare.into()),
        _ => Ok(keys.required(key)?.into()),
    }
}

/// `--event-monitor path=PATH|fd=N`.
pub fn event_monitor(text: &str) -> Result<EventMonitor, ArgError> {
    let flag = "--event-monitor";
    let mut keys = Keys::parse(flag, text, &["path", "fd"])?;
    let path = match keys.take_bare() {
        Some(bare) => Some(bare),
        None => keys.text("path").map(str::to_owned),
    };
    match (path, keys.number("fd")?) {
        (Some(path), None) if !path.is_empty() => Ok(EventMonitor::Path(path.into())),
        (None, Some(fd @ 3..)) => Ok(EventMonitor::Fd(fd)),
        (None, Some(fd)) => Err(keys.bad("fd", &fd.to_string(), "a descriptor from 3 on")),
        _ => Err(ArgError::Missing { flag, key: "path" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_a_path_and_perhaps_an_entry() {
        for text in ["/k", "path=/k", "/k,entry=auto"] {
            assert_eq!(kernel(text).unwrap(), ("/k".into(), KernelEntry::Auto));
        }
        assert_eq!(
            kernel("\"/a,b\",entry=linux64").unwrap(),
            ("/a,b".into(), KernelEntry::Linux64)
        );
        assert!(kernel("/k,entry=uefi").is_err());
        assert!(kernel("").is_err());
    }

    #[test]
    fn serial_names_one_place() {
        assert_eq!(serial("tty").unwrap(), SerialConfig::Tty);
        assert_eq!(serial("file=/s").unwrap(), SerialConfig::File("/s".into()));
        assert_eq!(
            serial("ttyy").unwrap_err().to_string(),
            "--serial: unknown value 'ttyy' (nearest: 'tty')"
        );
        assert!(serial("file=").is_err());
        assert!(serial("").is_err());
    }

    #[test]
    fn both_long_and_short_forms() {
        assert_eq!(cpus("boot=4").unwrap(), cpus("4").unwrap());
        assert_eq!(memory("size=1G").unwrap(), memory("1G").unwrap());
        assert_eq!(api_socket("path=/a").unwrap(), api_socket("/a").unwrap());
        assert_eq!(api_socket("fd=3").unwrap(), ApiSocket::Fd(3));
        for text in ["fd=0", "fd=-1", "fd=x", "fd=3,path=/a", ""] {
            assert!(api_socket(text).is_err(), "{text}");
        }
        assert_eq!(
            rng("src=/dev/urandom").unwrap(),
            rng("/dev/urandom").unwrap()
        );
    }

    #[test]
    fn cpus_take_features_beside_their_number() {
        let cpus = cpus("boot=2,features=+x2apic,-pcid").unwrap();
        assert_eq!(cpus.boot, 2);
        assert_eq!(cpus.features.names(), ["+x2apic", "-pcid"]);
        assert_eq!(super::cpus("features=-pcid,+x2apic,boot=2").unwrap(), cpus);
        let error = super::cpus("features=+x2apci").unwrap_err().to_string();
        assert!(
            error.starts_with("--cpus: ") && error.contains("'x2apic'"),
            "{error}"
        );
    }

    #[test]
    fn events_go_to_a_path_or_a_descriptor() {
        let path = EventMonitor::Path("/fifo".into());
        assert_eq!(event_monitor("path=/fifo").unwrap(), path);
        assert_eq!(event_monitor("fd=9").unwrap(), EventMonitor::Fd(9));
        for text in ["fd=1", "fd=3,path=/a", ""] {
            assert!(event_monitor(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_balloon_begins_empty_and_does_nothing_by_itself() {
        let plain = BalloonConfig {
            size_bytes: 0,
            deflate_on_oom: false,
            free_page_reporting: false,
        };
        assert_eq!(balloon("size=0").unwrap(), plain);
        let all = balloon("free_page_reporting=on,size=64M,deflate_on_oom=on").unwrap();
        assert_eq!(all.size_bytes, 64 << 20);
        assert!(all.deflate_on_oom && all.free_page_reporting);
        let error = balloon("siez=1G").unwrap_err().to_string();
        assert!(
            error.contains("'siez'") && error.contains("'size'"),
            "{error}"
        );
        for text in ["64M", "size=", "size=-1", "deflate_on_oom=yes"] {
            assert!(balloon(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_root_port_vendor_is_a_vendor_id() {
        assert_eq!(
            platform("root_port_vendor=0x1106")
                .unwrap()
                .root_port_vendor,
            0x1106
        );
        assert!(!platform("root_port_vendor=1").unwrap().test_device);
        assert!(platform("test-device=on").unwrap().test_device);
        assert!(platform("test-device=maybe").is_err());
        for text in ["0xffff", "0", "70000", "x"] {
            assert!(
                platform(&format!("root_port_vendor={text}")).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn a_platform_names_its_trust_domain_or_has_none() {
        let domain = |text: &str| platform(text).map(|platform| platform.trust_domain);
        assert_eq!(domain("irqchip=kernel").unwrap(), None);
        assert_eq!(
            domain("trust_domain=farm-1").unwrap().as_deref(),
            Some("farm-1")
        );
        for name in ["", "a b", "a/b", &"x".repeat(65)] {
            assert!(domain(&format!("trust_domain={name}")).is_err(), "{name}");
        }
    }

    #[test]
    fn a_platform_names_its_irqchip_and_how_long_to_poll() {
        let split = platform("irqchip=split,halt_poll_ns=0").unwrap();
        assert_eq!((split.irqchip, split.halt_poll_ns), (Mode::Split, Some(0)));
        assert_eq!(platform("irqchip=kernel").unwrap().irqchip, Mode::Kernel);
        let default = PlatformConfig::default();
        assert_eq!(platform("root_port_vendor=0x1b36").unwrap(), default);
        assert_eq!(
            platform("irqchip=off").unwrap_err().to_string(),
            "--platform: irqchip=off is not kernel or split"
        );
        for text in ["irqchip=", "halt_poll_ns=-1", "halt_poll_ns=5000000000"] {
            assert!(platform(text).is_err(), "{text}");
        }
    }
}
