//! A ring, its descriptor chains and a region of requests in flight, all of the guest's or the
//! frontend's choice, without a device.
//!
//! Input: one byte (bit 0 EVENT_IDX, bit 1 INDIRECT_DESC, bit 2 a region of requests in flight, bit 3
//! chains are put back, bits 4-5 the ring's size), two of the base, 80 of the region's start, then
//! guest memory, which is two regions side by side:
//!
//! ```text
//!   0x000 descriptors   0x100 avail   0x140 used   0x200 … anything   0x800 the second region   0x1000
//! ```
//!
//! What is popped keeps to guest memory, and a round of the ring ends.
#![no_main]

use std::rc::Rc;
use std::sync::Arc;

use berth_queue_worker::guest_memory::{Region, RegionInfo};
use berth_queue_worker::inflight::{self, InflightRegion};
use berth_queue_worker::testing::GuestRam;
use berth_queue_worker::{Chain, GuestMemory, Ring, RingError, RingLayout, features};
use libfuzzer_sys::fuzz_target;

const RAM_SIZE: u64 = 0x1000;
const HALF: u64 = RAM_SIZE / 2;
const HEAD: usize = 83;

/// Guest memory in two regions, contiguous for the guest and apart for us.
fn memory_of(ram: &GuestRam) -> GuestMemory {
    let file = ram.fd().try_clone_to_owned().expect("clone the memfd");
    let map = |at| {
        let info = RegionInfo {
            gpa: at,
            size: HALF,
            uva: at,
            file_offset: at,
        };
        Region::map(info, &file).expect("map the guest")
    };
    let memory = GuestMemory::default().with(map(0)).expect("one region");
    memory.with(map(HALF)).expect("two regions")
}

/// A region as a frontend hands it back: its start is the input's.
fn inflight(start: &[u8], size: u16) -> Arc<InflightRegion> {
    let (file, info) = inflight::allocate(1, size).expect("allocate the region");
    let place = RegionInfo {
        gpa: 0,
        size: info.map_size,
        uva: 0,
        file_offset: 0,
    };
    let bytes = Region::map(place, &file).expect("map the region");
    for (at, byte) in start.iter().enumerate() {
        let _ = bytes.as_slice().store(at, *byte);
    }
    Arc::new(InflightRegion::map(info, &file).expect("a region of our own"))
}

fn check(chain: &Chain) {
    let readable: usize = chain.readable().map(|piece| piece.len()).sum();
    let writable: usize = chain.writable().map(|piece| piece.len()).sum();
    assert_eq!(readable, chain.readable_len());
    assert_eq!(writable, chain.writable_len());
    let all = chain.readable().chain(chain.writable());
    assert!(all.map(|piece| piece.len()).all(|len| len as u64 <= HALF));
    let mut first = [0; 64];
    let got = chain.reader().read(&mut first);
    assert_eq!(got, readable.min(first.len()));
    let put = chain.writer().write(&first[..got]);
    assert_eq!(put, writable.min(got));
}

fn run(ring: &mut Ring, put_back: bool) -> Result<(), RingError> {
    let mut chain = Chain::new();
    for _ in 0..4 {
        ring.disable_notification()?;
        // The device's own writes may be to the ring, so that it never runs dry.
        for n in 0..2 * ring.size() {
            if !ring.pop_into(&mut chain)? {
                break;
            }
            check(&chain);
            if put_back && n % 3 == 1 {
                ring.put_back(1);
                break;
            }
            ring.push_used(chain.head(), chain.writable_len() as u32)?;
        }
        ring.publish()?;
        ring.needs_signal()?;
        ring.enable_notification()?;
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let Some((head, guest)) = data.split_first_chunk::<HEAD>() else {
        return;
    };
    let [flags, base_low, base_high, region @ ..] = head;
    let ram = GuestRam::new(0, RAM_SIZE);
    ram.write(0, &guest[..guest.len().min(RAM_SIZE as usize)]);
    let mut bits = 1 << features::VERSION_1;
    for (flag, bit) in [
        (1, features::RING_EVENT_IDX),
        (2, features::RING_INDIRECT_DESC),
    ] {
        if flags & flag != 0 {
            bits |= 1 << bit;
        }
    }
    let size = [16, 1, 2, 8][usize::from(flags >> 4 & 3)];
    let layout = RingLayout {
        size,
        desc_uva: 0,
        avail_uva: 0x100,
        used_uva: 0x140,
    };
    let base = u16::from_le_bytes([*base_low, *base_high]);
    let Ok(mut ring) = Ring::new(layout, base, bits, Rc::new(memory_of(&ram))) else {
        return;
    };
    if flags & 4 != 0 {
        match ring.tracked(inflight(region, size), 0) {
            Ok(tracked) => ring = tracked,
            Err(_) => return,
        }
    }
    let _ = run(&mut ring, flags & 8 != 0);
});
