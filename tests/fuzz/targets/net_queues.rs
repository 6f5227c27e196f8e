//! A hostile guest of the network device: rings, chains, headers and commands of its three kinds of queue.
//!
//! Input: see `berth_net::testing`; guest memory begins at byte 17, with 16 descriptors at 0x000, avail at
//! 0x100 and used at 0x140.
#![no_main]

use berth_net::testing::hostile_guest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| hostile_guest(data));
