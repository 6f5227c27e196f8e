//! A client that was not written here: the `blkio` crate (libblkio) on `berth-blk`.
#![allow(clippy::unwrap_used, missing_docs)]
#![allow(
    unsafe_code,
    reason = "the crate hands out memory and takes completions by address"
)]

mod support;

use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use support::{Daemon, TempDir, Watchdog};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const DEPTH: usize = 32;

struct Client {
    // Dropped first: the crate lets go of memory when the last of both is gone.
    queues: Vec<Blkioq>,
    blkio: Blkio,
    region: MemoryRegion,
}

impl Client {
    fn connect(socket: &Path, queues: i32) -> Client {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        assert_eq!(blkio.get_u64("capacity").unwrap(), 16 * MIB);
        assert_eq!(blkio.get_i32("max-queues").unwrap(), 2);
        blkio.set_i32("num-queues", queues).unwrap();
        let queues = blkio.start().unwrap().queues;
        let region = Client::region(&mut blkio);
        Client {
            queues,
            blkio,
            region,
        }
    }

    fn region(blkio: &mut Blkio) -> MemoryRegion {
        let region = blkio.alloc_mem_region(DEPTH * BLOCK).unwrap();
        blkio.map_mem_region(&region).unwrap();
        region
    }

    fn buffer(&self, slot: usize) -> *mut u8 {
        assert!(slot < DEPTH);
        (self.region.addr + slot * BLOCK) as *mut u8
    }

    fn fill(&self, slot: usize, byte: u8) {
        // SAFETY: the slot is mapped, and no request of ours is in flight there.
        unsafe { self.buffer(slot).write_bytes(byte, BLOCK) };
    }

    fn first_and_last(&self, slot: usize) -> (u8, u8) {
        let buffer = self.buffer(slot);
        // SAFETY: as above.
        unsafe {
            (
                buffer.read_volatile(),
                buffer.add(BLOCK - 1).read_volatile(),
            )
        }
    }

    /// Submits what was asked of queue `q`, and waits for `count` completions, all good.
    fn complete(&mut self, q: usize, count: usize) {
        let mut done: Vec<MaybeUninit<Completion>> = Vec::new();
        done.resize_with(count, MaybeUninit::uninit);
        let got = self.queues[q].do_io(&mut done, count, None, None).unwrap();
        assert_eq!(got, count);
        for completion in &done {
            // SAFETY: do_io has written the first `got` of them.
            let completion = unsafe { completion.assume_init_ref() };
            assert_eq!(completion.ret, 0, "request {}", completion.user_data);
        }
    }
}

fn byte(block: usize) -> u8 {
    (block * 41 + 5) as u8
}

#[test]
fn blkio_crate_reads_writes_and_discards_and_changes_memory_meanwhile() {
    let _watchdog = Watchdog::new("blkio");
    let dir = TempDir::new();
    let image = dir.image("disk.img", 16 * MIB);
    let socket = dir.path("disk.sock");
    let daemon = Daemon::serve(&socket, &image, &["--num-queues=2", "--cache=none"]);
    let none = ReqFlags::empty();
    let mut client = Client::connect(&socket, 2);
    for round in 0..8 {
        for q in 0..2 {
            for slot in 0..DEPTH {
                let block = (round * 2 + q) * DEPTH + slot;
                client.fill(slot, byte(block));
                let buffer = client.buffer(slot);
                client.queues[q].write((block * BLOCK) as u64, buffer, BLOCK, block, none);
            }
            client.complete(q, DEPTH);
        }
    }
    client.queues[0].flush(0, none);
    client.complete(0, 1);

    // Memory goes and comes while the queues run.
    client.blkio.unmap_mem_region(&client.region);
    client.blkio.free_mem_region(&client.region);
    client.region = Client::region(&mut client.blkio);
    for block in 0..8 * 2 * DEPTH {
        let slot = block % DEPTH;
        client.fill(slot, !byte(block));
        let buffer = client.buffer(slot);
        client.queues[1].read((block * BLOCK) as u64, buffer, BLOCK, block, none);
        client.complete(1, 1);
        assert_eq!(
            client.first_and_last(slot),
            (byte(block), byte(block)),
            "block {block}"
        );
    }
    let before = std::fs::metadata(&image).unwrap().blocks();
    client.queues[0].discard(0, MIB, 0, none);
    client.queues[1].write_zeroes(MIB, MIB / 2, 1, none);
    client.complete(0, 1);
    client.complete(1, 1);
    let after = std::fs::metadata(&image).unwrap().blocks();
    assert_eq!(before - after, (MIB + MIB / 2) / 512);

    // It closes without GET_VRING_BASE; the next one is served.
    drop(client);
    let mut client = Client::connect(&socket, 1);
    let buffer = client.buffer(0);
    client.queues[0].read(15 * BLOCK as u64 + MIB, buffer, BLOCK, 7, none);
    client.complete(0, 1);
    assert_eq!(client.first_and_last(0), (0, 0), "zeroed before");
    drop(client);
    daemon.terminate();
}
