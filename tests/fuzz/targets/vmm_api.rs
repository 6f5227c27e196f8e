//! What a client of the REST API sends: HTTP requests and their JSON bodies.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| berth_vmm::fuzzing::api(data));
