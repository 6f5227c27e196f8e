//! What a guest puts into the queues of its balloon: features, what its free pages hold, and guest memory with four rings
//! and their buffers from its start.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| berth_vmm::fuzzing::balloon(data));
