//! A guest that writes anything into its ring, for fuzz targets and a test over random bytes.
//!
//! One input is one short life of one queue: the bytes are the queue's kind, the features, frames
//! that arrive, and guest memory, ring included. Whatever they are, the queue must neither panic
//! nor reach outside of guest memory, and must give back on `drain` what it has not used.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::rc::Rc;
use std::sync::Arc;

use berth_queue_worker::guest_memory::Region;
use berth_queue_worker::testing::GuestRam;
use berth_queue_worker::{GuestMemory, QueueStart, QueueWorker, Ready, Ring, RingLayout};

use crate::ctrl_queue::CtrlQueue;
use crate::device::Identity;
use crate::mac::Mac;
use crate::net_device::NetQueue;
use crate::port::testing::SocketPort;
use crate::rx::RxQueue;
use crate::settings::{EngineChoice, Settings};
use crate::state::DeviceState;
use crate::tx::TxQueue;

const RAM_SIZE: u64 = 128 << 10;
const RING_SIZE: u16 = 16;
/// Where the parts of the ring are: descriptors at 0.
const AVAIL: u64 = 16 * RING_SIZE as u64;
const USED: u64 = AVAIL + 64;
/// Bytes before guest memory: kind, bits of features, four lengths of frames.
const PROLOGUE: usize = 1 + 8 + 4 * 2;

/// Lives one such life. Inputs that are too short for it do nothing.
///
/// # Panics
/// The queue has broken its promises.
pub fn hostile_guest(data: &[u8]) {
    let Some((prologue, memory)) = data.split_at_checked(PROLOGUE) else {
        return;
    };
    let identity = Identity {
        mac: Some(Mac([2, 0, 0, 0, 0, 1])),
        mtu: None,
        pairs: 1,
    };
    let features = u64::from_le_bytes(prologue[1..9].try_into().unwrap()) & identity.features(true);
    // VERSION_1; two bits of the kind are RING_INDIRECT_DESC and RING_EVENT_IDX.
    let features = features | 1 << 32 | u64::from(prologue[0] & 0xc0) << 22;
    let kind = prologue[0] & 0x3f;
    // A ring of the kernel for every input would make most of them wait for it.
    let batches = kind / 3 % 4 == 0;
    let settings = Settings {
        engine: if batches {
            EngineChoice::Auto
        } else {
            EngineChoice::Sync
        },
        ..identity.into()
    };
    let port = Arc::new(SocketPort::roomy(1).unwrap());
    let state = Arc::new(DeviceState::new(settings, port.clone()));
    state.set_features(features);
    let mut ring = ring_in(memory, features);
    let mut queue = queue_of(kind % 3, &state, features);
    for chunk in prologue[9..].chunks(2) {
        let len = usize::from(u16::from_le_bytes([chunk[0], chunk[1]]));
        let mut frame = memory[..memory.len().min(len)].to_vec();
        frame.resize(len, 0xa5);
        // A full port is a port without another frame.
        let _ = port.inject(0, &frame);
    }
    for _ in 0..3 {
        if queue.process(&mut ring, Ready::default()).is_err() || ring.publish().is_err() {
            break;
        }
    }
    let drained = queue.drain(&mut ring).and_then(|()| Ok(ring.publish()?));
    // Only a queue that writes no buffers cannot be made to overwrite its own used index.
    if matches!(queue, NetQueue::Tx(_)) && drained.is_ok() {
        assert_eq!(
            used_idx(&ring),
            ring.next_avail(),
            "taken, and neither used nor given back"
        );
    }
}

fn ring_in(bytes: &[u8], features: u64) -> Ring {
    let ram = GuestRam::new(0, RAM_SIZE);
    let len = bytes.len().min(RAM_SIZE as usize);
    ram.write(0, &bytes[..len]);
    // The used index is where the ring begins: from 0, as the base below.
    ram.write(USED, &[0; 4]);
    let file = ram.fd().try_clone_to_owned().unwrap();
    let region = Region::map(ram.info(), &file).unwrap();
    let memory = GuestMemory::default().with(region).unwrap();
    let layout = RingLayout {
        size: RING_SIZE,
        desc_uva: ram.uva(0),
        avail_uva: ram.uva(AVAIL),
        used_uva: ram.uva(USED),
    };
    Ring::new(layout, 0, features, Rc::new(memory)).unwrap()
}

fn queue_of(kind: u8, state: &Arc<DeviceState>, features: u64) -> NetQueue {
    let queue = u16::from(kind);
    let start = QueueStart {
        queue,
        size: RING_SIZE,
        features,
        counters: Arc::default(),
    };
    let state = Arc::clone(state);
    match kind {
        0 => NetQueue::Rx(Box::new(RxQueue::new(state, 0, &start).unwrap())),
        1 => NetQueue::Tx(Box::new(TxQueue::new(state, 0, &start).unwrap())),
        _ => NetQueue::Ctrl(Box::new(CtrlQueue::new(state, &start))),
    }
}

fn used_idx(ring: &Ring) -> u16 {
    let used = ring.memory().slice(USED, 4).unwrap();
    u16::from_le(used.load::<u16>(2).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random and are the same every time (xorshift).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, limit: u64) -> u64 {
            self.next() % limit
        }

        fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| self.next() as u8).collect()
        }
    }

    /// Bytes that get further than noise does: most descriptors make sense.
    fn plausible(numbers: &mut Numbers) -> Vec<u8> {
        let mut data = numbers.bytes(PROLOGUE);
        for _ in 0..RING_SIZE {
            let addr = if numbers.below(20) == 0 {
                numbers.next()
            } else {
                numbers.below(RAM_SIZE)
            };
            let len = [
                0,
                1,
                2,
                8,
                12,
                13,
                64,
                1526,
                4096,
                70_000,
                u64::from(u32::MAX),
            ];
            let len = len[numbers.below(11) as usize] as u32;
            let flags = [0, 0, 1, 2, 2, 3, 4, 7][numbers.below(8) as usize] as u16;
            data.extend(addr.to_le_bytes());
            data.extend(len.to_le_bytes());
            data.extend(flags.to_le_bytes());
            data.extend((numbers.below(17) as u16).to_le_bytes());
        }
        data.extend([0, 0]);
        data.extend((numbers.below(18) as u16).to_le_bytes());
        for _ in 0..RING_SIZE {
            data.extend((numbers.below(17) as u16).to_le_bytes());
        }
        let rest = numbers.bytes(600);
        data.extend(rest);
        data
    }

    #[test]
    fn a_guest_may_write_anything() {
        let mut numbers = Numbers(0x5eed_1234_abcd_0001);
        for _ in 0..1000 {
            let data = plausible(&mut numbers);
            hostile_guest(&data);
        }
        for len in 0..300 {
            hostile_guest(&numbers.bytes(len));
        }
    }
}
