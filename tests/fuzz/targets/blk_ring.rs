//! A hostile guest of the disk: the ring, its descriptors and all request bytes are the input.
//!
//! Input: one byte (bit 0 EVENT_IDX, bit 1 INDIRECT_DESC, bit 2 read-only, bit 3 direct I/O, bit 4
//! the system call engine, bit 5 a rate limit), then the start of guest memory:
//!
//! ```text
//!   0x000 descriptors (16)   0x100 avail   0x200 used   0x400 … anything
//! ```
#![no_main]

use std::rc::Rc;
use std::sync::OnceLock;

use berth_blk::engine::{EngineChoice, FixedBuffers};
use berth_blk::image::{Cache, Disk, LockTime, OpenOptions};
use berth_blk::{BlkConfig, BlkDevice};
use berth_queue_worker::guest_memory::{Region, RegionInfo};
use berth_queue_worker::testing::GuestRam;
use berth_queue_worker::{
    Device, GuestMemory, QueueStart, QueueWorker, Ready, Ring, RingLayout, features,
};
use libfuzzer_sys::fuzz_target;

const RAM_SIZE: u64 = 0x10000;
const QUEUE_SIZE: u16 = 16;

/// The image, in a directory that is the fuzzer's own.
fn image() -> &'static std::path::Path {
    static PATH: OnceLock<std::path::PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let name = format!("berth-fuzz-blk-{}.img", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = std::fs::File::create(&path).expect("create the image");
        file.set_len(1 << 20).expect("size the image");
        path
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((&flags, bytes)) = data.split_first() else {
        return;
    };
    let ram = GuestRam::new(0, RAM_SIZE);
    ram.write(0, &bytes[..bytes.len().min(RAM_SIZE as usize)]);
    let info = RegionInfo {
        uva: 0,
        ..ram.info()
    };
    let file = ram.fd().try_clone_to_owned().expect("clone the memfd");
    let region = Region::map(info, &file).expect("map the guest");
    let memory = GuestMemory::default().with(region).expect("one region");
    let disk = Disk::open(&OpenOptions {
        path: image().to_owned(),
        read_only: flags & 4 != 0,
        cache: if flags & 8 != 0 {
            Cache::None
        } else {
            Cache::Writeback
        },
        lock: LockTime::Always,
    });
    let config = BlkConfig {
        serial: [b'x'; 20],
        num_queues: 1,
        queue_size: QUEUE_SIZE,
        engine: if flags & 16 != 0 {
            EngineChoice::Sync
        } else {
            EngineChoice::Auto
        },
        fixed_buffers: if flags & 64 != 0 {
            FixedBuffers::GuestNeverDiscards
        } else {
            FixedBuffers::Off
        },
        // Enough for some requests; the rest waits until it is drained.
        rate_limit: (flags & 32 != 0).then(|| {
            let limit = "bw_size=8192,bw_refill_time=60000,ops_size=3,ops_refill_time=60000";
            limit.parse().expect("a rate limit")
        }),
    };
    let device = BlkDevice::new(disk.expect("open the image"), &config);
    let mut bits = features::COMMON | device.features();
    if flags & 1 == 0 {
        bits &= !(1 << features::RING_EVENT_IDX);
    }
    if flags & 2 == 0 {
        bits &= !(1 << features::RING_INDIRECT_DESC);
    }
    let layout = RingLayout {
        size: QUEUE_SIZE,
        desc_uva: 0,
        avail_uva: 0x100,
        used_uva: 0x200,
    };
    let mut ring = Ring::new(layout, 0, bits, Rc::new(memory)).expect("ring in memory");
    let mut worker = device
        .new_worker(&QueueStart {
            queue: 0,
            size: QUEUE_SIZE,
            features: bits,
            counters: Default::default(),
        })
        .expect("worker");
    // What a queue thread does, a bounded number of times.
    for _ in 0..4 {
        if worker.process(&mut ring, Ready::default()).is_err() {
            break;
        }
        let _ = ring.publish();
        let _ = ring.needs_signal();
        if ring.enable_notification().is_err() {
            break;
        }
    }
    let _ = worker.drain(&mut ring);
});
