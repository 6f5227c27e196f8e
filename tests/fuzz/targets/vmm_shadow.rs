//! What a guest puts into a ring that has a shadow, and what the backend says of it: features, what the backend says and
//! writes, and guest memory with the ring and its buffers from its start.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| berth_vmm::fuzzing::shadow(data));
