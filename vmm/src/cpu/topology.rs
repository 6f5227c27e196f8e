//! Which processors there are: one socket of N cores, one thread each.
//!
//! A vCPU's number, its APIC id and its ACPI processor id are the same. CPUID ([`super::cpuid`]) and the MADT
//! ([`crate::boot::acpi`]) must tell the guest one story, and both take it from here.

use crate::config::CpusConfig;

/// The guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    cores: u16,
}

impl Topology {
    /// Of a guest with these CPUs; at least one.
    pub fn new(cpus: &CpusConfig) -> Self {
        Self {
            cores: cpus.boot.max(1),
        }
    }

    /// Cores in the socket.
    pub fn cores(self) -> u16 {
        self.cores
    }

    /// Bits of the APIC id that number the cores of a socket.
    pub fn core_bits(self) -> u32 {
        self.cores.next_power_of_two().trailing_zeros()
    }

    /// APIC ids that a socket could have with these bits.
    pub fn addressable_ids(self) -> u32 {
        1 << self.core_bits()
    }
}

/// APIC id of a vCPU.
pub fn apic_id(vcpu: u16) -> u16 {
    vcpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_bits_number_all_cores() {
        for (boot, bits, ids) in [
            (1, 0, 1),
            (2, 1, 2),
            (3, 2, 4),
            (4, 2, 4),
            (5, 3, 8),
            (64, 6, 64),
            (255, 8, 256),
            (257, 9, 512),
            (1024, 10, 1024),
        ] {
            let topology = Topology::new(&CpusConfig::of(boot));
            assert_eq!(topology.core_bits(), bits, "{boot}");
            assert_eq!(topology.addressable_ids(), ids, "{boot}");
        }
    }
}
