//! What the hypervisor's own CPUID leaves say beyond KVM's: how fast the clocks tick, and how far messages
//! reach.
//!
//! | leaf | says | for |
//! |---|---|---|
//! | 0x4000_0010 | kHz of the TSC and of the local APIC timer | any guest (VMware's leaf, which QEMU has under KVM too) |
//! | 0x15, 0x16 | the same as a ratio to the crystal clock, and MHz | guests on Intel, where the leaves are the architecture's |
//! | 0x4000_0001 eax bit 15 | destinations of 15 bits in MSI addresses and IOAPIC entries | guests with the split irqchip |
//!
//! With them a guest needs no PIT to measure against. KVM's local APIC timer counts nanoseconds, so the
//! crystal is 1 GHz. Reference: Intel SDM volume 2, CPUID; Linux, kvm/x86/cpuid.rst.

#![forbid(unsafe_code)]

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::cpuid::Error;

/// KVM's local APIC timer counts at this rate.
const APIC_BUS_KHZ: u32 = 1_000_000;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const FEATURES: u32 = 0x4000_0001;
const FREQUENCIES: u32 = 0x4000_0010;
/// KVM_FEATURE_MSI_EXT_DEST_ID.
const MSI_EXT_DEST_ID: u32 = 1 << 15;
const TSC_RATIO: u32 = 0x15;
const PROCESSOR_FREQUENCY: u32 = 0x16;

/// What only the machine as built knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Frequency of the guest's TSC; none where KVM does not say.
    pub tsc_khz: Option<u32>,
    /// Whether MSI destinations have 15 bits.
    pub extended_destinations: bool,
}

/// A vCPU's leaves with these facts in them.
pub fn complete(cpuid: &CpuId, facts: Facts) -> Result<CpuId, Error> {
    let entries = add(cpuid.as_slice(), facts);
    CpuId::from_entries(&entries).map_err(|_| Error::TooMany(entries.len()))
}

fn add(entries: &[kvm_cpuid_entry2], facts: Facts) -> Vec<kvm_cpuid_entry2> {
    let mut entries = entries.to_vec();
    if facts.extended_destinations
        && let Some(features) = find(&mut entries, FEATURES)
    {
        features.eax |= MSI_EXT_DEST_ID;
    }
    let Some(tsc_khz) = facts.tsc_khz.filter(|khz| *khz > 0) else {
        return entries;
    };
    if let Some(base) = find(&mut entries, HYPERVISOR_BASE) {
        base.eax = base.eax.max(FREQUENCIES);
        put(&mut entries, FREQUENCIES, [tsc_khz, APIC_BUS_KHZ, 0]);
    }
    let highest = find(&mut entries, 0).map_or(0, |leaf| leaf.eax);
    if highest >= TSC_RATIO && is_intel(&mut entries) {
        put(
            &mut entries,
            TSC_RATIO,
            [APIC_BUS_KHZ, tsc_khz, APIC_BUS_KHZ * 1000],
        );
        if highest >= PROCESSOR_FREQUENCY {
            let mhz = (tsc_khz + 500) / 1000;
            put(&mut entries, PROCESSOR_FREQUENCY, [mhz, mhz, 100]);
        }
    }
    entries
}

fn find(entries: &mut [kvm_cpuid_entry2], function: u32) -> Option<&mut kvm_cpuid_entry2> {
    entries.iter_mut().find(|entry| entry.function == function)
}

/// Sets a leaf's eax, ebx and ecx; edx is 0.
fn put(entries: &mut Vec<kvm_cpuid_entry2>, function: u32, [eax, ebx, ecx]: [u32; 3]) {
    entries.retain(|entry| entry.function != function);
    let at = entries.partition_point(|entry| entry.function < function);
    let leaf = kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        ..Default::default()
    };
    entries.insert(at, leaf);
}

fn is_intel(entries: &mut [kvm_cpuid_entry2]) -> bool {
    find(entries, 0).is_some_and(|leaf| {
        [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat()
            == b"GenuineIntel"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        }
    }

    fn host(vendor: &[u8; 12], highest: u32) -> Vec<kvm_cpuid_entry2> {
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        let mut first = leaf(0, highest);
        (first.ebx, first.edx, first.ecx) = (word(0), word(4), word(8));
        vec![
            first,
            leaf(TSC_RATIO, 2),
            leaf(HYPERVISOR_BASE, FEATURES),
            leaf(FEATURES, 1),
            leaf(0x8000_0000, 0x8000_0008),
        ]
    }

    fn registers(entries: &[kvm_cpuid_entry2], function: u32) -> Option<[u32; 3]> {
        let mut found = entries.iter().filter(|entry| entry.function == function);
        let entry = found.next()?;
        assert!(found.next().is_none(), "leaf {function:#x} is there once");
        Some([entry.eax, entry.ebx, entry.ecx])
    }

    const FACTS: Facts = Facts {
        tsc_khz: Some(2_399_998),
        extended_destinations: true,
    };

    #[test]
    fn the_frequency_leaf_is_within_the_highest_leaf() {
        let entries = add(&host(b"AuthenticAMD", 0x10), FACTS);
        assert_eq!(
            registers(&entries, FREQUENCIES),
            Some([2_399_998, 1_000_000, 0])
        );
        assert_eq!(
            registers(&entries, HYPERVISOR_BASE).unwrap()[0],
            FREQUENCIES
        );
        assert!(entries.is_sorted_by_key(|entry| entry.function));
    }

    #[test]
    fn the_architectures_leaves_are_intels_and_exact() {
        let entries = add(&host(b"GenuineIntel", 0x1f), FACTS);
        let [denominator, numerator, crystal_hz] = registers(&entries, TSC_RATIO).unwrap();
        let tsc_hz = u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator);
        assert_eq!(tsc_hz, 2_399_998_000);
        assert_eq!(registers(&entries, PROCESSOR_FREQUENCY).unwrap()[0], 2400);
        let old = add(&host(b"GenuineIntel", 0xd), FACTS);
        assert_eq!(registers(&old, TSC_RATIO), Some([2, 0, 0]), "as KVM has it");
        let amd = add(&host(b"AuthenticAMD", 0x20), FACTS);
        assert_eq!(registers(&amd, PROCESSOR_FREQUENCY), None);
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let unknown = Facts {
            tsc_khz: None,
            extended_destinations: false,
        };
        let before = host(b"GenuineIntel", 0x1f);
        assert_eq!(add(&before, unknown), before);
    }

    #[test]
    fn long_destinations_are_promised_where_they_work() {
        let bit = |extended_destinations| {
            let facts = Facts {
                extended_destinations,
                ..FACTS
            };
            let entries = add(&host(b"AuthenticAMD", 0x10), facts);
            registers(&entries, FEATURES).unwrap()[0] & MSI_EXT_DEST_ID
        };
        assert_eq!((bit(true), bit(false)), (MSI_EXT_DEST_ID, 0));
    }
}
