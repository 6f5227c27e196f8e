//! /dev/kvm, opened; where that fails, with what to do about it.

#![forbid(unsafe_code)]

use std::io;

use berth_irqchip::Mode;
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::config::validate::Host;
use crate::cpu::affinity;

/// The only version that KVM has had since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// What the machine cannot be built without.
const REQUIRED: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqfdResample, "KVM_CAP_IRQFD_RESAMPLE"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What a machine with KVM's own interrupt controllers needs.
const REQUIRED_KERNEL: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
];
/// What a machine with an IOAPIC in this process needs.
const REQUIRED_SPLIT: &[(Cap, &str)] = &[(Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP")];

/// Why there is no KVM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No /dev/kvm.
    #[error(
        "there is no /dev/kvm: load KVM with 'modprobe kvm_intel' or 'modprobe kvm_amd', and check that \
         virtualisation is enabled in the firmware"
    )]
    Absent,
    /// No right to it.
    #[error(
        "no permission for /dev/kvm: add the user to its group with 'usermod -aG kvm USER' and log in \
         again, or run as root"
    )]
    Forbidden,
    /// Something else.
    #[error("cannot open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// Not a KVM that we know.
    #[error("/dev/kvm has API version {0}, not {API_VERSION}")]
    Version(i32),
    /// Too old, or made for something else.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// More vCPUs than it takes.
    #[error("--cpus: boot={boot} is more than this host's KVM takes: {most} ({limit})")]
    TooManyVcpus {
        /// As asked.
        boot: u16,
        /// As many as can be.
        most: usize,
        /// What says so.
        limit: &'static str,
    },
}

/// Opens /dev/kvm and checks that it can do what a machine needs; one with these interrupt controllers, if
/// it is known which.
pub fn open(irqchip: Option<Mode>) -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => Error::Absent,
        libc::EACCES | libc::EPERM => Error::Forbidden,
        _ => Error::Open(error),
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::Version(version));
    }
    let controllers = match irqchip {
        Some(Mode::Kernel) => REQUIRED_KERNEL,
        Some(Mode::Split) => REQUIRED_SPLIT,
        None => &[],
    };
    for (cap, name) in REQUIRED.iter().chain(controllers) {
        if !kvm.check_extension(*cap) {
            return Err(Error::Lacks(name));
        }
    }
    Ok(kvm)
}

/// vCPUs whose APIC ids have eight bits, of which 255 is everybody's.
const VCPUS_OF_8_BITS: usize = 255;

/// Checks that a VM can have so many vCPUs, whose APIC ids are their numbers.
pub fn check_vcpus(vm: &VmFd, boot: u16, extended_destinations: bool) -> Result<(), Error> {
    let known = |cap| usize::try_from(vm.check_extension_int(cap)).unwrap_or(0);
    let limits = [
        (known(Cap::MaxVcpus), "KVM_CAP_MAX_VCPUS"),
        (known(Cap::MaxVcpuId), "KVM_CAP_MAX_VCPU_ID"),
    ];
    within_limits(boot, &limits, extended_destinations)
}

/// A limit of 0 is one that KVM is too old to tell.
fn within_limits(
    boot: u16,
    limits: &[(usize, &'static str)],
    extended_destinations: bool,
) -> Result<(), Error> {
    let ids = (VCPUS_OF_8_BITS, "APIC ids of 8 bits");
    let ids = Some(ids).filter(|_| !extended_destinations);
    let told = limits.iter().copied().filter(|(most, _)| *most > 0);
    match told.chain(ids).min_by_key(|(most, _)| *most) {
        Some((most, limit)) if usize::from(boot) > most => {
            Err(Error::TooManyVcpus { boot, most, limit })
        }
        _ => Ok(()),
    }
}

/// The host's limits.
pub fn host() -> io::Result<Host> {
    Ok(Host {
        physical_bits: physical_bits(&std::fs::read_to_string("/proc/cpuinfo")?),
        memory_bytes: memory_bytes(&std::fs::read_to_string("/proc/meminfo")?),
        cpus: affinity::of_this_process()?,
    })
}

/// From a line such as `address sizes : 46 bits physical, 48 bits virtual`; 36 where there is none.
fn physical_bits(cpuinfo: &str) -> u32 {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("address sizes"))
        .and_then(|rest| rest.trim_start_matches([' ', '\t', ':']).split(' ').next())
        .and_then(|bits| bits.parse().ok())
        .unwrap_or(36)
}

/// RAM and swap.
fn memory_bytes(meminfo: &str) -> u64 {
    let field = |name: &str| {
        let value = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.split_whitespace().next());
        value.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    field("MemTotal:") + field("SwapTotal:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_proc() {
        let cpuinfo = "processor\t: 0\naddress sizes\t: 46 bits physical, 48 bits virtual\n";
        assert_eq!(physical_bits(cpuinfo), 46);
        assert_eq!(physical_bits("flags : none"), 36);
        let meminfo = "MemTotal:       1024 kB\nMemFree: 5 kB\nSwapTotal:         1 kB\n";
        assert_eq!(memory_bytes(meminfo), 1025 << 10);
    }

    #[test]
    fn the_lowest_limit_is_the_one_in_the_message() {
        let host = [(288, "KVM_CAP_MAX_VCPUS"), (4096, "KVM_CAP_MAX_VCPU_ID")];
        assert!(within_limits(288, &host, true).is_ok());
        assert_eq!(
            within_limits(289, &host, true).unwrap_err().to_string(),
            "--cpus: boot=289 is more than this host's KVM takes: 288 (KVM_CAP_MAX_VCPUS)"
        );
        assert!(within_limits(255, &host, false).is_ok());
        assert_eq!(
            within_limits(256, &host, false).unwrap_err().to_string(),
            "--cpus: boot=256 is more than this host's KVM takes: 255 (APIC ids of 8 bits)"
        );
        let silent = [(0, "KVM_CAP_MAX_VCPUS"), (0, "KVM_CAP_MAX_VCPU_ID")];
        assert!(within_limits(1024, &silent, true).is_ok());
    }
}
