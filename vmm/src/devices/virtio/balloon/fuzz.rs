//! Whatever a guest may put into the queues, for a fuzz target and a test.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::rings::{Lent, Rings};
use super::shared::{Handle, Polling, Shared};
use super::{F_PAGE_POISON, F_REPORTING, F_STATS_VQ, PAGE};
use crate::config::MemoryConfig;
use crate::devices::virtio::device::{Activation, QueueSetup};
use crate::memory::{GuestRam, Mode};

const RAM_BYTES: u64 = 8 << 20;
/// A page of the host that is not as small as the guest's.
const HUGE_PAGE: u64 = 2 << 20;
/// Bytes from the rings of one queue to the next one's; buffers come after them.
const RINGS: u64 = 0x100;
/// Descriptors of a queue.
const SIZE: u16 = 4;

/// Serves queues in the memory that `data` is.
pub(crate) fn guest_queues(data: &[u8]) {
    let [flags, poison, rest @ ..] = data else {
        return;
    };
    let served = serve(*flags, *poison, rest);
    // A host that cannot make an eventfd is no finding.
    let Some(shared) = served else { return };
    let failed = shared.counters.discards_failed.load(Ordering::Relaxed);
    assert_eq!(failed, 0, "what is not RAM was given back");
}

fn serve(flags: u8, poison: u8, memory_image: &[u8]) -> Option<Arc<Shared>> {
    let config = MemoryConfig::of(RAM_BYTES);
    let ram = GuestRam::with_mode(&config, Mode::Private).ok()?;
    let memory = ram.memory();
    let len = memory_image.len().min(RAM_BYTES as usize);
    memory
        .write_slice(&memory_image[..len], GuestAddress(0))
        .ok()?;
    let shared = Arc::new(Shared::new(0, Polling::default()).ok()?);
    shared.lock().state.poison_val = poison.into();
    let granule = if flags & 1 == 0 { PAGE } else { HUGE_PAGE };
    let all = [(2, F_STATS_VQ), (4, F_REPORTING), (8, F_PAGE_POISON)];
    let features = all.into_iter().filter(|(flag, _)| flags & flag != 0);
    let activation = Activation {
        features: features.fold(0, |all, (_, bit)| all | bit),
        queues: (0..5).map(setup).collect::<Option<_>>()?,
        memory: memory.clone(),
    };
    let lent = Lent {
        ram: ram.clone(),
        granule,
    };
    let mut rings = Rings::new(activation, Arc::clone(&shared), lent).ok()?;
    Handle(Arc::clone(&shared)).info();
    for place in (0..4).cycle().take(16) {
        // A ring that makes no sense is let go.
        if rings
            .process(place)
            .and_then(|()| rings.ask_for_stats())
            .is_err()
        {
            break;
        }
        // More of the same.
        let index = [0, 1, 2, 4][place];
        let avail = GuestAddress(index * RINGS + 0x42);
        let index: u16 = memory.read_obj(avail).ok()?;
        memory.write_obj(index.wrapping_add(1), avail).ok()?;
    }
    Some(shared)
}

fn setup(index: u16) -> Option<QueueSetup> {
    let at = u64::from(index) * RINGS;
    Some(QueueSetup {
        index,
        size: SIZE,
        desc: at,
        avail: at + 0x40,
        used: at + 0x60,
        kick: EventFd::new(EFD_NONBLOCK).ok()?,
        call: EventFd::new(EFD_NONBLOCK).ok()?,
    })
}
