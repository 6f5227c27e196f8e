//! Holds a configuration against the rules of the machine and the limits of the host.
//!
//! Pure: what it must know of the host comes in a [`Host`]. Files and sockets are tried where they are
//! opened, not here.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::affinity::{self, HostCpus};
use super::{Link, VhostUserConfig, VmConfig};
use crate::memory::layout::{MMIO64_LEN, mmio64_start};
use crate::memory::{Mode, ModeError};

/// vCPUs of a guest with KVM's interrupt controllers, at most: APIC ids end at 254, as 255 is everybody.
pub const MAX_VCPUS: u16 = 255;
/// The same with the split irqchip, whose messages have destinations of 15 bits. What KVM takes may be less.
pub const MAX_VCPUS_SPLIT: u16 = 1024;
/// Guest RAM comes in pieces of this size.
pub const MEMORY_UNIT: u64 = 2 << 20;
/// Least RAM that a guest can have: boot structures and ACPI lie in the first MiB, a kernel above.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Longest command line, without its NUL: what x86 kernels keep.
pub const MAX_CMDLINE: usize = 2047;
/// Devices below root ports, at most: bus 0 has 32 slots, four of them taken.
pub const MAX_EXTERNAL_DEVICES: usize = 28;

/// Ids of built-in devices and names of groups of counters; those of vCPUs are others.
const RESERVED_IDS: [&str; 5] = ["vmm", "irqchip", "rng", "_rng", "_balloon"];

/// What is known of the host.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// RAM and swap in bytes.
    pub memory_bytes: u64,
    /// CPUs that this process may use.
    pub cpus: HostCpus,
}

/// A configuration that cannot be run (exit code 1).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Too few or too many vCPUs.
    #[error(
        "--cpus: boot must be 1 to {MAX_VCPUS}, or to {MAX_VCPUS_SPLIT} with --platform irqchip=split"
    )]
    Vcpus,
    /// Where vCPUs are to run.
    #[error(transparent)]
    Affinity(#[from] affinity::Error),
    /// No memory, or too little.
    #[error("--memory: size={size_bytes} bytes is too small, {} MiB is the least", MIN_MEMORY >> 20)]
    MemoryTooSmall {
        /// Size asked for.
        size_bytes: u64,
    },
    /// Not whole pieces.
    #[error("--memory: size={size_bytes} bytes is not a multiple of 2 MiB")]
    MemoryOdd {
        /// Size asked for.
        size_bytes: u64,
    },
    /// More than a guest can address.
    #[error(
        "--memory: size of {} GiB does not fit the host's {physical_bits}-bit physical addresses",
        size_bytes >> 30
    )]
    MemoryUnaddressable {
        /// Size asked for.
        size_bytes: u64,
        /// The host's width.
        physical_bits: u32,
    },
    /// More than there is.
    #[error(
        "--memory: size of {} MiB is more than the host's memory and swap of {} MiB",
        size_bytes >> 20, host_bytes >> 20
    )]
    MemoryAbsent {
        /// Size asked for.
        size_bytes: u64,
        /// What the host has.
        host_bytes: u64,
    },
    /// Words about memory that do not go together.
    #[error(transparent)]
    MemoryMode(#[from] ModeError),
    /// A balloon that would leave nothing of the guest's memory, and more.
    #[error(
        "--balloon: size of {} MiB is more than the guest's memory of {} MiB",
        size_bytes >> 20, memory_bytes >> 20
    )]
    BalloonTooBig {
        /// Size asked for.
        size_bytes: u64,
        /// What the guest has.
        memory_bytes: u64,
    },
    /// Command line too long.
    #[error("--cmdline: {len} bytes, a kernel takes at most {MAX_CMDLINE}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
    },
    /// A NUL would cut it.
    #[error("--cmdline: holds a NUL byte")]
    CmdlineNul,
    /// An id that is empty or not a plain word.
    #[error("id='{id}' must be 1 to 40 letters, digits, '_', '-' or '.'")]
    BadId {
        /// The id.
        id: String,
    },
    /// An id of something else in `vm.info` or among the counters.
    #[error("id='{id}' is a name of the VMM's own")]
    ReservedId {
        /// The id.
        id: String,
    },
    /// Two devices, one id.
    #[error("id='{id}' is used by two devices")]
    IdTwice {
        /// The id.
        id: String,
    },
    /// Two users of one socket.
    #[error("socket {} is given twice", .path.display())]
    SocketTwice {
        /// The socket.
        path: PathBuf,
    },
    /// The path of a socket does not fit sockaddr_un.
    #[error("socket path {} is longer than 107 bytes", .path.display())]
    SocketTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Queue count out of range.
    #[error("{id}: num_queues={num_queues} must be {expected}")]
    Queues {
        /// The device.
        id: String,
        /// As asked.
        num_queues: u16,
        /// What may be.
        expected: &'static str,
    },
    /// Queue size not a power of two in range.
    #[error("{id}: queue_size={queue_size} must be a power of two from 2 to 32768")]
    QueueSize {
        /// The device.
        id: String,
        /// As asked.
        queue_size: u16,
    },
    /// More devices than slots.
    #[error("{count} devices in other processes, at most {MAX_EXTERNAL_DEVICES} fit the PCI bus")]
    TooManyDevices {
        /// How many.
        count: usize,
    },
}

/// Checks everything that the configuration alone and the host's limits decide.
pub fn validate(config: &VmConfig, api_socket: Option<&Path>, host: Host) -> Result<(), Error> {
    let most = match config.platform.irqchip {
        berth_irqchip::Mode::Kernel => MAX_VCPUS,
        berth_irqchip::Mode::Split => MAX_VCPUS_SPLIT,
    };
    if !(1..=most).contains(&config.cpus.boot) {
        return Err(Error::Vcpus);
    }
    affinity::validate(&config.affinity, config.cpus.boot, &host.cpus)?;
    memory(config, host)?;
    balloon(config)?;
    cmdline(&config.payload.cmdline)?;
    devices(config)?;
    sockets(config, api_socket)
}

fn memory(config: &VmConfig, host: Host) -> Result<(), Error> {
    let size_bytes = config.memory.size_bytes;
    if size_bytes < MIN_MEMORY {
        return Err(Error::MemoryTooSmall { size_bytes });
    }
    if !size_bytes.is_multiple_of(MEMORY_UNIT) {
        return Err(Error::MemoryOdd { size_bytes });
    }
    let (_, high) = Mode::of(config)?.split(size_bytes);
    // 2^52 is the most that the architecture has, which also keeps the sum below from wrapping.
    let address_space = 1u64 << host.physical_bits.min(52);
    if size_bytes > address_space || mmio64_start(high) + MMIO64_LEN > address_space {
        return Err(Error::MemoryUnaddressable {
            size_bytes,
            physical_bits: host.physical_bits,
        });
    }
    if size_bytes > host.memory_bytes {
        return Err(Error::MemoryAbsent {
            size_bytes,
            host_bytes: host.memory_bytes,
        });
    }
    Ok(())
}

fn balloon(config: &VmConfig) -> Result<(), Error> {
    let size_bytes = config.balloon.map_or(0, |balloon| balloon.size_bytes);
    let memory_bytes = config.memory.size_bytes;
    match size_bytes > memory_bytes {
        true => Err(Error::BalloonTooBig {
            size_bytes,
            memory_bytes,
        }),
        false => Ok(()),
    }
}

fn cmdline(cmdline: &str) -> Result<(), Error> {
    if cmdline.len() > MAX_CMDLINE {
        return Err(Error::CmdlineTooLong { len: cmdline.len() });
    }
    if cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    Ok(())
}

fn devices(config: &VmConfig) -> Result<(), Error> {
    let devices = external_devices(config);
    let count = devices.len();
    if count > MAX_EXTERNAL_DEVICES {
        return Err(Error::TooManyDevices { count });
    }
    let mut ids = BTreeSet::new();
    for External { id, queues, .. } in &devices {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if id.is_empty() || id.len() > 40 || !id.chars().all(plain) {
            return Err(Error::BadId { id: id.to_string() });
        }
        if RESERVED_IDS.contains(id) || id.starts_with("vcpu") {
            return Err(Error::ReservedId { id: id.to_string() });
        }
        if !ids.insert(*id) {
            return Err(Error::IdTwice { id: id.to_string() });
        }
        queues.check(id)?;
    }
    Ok(())
}

/// What is checked of a device whatever it is.
struct External<'a> {
    id: &'a str,
    link: &'a Link,
    queues: Queues<'a>,
}

enum Queues<'a> {
    /// So many of a size, if there may be so many.
    Alike(&'a VhostUserConfig, bool, &'static str),
    Each(&'a [u16]),
}

fn external_devices(config: &VmConfig) -> Vec<External<'_>> {
    let mut devices = Vec::new();
    let mut alike = |id, backend, fits: fn(u16) -> bool, expected| {
        let backend: &VhostUserConfig = backend;
        devices.push(External {
            id,
            link: &backend.link,
            queues: Queues::Alike(backend, fits(backend.num_queues), expected),
        });
    };
    for disk in &config.disks {
        alike(
            &disk.id,
            &disk.backend,
            |n| (1..=64).contains(&n),
            "1 to 64",
        );
    }
    for net in &config.nets {
        let pairs = |n: u16| (2..=64).contains(&n) && n.is_multiple_of(2);
        let expected = "even, 2 to 64 (receive and transmit together)";
        alike(&net.id, &net.backend, pairs, expected);
    }
    for fs in &config.fs {
        alike(&fs.id, &fs.backend, |n| (1..=63).contains(&n), "1 to 63");
    }
    devices.extend(config.generics.iter().map(|generic| External {
        id: &generic.id,
        link: &generic.link,
        queues: Queues::Each(&generic.queue_sizes),
    }));
    devices
}

impl Queues<'_> {
    fn check(&self, id: &str) -> Result<(), Error> {
        let (count, fits, expected) = match self {
            Self::Alike(backend, fits, expected) => (backend.num_queues, *fits, *expected),
            Self::Each(sizes) => {
                let count = u16::try_from(sizes.len()).unwrap_or(u16::MAX);
                (count, (1..=64).contains(&count), "1 to 64")
            }
        };
        if !fits {
            return Err(Error::Queues {
                id: id.to_owned(),
                num_queues: count,
                expected,
            });
        }
        let sizes = match self {
            Self::Alike(backend, ..) => std::slice::from_ref(&backend.queue_size),
            Self::Each(sizes) => sizes,
        };
        let odd = |size: &&u16| !size.is_power_of_two() || !(2..=32768).contains(*size);
        match sizes.iter().find(odd) {
            Some(&queue_size) => Err(Error::QueueSize {
                id: id.to_owned(),
                queue_size,
            }),
            None => Ok(()),
        }
    }
}

fn sockets(config: &VmConfig, api_socket: Option<&Path>) -> Result<(), Error> {
    let serial = match &config.serial {
        super::SerialConfig::Socket(path) => Some(path.as_path()),
        _ => None,
    };
    let devices = external_devices(config);
    let devices = devices.iter().filter_map(|device| device.link.socket());
    let mut seen = BTreeSet::new();
    for path in devices.chain(serial).chain(api_socket) {
        if path.as_os_str().len() > 107 {
            return Err(Error::SocketTooLong { path: path.into() });
        }
        if !seen.insert(path) {
            return Err(Error::SocketTwice { path: path.into() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_irqchip::Mode;

    use crate::config::{DiskConfig, SerialConfig, device_flags, testing};

    const HOST: Host = Host {
        physical_bits: 40,
        memory_bytes: 32 << 30,
        cpus: HostCpus::ALL,
    };

    fn config() -> VmConfig {
        VmConfig {
            disks: vec![disk("socket=/d0"), disk("socket=/d1,id=second")],
            nets: vec![device_flags::net("socket=/n", 0).unwrap()],
            fs: vec![device_flags::fs("tag=t,socket=/f", 0).unwrap()],
            ..testing::config()
        }
    }

    fn disk(text: &str) -> DiskConfig {
        device_flags::disk(text, 0).unwrap()
    }

    fn check(change: impl FnOnce(&mut VmConfig)) -> Result<(), String> {
        let mut config = config();
        change(&mut config);
        validate(&config, Some(Path::new("/api")), HOST).map_err(|error| error.to_string())
    }

    #[test]
    fn an_ordinary_guest_passes() {
        assert_eq!(check(|_| ()), Ok(()));
        assert_eq!(check(|c| c.memory.size_bytes = 5 << 30), Ok(()));
        assert_eq!(check(|c| c.cpus.boot = 255), Ok(()));
    }

    #[test]
    fn vcpu_counts() {
        for (boot, irqchip, fits) in [
            (0, Mode::Kernel, false),
            (256, Mode::Kernel, false),
            (0, Mode::Split, false),
            (256, Mode::Split, true),
            (1024, Mode::Split, true),
            (1025, Mode::Split, false),
        ] {
            let checked = check(|c| {
                c.cpus.boot = boot;
                c.platform.irqchip = irqchip;
            });
            assert_eq!(checked.is_ok(), fits, "{boot} {irqchip:?}");
        }
    }

    #[test]
    fn memory_sizes() {
        for (size, message) in [
            (0, "is too small"),
            (1 << 20, "is too small"),
            ((512 << 20) + 4096, "is not a multiple of 2 MiB"),
            (
                64 << 30,
                "more than the host's memory and swap of 32768 MiB",
            ),
            (1 << 40, "does not fit the host's 40-bit physical addresses"),
            (u64::MAX - (2 << 20) + 1, "does not fit"),
        ] {
            let error = check(|c| c.memory.size_bytes = size).unwrap_err();
            assert!(error.contains(message), "{size}: {error}");
        }
    }

    #[test]
    fn two_of_a_thing() {
        let error = check(|c| c.disks[1].id = "_disk0".into()).unwrap_err();
        assert_eq!(error, "id='_disk0' is used by two devices");
        let error = check(|c| c.nets[0].backend.link = Link::Listen("/d1".into())).unwrap_err();
        assert_eq!(error, "socket /d1 is given twice");
        assert!(check(|c| c.serial = SerialConfig::Socket("/api".into())).is_err());
    }

    #[test]
    fn queues_and_ids() {
        assert!(check(|c| c.disks[0].backend.num_queues = 0).is_err());
        assert!(check(|c| c.nets[0].backend.num_queues = 3).is_err());
        assert!(check(|c| c.disks[0].backend.queue_size = 100).is_err());
        assert!(check(|c| c.fs[0].backend.num_queues = 64).is_err());
        let generic = |sizes| {
            let text = format!("device_type=rng,socket=/g,queue_sizes={sizes}");
            let device = device_flags::generic(&text, 0).unwrap();
            check(|c| c.generics.push(device))
        };
        assert_eq!(generic("[64,256]"), Ok(()));
        assert!(generic("[64,100]").is_err());
        assert!(check(|c| c.disks[0].id = "a b".into()).is_err());
        for id in ["vcpu0", "irqchip", "_rng"] {
            let error = check(|c| c.disks[0].id = id.into()).unwrap_err();
            assert_eq!(error, format!("id='{id}' is a name of the VMM's own"));
        }
    }

    #[test]
    fn command_lines() {
        assert!(check(|c| c.payload.cmdline = "x".repeat(2048)).is_err());
        assert!(check(|c| c.payload.cmdline = "a\0b".into()).is_err());
        assert_eq!(check(|c| c.payload.cmdline = "x".repeat(2047)), Ok(()));
    }
}
