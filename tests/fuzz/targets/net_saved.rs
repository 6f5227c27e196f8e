//! What a card's daemon finds of its predecessor: a state of the driver's settings, in a region that the
//! frontend has had in its hands.
//!
//! Input: one byte (bits 0-1 queue pairs, bit 2 the settings lie in a region), 8 of features, then the
//! settings, or what the region has where settings are kept: two slots with sequence, length and check.
//!
//! Settings that are not taken change nothing. Those that are taken hold, can be saved and taken again, and a
//! reset of the device forgets them.
#![no_main]

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use berth_net::device::Identity;
use berth_net::mac::Mac;
use berth_net::port::testing::SocketPort;
use berth_net::state::DeviceState;
use berth_queue_worker::guest_memory::{Region, RegionInfo};
use berth_queue_worker::inflight::{self, InflightRegion};
use berth_queue_worker::saved_state::MAX_STATE;
use berth_queue_worker::testing::GuestRam;
use berth_queue_worker::{GuestMemory, Ring, RingLayout, features};
use libfuzzer_sys::fuzz_target;

const RING_SIZE: u16 = 16;
/// Bytes of both slots, which are the last of a queue's part.
const SLOTS: usize = 4096;
/// Where things are in settings: version and features, then whether there is an address.
const MAC_FLAG: usize = 9;
const MAC: Range<usize> = 10..16;
const OFFLOADS_AND_PAIRS: Range<usize> = 16..26;
const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn device(pairs: u16, features: u64) -> DeviceState {
    let identity = Identity {
        mac: Some(OWN),
        mtu: None,
        pairs,
    };
    let port = SocketPort::new(pairs).expect("socket pairs");
    let state = DeviceState::new(identity, Arc::new(port));
    state.set_features(features & identity.features(true) | 1 << features::VERSION_1);
    state
}

/// What a ring says was saved in a region whose slots have these bytes.
fn through_a_region(slots: &[u8]) -> Vec<u8> {
    let (file, info) = inflight::allocate(1, RING_SIZE).expect("allocate the region");
    let whole = RegionInfo {
        gpa: 0,
        size: info.map_size,
        uva: 0,
        file_offset: 0,
    };
    let mapped = Region::map(whole, &file).expect("map the region");
    let start = info.map_size as usize - SLOTS;
    let slots = &slots[..slots.len().min(SLOTS)];
    mapped.as_slice().write(start, slots).expect("room for it");
    let region = InflightRegion::map(info, &file).expect("a region of our own");

    let ram = GuestRam::new(0, 0x1000);
    let file = ram.fd().try_clone_to_owned().expect("clone the memfd");
    let guest = Region::map(ram.info(), &file).expect("map the guest");
    let memory = GuestMemory::default().with(guest).expect("one region");
    let layout = RingLayout {
        size: RING_SIZE,
        desc_uva: ram.uva(0),
        avail_uva: ram.uva(0x100),
        used_uva: ram.uva(0x140),
    };
    let ring = Ring::new(layout, 0, 1 << features::VERSION_1, Rc::new(memory));
    let ring = ring.and_then(|ring| ring.tracked(Arc::new(region), 0));
    let found = ring.and_then(|ring| ring.load_state()).expect("readable");
    assert!(found.len() <= MAX_STATE);
    found
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<9>() else {
        return;
    };
    let [kind, features @ ..] = *head;
    let features = u64::from_le_bytes(features);
    let pairs = u16::from(kind & 3) + 1;
    let settings = match kind & 4 {
        0 => rest.to_vec(),
        _ => through_a_region(rest),
    };
    let state = device(pairs, features);
    let before = (state.saved(), state.config());
    if !state.restore(&settings) {
        assert_eq!((state.saved(), state.config()), before);
        return;
    }
    let taken = state.saved();
    assert_eq!(taken[..MAC_FLAG], settings[..MAC_FLAG]);
    if settings[MAC_FLAG] == 0 {
        assert_eq!(taken[MAC_FLAG], 0);
    } else {
        assert_eq!(taken[MAC], settings[MAC]);
    }
    assert_eq!(taken[OFFLOADS_AND_PAIRS], settings[OFFLOADS_AND_PAIRS]);
    let successor = device(pairs, features);
    assert!(successor.restore(&taken), "what was saved is not taken");
    assert_eq!(successor.saved(), taken);
    assert_eq!(successor.config(), state.config());
    state.forget_driver();
    assert_eq!(state.config()[..6], OWN.0);
});
