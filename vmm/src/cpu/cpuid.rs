//! What a vCPU says it is.
//!
//! The start is what KVM supports on this host (api.rst, `KVM_GET_SUPPORTED_CPUID`), which has KVM's own
//! leaves (clock, PV features) too. On that goes what only the VMM knows: the vCPU's place in the
//! topology and what the in-kernel LAPIC can do. Taken away: nested virtualisation, whose state a
//! guest could not keep over a snapshot yet, and IA32_ARCH_CAPABILITIES where KVM would invent the MSR
//! (AMD) or refuse it.
//!
//! `--cpus features=` changes bits after all that ([`super::features`]).
//!
//! The TSC frequency leaves (0x15, 0x16, 0x4000_0010) are [`super::hypervisor`]'s.
//!
//! Intel SDM volume 2, CPUID; AMD64 APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};
use kvm_bindings::{KVM_CAP_TSC_DEADLINE_TIMER, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::topology::{Topology, apic_id};
use crate::config::CpusConfig;

const IA32_ARCH_CAPABILITIES: u32 = 0x10a;

/// Leaf 1, ecx and edx.
const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Leaf 7, edx.
const EDX_ARCH_CAPABILITIES: u32 = 1 << 29;
/// Leaf 0x8000_0001, ecx.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Types of topology level in leaves 0xb and 0x1f.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Why a vCPU has no CPUID.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM did not say what it supports.
    #[error("KVM does not say which CPU features it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// A feature that was asked for.
    #[error("--cpus: KVM on this host does not support the CPU feature '{0}'")]
    Lacking(&'static str),
    /// More entries than KVM takes.
    #[error("{0} CPUID entries are more than KVM takes")]
    TooMany(usize),
}

/// What the host's KVM can do beyond its list of leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Host {
    tsc_deadline: bool,
    arch_capabilities: bool,
}

/// CPUID of vCPU `id` in a guest with these CPUs, for `KVM_SET_CPUID2`.
pub fn for_vcpu(kvm: &Kvm, cpus: &CpusConfig, id: u16) -> Result<CpuId, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::Supported)?;
    let feature_msrs = kvm.get_msr_feature_index_list();
    let host = Host {
        tsc_deadline: kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0,
        arch_capabilities: feature_msrs
            .is_ok_and(|list| list.as_slice().contains(&IA32_ARCH_CAPABILITIES)),
    };
    let mut entries = adjust(supported.as_slice(), host, Topology::new(cpus), id);
    cpus.features
        .apply(&mut entries, supported.as_slice())
        .map_err(Error::Lacking)?;
    CpuId::from_entries(&entries).map_err(|_| Error::TooMany(entries.len()))
}

/// The supported leaves, made this vCPU's.
fn adjust(
    supported: &[kvm_cpuid_entry2],
    host: Host,
    topology: Topology,
    id: u16,
) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(supported);
    // Leaves that are made whole, or that would contradict the others.
    let replaced = |function| matches!(function, 0xb | 0x1f | 0x8000_0026);
    let mut entries: Vec<_> = supported
        .iter()
        .copied()
        .filter(|entry| !replaced(entry.function))
        .collect();
    for entry in &mut entries {
        match entry.function {
            0 => entry.eax = entry.eax.max(0xb),
            1 => leaf_1(entry, host, topology, id),
            4 => cache_sharing(entry, topology, true),
            7 if entry.index == 0 && (amd || !host.arch_capabilities) => {
                entry.edx &= !EDX_ARCH_CAPABILITIES;
            }
            0x8000_0001 => leaf_8000_0001(entry, amd, topology),
            0x8000_0008 if amd => {
                let bits = topology.core_bits();
                entry.ecx = (entry.ecx & !0xf0ff)
                    | bits << 12
                    | (u32::from(topology.cores()) - 1).min(0xff);
            }
            0x8000_001d => cache_sharing(entry, topology, false),
            0x8000_001e => {
                // Extended APIC id; core id, one thread a core; node 0 of 1.
                entry.eax = apic_id(id).into();
                entry.ebx = u32::from(id) & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let highest = supported
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    entries.extend(topology_leaf(0xb, topology, id));
    if highest >= 0x1f && !amd {
        entries.extend(topology_leaf(0x1f, topology, id));
    }
    entries.sort_by_key(|entry| (entry.function, entry.index));
    entries
}

fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().find(|e| e.function == 0).is_some_and(|e| {
        let vendor = [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat();
        vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
    })
}

fn leaf_1(entry: &mut kvm_cpuid_entry2, host: Host, topology: Topology, id: u16) {
    // Eight bits each: past them the topology leaf says more.
    let ids = topology.addressable_ids().min(0xff);
    entry.ebx = (entry.ebx & 0xffff) | ids << 16 | (u32::from(apic_id(id)) & 0xff) << 24;
    entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
    entry.ecx &= !(ECX_VMX | ECX_TSC_DEADLINE);
    if host.tsc_deadline {
        entry.ecx |= ECX_TSC_DEADLINE;
    }
    entry.edx &= !EDX_HTT;
    if topology.cores() > 1 {
        entry.edx |= EDX_HTT;
    }
}

fn leaf_8000_0001(entry: &mut kvm_cpuid_entry2, amd: bool, topology: Topology) {
    entry.ecx &= !(ECX_SVM | ECX_CMP_LEGACY | ECX_TOPOLOGY_EXTENSIONS);
    if amd {
        entry.ecx |= ECX_TOPOLOGY_EXTENSIONS;
        if topology.cores() > 1 {
            entry.ecx |= ECX_CMP_LEGACY;
        }
    }
}

/// Who shares a cache: the first two levels are a core's own, the others the socket's. Intel's leaf also
/// has the number of cores.
fn cache_sharing(entry: &mut kvm_cpuid_entry2, topology: Topology, intel: bool) {
    let no_more_caches = entry.eax & 0x1f == 0;
    if no_more_caches {
        return;
    }
    let level = entry.eax >> 5 & 7;
    let last_id = topology.addressable_ids() - 1;
    let sharing = if level < 3 { 0 } else { last_id };
    entry.eax = (entry.eax & 0x3fff) | sharing << 14;
    if intel {
        entry.eax |= last_id.min(0x3f) << 26;
    }
}

/// The extended topology leaf: threads of a core, cores of the socket, end.
fn topology_leaf(function: u32, topology: Topology, id: u16) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: apic_id(id).into(),
        padding: [0; 3],
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, topology.core_bits(), topology.cores().into(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        tsc_deadline: true,
        arch_capabilities: true,
    };

    fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn vendor(max: u32, name: &[u8; 12]) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [max, word(0), word(8), word(4)])
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(0x1f, b"GenuineIntel"),
            leaf(1, 0, [0x50654, 0x0710_0800, ECX_VMX, 0]),
            leaf(4, 0, [0x1c00_4121, 0, 0, 0]),
            leaf(4, 3, [0xfc1f_c163, 0, 0, 0]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(7, 0, [0, 0, 0, EDX_ARCH_CAPABILITIES]),
            leaf(0xb, 0, [1, 2, 0x100, 7]),
            leaf(0x8000_0001, 0, [0; 4]),
            leaf(0x8000_0008, 0, [0x3027, 0, 0, 0]),
        ]
    }

    fn amd() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(0xd, b"AuthenticAMD"),
            leaf(1, 0, [0x0083_0f10, 0x0710_0800, 0, 0]),
            leaf(7, 0, [0, 0, 0, EDX_ARCH_CAPABILITIES]),
            leaf(0x8000_0001, 0, [0, 0, ECX_SVM, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x703f, 0]),
            leaf(0x8000_001d, 0, [0x4121, 0, 0, 0]),
            leaf(0x8000_001d, 3, [0x1_c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [7, 0x103, 0x101, 0]),
            leaf(0x8000_0026, 0, [1, 2, 0x100, 7]),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|e| e.function == function && e.index == index);
        let entry = *found.next().expect("leaf is there");
        assert!(found.next().is_none(), "leaf {function:#x} is there once");
        entry
    }

    fn vcpu(supported: &[kvm_cpuid_entry2], boot: u16, id: u16) -> Vec<kvm_cpuid_entry2> {
        adjust(supported, HOST, Topology::new(&CpusConfig::of(boot)), id)
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_everywhere() {
        for id in 0..4 {
            let entries = vcpu(&intel(), 4, id);
            let apic_id = u32::from(id);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, apic_id);
            for leaf in [0xb, 0x1f] {
                for index in 0..3 {
                    assert_eq!(find(&entries, leaf, index).edx, apic_id);
                }
            }
            let entries = vcpu(&amd(), 4, id);
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, apic_id);
            assert_eq!(find(&entries, 0xb, 1).edx, apic_id);
        }
    }

    #[test]
    fn intel_says_one_socket_of_single_threaded_cores() {
        let entries = vcpu(&intel(), 6, 0);
        assert_eq!(find(&entries, 1, 0).ebx >> 16 & 0xff, 8);
        assert_eq!(find(&entries, 1, 0).ebx & 0xffff, 0x0800);
        let level1 = find(&entries, 4, 0).eax;
        assert_eq!((level1 >> 14 & 0xfff, level1 >> 26), (0, 7));
        let level3 = find(&entries, 4, 3).eax;
        assert_eq!((level3 >> 14 & 0xfff, level3 >> 26), (7, 7));
        assert_eq!(find(&entries, 4, 4).eax, 0);
        let core = find(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 0x201));
        let smt = find(&entries, 0xb, 0);
        assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn amd_says_one_socket_of_single_threaded_cores() {
        let entries = vcpu(&amd(), 6, 5);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x3005);
        assert_eq!(find(&entries, 0x8000_001d, 0).eax >> 14, 0);
        assert_eq!(find(&entries, 0x8000_001d, 3).eax >> 14, 7);
        let node = find(&entries, 0x8000_001e, 0);
        assert_eq!((node.ebx, node.ecx), (5, 0));
        let features = find(&entries, 0x8000_0001, 0).ecx;
        assert_eq!(features, ECX_TOPOLOGY_EXTENSIONS | ECX_CMP_LEGACY);
        assert!(entries.iter().all(|e| e.function != 0x8000_0026));
        assert!(entries.iter().all(|e| e.function != 0x1f));
    }

    #[test]
    fn fields_that_are_too_narrow_for_many_cores_say_their_most() {
        let entries = vcpu(&intel(), 1024, 1023);
        let ebx = find(&entries, 1, 0).ebx;
        assert_eq!(
            (ebx >> 24, ebx >> 16 & 0xff, ebx & 0xffff),
            (0xff, 0xff, 0x0800)
        );
        let level3 = find(&entries, 4, 3).eax;
        assert_eq!((level3 >> 14 & 0xfff, level3 >> 26), (1023, 63));
        let core = find(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.edx), (10, 1024, 1023));
        let entries = vcpu(&amd(), 300, 299);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x90ff);
        assert_eq!(find(&entries, 0x8000_001e, 0).eax, 299);
        assert_eq!(find(&entries, 0x8000_001e, 0).ebx, 299 & 0xff);
    }

    #[test]
    fn one_vcpu_is_no_hyperthreading() {
        let edx = |boot| find(&vcpu(&intel(), boot, 0), 1, 0).edx & EDX_HTT;
        assert_eq!(edx(1), 0);
        assert_eq!(edx(2), EDX_HTT);
    }

    #[test]
    fn what_kvm_adds_is_offered_and_nesting_is_not() {
        let ecx = find(&vcpu(&intel(), 1, 0), 1, 0).ecx;
        assert_eq!(ecx, ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE);
        assert_eq!(find(&vcpu(&amd(), 1, 0), 0x8000_0001, 0).ecx & ECX_SVM, 0);
    }

    #[test]
    fn arch_capabilities_only_where_they_are_real() {
        let edx = |entries: &[_]| find(entries, 7, 0).edx & EDX_ARCH_CAPABILITIES;
        assert_ne!(edx(&vcpu(&intel(), 1, 0)), 0);
        assert_eq!(edx(&vcpu(&amd(), 1, 0)), 0);
        let host = Host {
            arch_capabilities: false,
            ..HOST
        };
        let topology = Topology::new(&CpusConfig::of(1));
        assert_eq!(edx(&adjust(&intel(), host, topology, 0)), 0);
    }

    #[test]
    fn the_topology_leaf_is_within_the_highest_leaf() {
        let mut old = amd();
        old[0].eax = 7;
        assert_eq!(find(&vcpu(&old, 2, 0), 0, 0).eax, 0xb);
        assert_eq!(find(&vcpu(&intel(), 2, 0), 0, 0).eax, 0x1f);
    }
}
