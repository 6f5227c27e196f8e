//! KVM's memory slots: one for each piece of guest RAM (KVM api.rst, `KVM_SET_USER_MEMORY_REGION`).
#![expect(unsafe_code, reason = "KVM's memory slots have no safe wrapper")]

use std::mem::ManuallyDrop;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Error, GuestRam};

impl GuestRam {
    /// Gives the memory to a VM, one slot a piece, until the returned value is dropped.
    pub fn register(&self, vm: &Arc<VmFd>) -> Result<RamSlots, Error> {
        let mut slots = RamSlots {
            vm: Arc::clone(vm),
            registered: 0,
            memory: ManuallyDrop::new(self.memory().clone()),
        };
        for (slot, region) in (0..).zip(self.memory().iter()) {
            let slot_region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a live mapping of exactly this length, and `slots` keeps it mapped
            // until KVM has let go of it. Nothing in this process makes references to it.
            unsafe { vm.set_user_memory_region(slot_region) }.map_err(|source| {
                Error::Register {
                    slot,
                    gpa: slot_region.guest_phys_addr,
                    len: slot_region.memory_size,
                    source,
                }
            })?;
            slots.registered += 1;
        }
        Ok(slots)
    }
}

/// KVM's use of guest RAM. Dropped, it takes the slots back and then unmaps; where KVM does not let go,
/// the memory stays mapped to the end of the process.
#[derive(Debug)]
pub struct RamSlots {
    vm: Arc<VmFd>,
    registered: u32,
    memory: ManuallyDrop<GuestMemoryMmap>,
}

impl Drop for RamSlots {
    fn drop(&mut self) {
        for slot in 0..self.registered {
            let empty = kvm_userspace_memory_region {
                slot,
                ..Default::default()
            };
            // SAFETY: a slot of size 0 is removed; it refers to no memory.
            if let Err(error) = unsafe { self.vm.set_user_memory_region(empty) } {
                tracing::warn!(slot, %error, "KVM keeps a memory slot; its memory stays mapped");
                return;
            }
        }
        // SAFETY: dropped here only, and not used after.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}
