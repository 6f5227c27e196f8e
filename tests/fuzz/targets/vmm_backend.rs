//! What a vhost-user backend says to the VMM: replies to the handshake of a device of each kind, requests of its own.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| berth_vmm::fuzzing::backend(data));
