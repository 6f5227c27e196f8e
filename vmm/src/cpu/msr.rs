//! Model-specific registers that firmware would have set before an operating system runs.
//!
//! KVM's own reset values serve for everything else (APIC base, PAT, SYSENTER, TSC). The memory types
//! must be the same on every vCPU, or Linux complains and sets them itself.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// IA32_MISC_ENABLE; bit 0: fast string operations.
const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE; bit 11: MTRRs on; low bits: type of all memory that no other MTRR names.
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// Why MSRs were not set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused the call.
    #[error("KVM refused to set model-specific registers")]
    Set(#[source] kvm_ioctls::Error),
    /// KVM refused one MSR.
    #[error("KVM refused MSR {index:#x} = {value:#x}")]
    Refused {
        /// The MSR.
        index: u32,
        /// What it should have become.
        value: u64,
    },
}

/// Sets a vCPU's MSRs for its first instruction; every vCPU, whether it is started now or by another.
pub fn boot(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries = [
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).expect("two entries are fewer than KVM's limit");
    let set = vcpu.set_msrs(&msrs).map_err(Error::Set)?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::Refused {
            index: refused.index,
            value: refused.data,
        }),
    }
}
