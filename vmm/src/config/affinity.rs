//! `--cpus affinity=`: which CPUs of the host run which vCPU.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::RangeInclusive;

use super::ArgError;

/// CPUs that a host may have, at most; the kernel's limit on x86 is higher, ours keeps a set small.
pub const MAX_HOST_CPUS: usize = 1024;

/// One vCPU and the CPUs of the host that it may run on; others run anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuAffinity {
    /// The vCPU.
    pub vcpu: u16,
    /// Where it may run.
    pub host_cpus: Vec<usize>,
}

/// CPUs of the host that this process may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HostCpus([u64; MAX_HOST_CPUS / 64]);

impl HostCpus {
    /// Every CPU.
    pub const ALL: Self = Self([u64::MAX; MAX_HOST_CPUS / 64]);

    /// Those CPUs; what is past the limit is left out.
    pub fn new(cpus: impl IntoIterator<Item = usize>) -> Self {
        let mut set = Self([0; MAX_HOST_CPUS / 64]);
        for cpu in cpus {
            if let Some(word) = set.0.get_mut(cpu / 64) {
                *word |= 1 << (cpu % 64);
            }
        }
        set
    }

    /// Whether the process may use that CPU.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0
            .get(cpu / 64)
            .is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }
}

impl fmt::Debug for HostCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries((0..MAX_HOST_CPUS).filter(|cpu| self.contains(*cpu)))
            .finish()
    }
}

/// `[0@[0-1],1@[2,4]]`.
pub fn parse(text: &str) -> Result<Vec<VcpuAffinity>, ArgError> {
    read(text).ok_or_else(|| ArgError::BadValue {
        flag: "--cpus",
        key: "affinity",
        value: text.to_owned(),
        expected: "a list such as [0@[0-1],1@[2]]",
    })
}

fn read(text: &str) -> Option<Vec<VcpuAffinity>> {
    let mut rest = text.strip_prefix('[')?.strip_suffix(']')?;
    let mut list: Vec<VcpuAffinity> = Vec::new();
    loop {
        let (vcpu, after) = rest.split_once("@[")?;
        let (cpus, after) = after.split_once(']')?;
        let vcpu = vcpu.parse().ok()?;
        let mut host_cpus = Vec::new();
        for range in cpus.split(',') {
            host_cpus.extend(self::range(range)?);
        }
        list.push(VcpuAffinity { vcpu, host_cpus });
        match after.strip_prefix(',') {
            Some(more) => rest = more,
            None => return after.is_empty().then_some(list),
        }
    }
}

/// `3` or `0-3`.
fn range(text: &str) -> Option<RangeInclusive<usize>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && last < MAX_HOST_CPUS).then_some(first..=last)
}

/// Why the vCPUs cannot run there.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No such vCPU.
    #[error("--cpus: affinity names vCPU {vcpu} of a guest with {boot}")]
    NoVcpu {
        /// As named.
        vcpu: u16,
        /// vCPUs that there are.
        boot: u16,
    },
    /// The same vCPU twice.
    #[error("--cpus: affinity names vCPU {vcpu} twice")]
    Twice {
        /// Which.
        vcpu: u16,
    },
    /// No CPU at all.
    #[error("--cpus: affinity names no CPU for vCPU {vcpu}")]
    Nowhere {
        /// Which.
        vcpu: u16,
    },
    /// No such CPU.
    #[error("--cpus: affinity: CPU {cpu} is not on this host, or not for this process")]
    NoCpu {
        /// Which.
        cpu: usize,
    },
}

/// Holds the list against the guest's vCPUs and the host's CPUs.
pub fn validate(list: &[VcpuAffinity], boot: u16, host: &HostCpus) -> Result<(), Error> {
    for (index, VcpuAffinity { vcpu, host_cpus }) in list.iter().enumerate() {
        let vcpu = *vcpu;
        if vcpu >= boot {
            return Err(Error::NoVcpu { vcpu, boot });
        }
        if list[..index].iter().any(|earlier| earlier.vcpu == vcpu) {
            return Err(Error::Twice { vcpu });
        }
        if host_cpus.is_empty() {
            return Err(Error::Nowhere { vcpu });
        }
        if let Some(&cpu) = host_cpus.iter().find(|cpu| !host.contains(**cpu)) {
            return Err(Error::NoCpu { cpu });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges_are_read() {
        let list = parse("[0@[0-1],1@[2,5-6]]").unwrap();
        assert_eq!((list[0].vcpu, &list[0].host_cpus[..]), (0, &[0, 1][..]));
        assert_eq!((list[1].vcpu, &list[1].host_cpus[..]), (1, &[2, 5, 6][..]));
        for wrong in [
            "",
            "[]",
            "0@[0]",
            "[0@0]",
            "[0@[]]",
            "[0@[1-0]]",
            "[0@[0]",
            "[0@[0],]",
            "[x@[0]]",
            "[0@[9999]]",
            "[0@[0]1@[1]]",
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--cpus: affinity="), "{error}");
        }
    }

    #[test]
    fn vcpus_and_cpus_must_be_there() {
        let host = HostCpus::new([0, 1, 63, 64]);
        let check = |text: &str| validate(&parse(text).unwrap(), 2, &host);
        assert_eq!(check("[0@[0-1],1@[63-64]]"), Ok(()));
        assert_eq!(check("[2@[0]]"), Err(Error::NoVcpu { vcpu: 2, boot: 2 }));
        assert_eq!(check("[0@[0],0@[1]]"), Err(Error::Twice { vcpu: 0 }));
        assert_eq!(check("[0@[0-2]]"), Err(Error::NoCpu { cpu: 2 }));
    }
}
