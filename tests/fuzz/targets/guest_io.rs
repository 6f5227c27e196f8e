//! A guest that accesses anything anywhere: ports, configuration space, BARs with virtio's registers and MSI-X
//! tables, twelve bytes of the input for each access.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| berth_vmm::fuzzing::guest_io(data));
