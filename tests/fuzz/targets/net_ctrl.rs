//! Commands of the network device's control queue.
//!
//! Input: eight bytes of negotiated features, then the command as the guest wrote it. What parses keeps
//! within the limits that the code behind relies on.
#![no_main]

use berth_net::ctrl::{Command, Limits, MAX_LISTED, MacSet, parse};
use libfuzzer_sys::fuzz_target;

const MAX_PAIRS: u16 = 4;

fuzz_target!(|data: &[u8]| {
    let Some((features, command)) = data.split_first_chunk::<8>() else {
        return;
    };
    let limits = Limits {
        features: u64::from_le_bytes(*features),
        max_pairs: MAX_PAIRS,
    };
    match parse(command, limits) {
        Ok(Command::SetPairs(pairs)) => assert!((1..=MAX_PAIRS).contains(&pairs)),
        Ok(Command::AddVlan(vid) | Command::DelVlan(vid)) => assert!(vid < 4096),
        Ok(Command::SetGuestOffloads(bits)) => assert_eq!(bits & !limits.features, 0),
        Ok(Command::SetMacTable(table)) => {
            assert!(is_bounded(&table.unicast) && is_bounded(&table.multicast));
        }
        _ => {}
    }
});

fn is_bounded(set: &MacSet) -> bool {
    match set {
        MacSet::Listed(list) => list.len() <= MAX_LISTED,
        MacSet::Everything => true,
    }
}
