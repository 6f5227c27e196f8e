//! A driver that was not written here: the `virtio-driver` crate (libblkio's) on `berth-blk`.
#![allow(clippy::unwrap_used, missing_docs)]
#![allow(unsafe_code, reason = "the crate takes buffers by address")]

mod support;

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use berth_queue_worker::testing::GuestRam;
use support::{Daemon, TempDir, Watchdog};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};

const MIB: u64 = 1 << 20;
const QUEUE_SIZE: u16 = 128;

struct Client<'a> {
    transport: Box<VirtioBlkTransport>,
    queues: Vec<VirtioBlkQueue<'a, u64>>,
    ram: GuestRam,
}

impl Client<'_> {
    fn connect(socket: &str, num_queues: usize, features: u64) -> Self {
        let features = features
            | VirtioFeatureFlags::VERSION_1.bits()
            | VirtioBlkFeatureFlags::MQ.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(socket, features).unwrap());
        let mut queues: Vec<VirtioBlkQueue<u64>> =
            VirtioBlkQueue::setup_queues(transport.as_mut(), num_queues, QUEUE_SIZE).unwrap();
        for queue in &mut queues {
            // Only means something with EVENT_IDX.
            queue.set_used_notif_enabled(true);
        }
        let ram = GuestRam::new(0, 4 * MIB);
        let addr = ram.slice(0, 1).host_addr();
        transport
            .map_mem_region(addr, 4 << 20, ram.fd().as_raw_fd(), 0)
            .unwrap();
        Client {
            transport,
            queues,
            ram,
        }
    }

    fn buffer(&self, slot: u64) -> *mut u8 {
        self.ram.slice(slot * 4096, 4096).host_addr() as *mut u8
    }

    /// Kicks, and waits for `count` completions of queue `q`, all good.
    fn complete(&mut self, q: usize, count: usize) {
        self.transport.get_submission_notifier(q).notify().unwrap();
        let completed = self.transport.get_completion_fd(q);
        let mut done = 0;
        loop {
            for completion in self.queues[q].completions() {
                assert_eq!(completion.ret, 0, "request {}", completion.context);
                done += 1;
            }
            if done == count {
                return;
            }
            completed.read().unwrap();
        }
    }
}

fn fill(at: u64) -> u8 {
    (at * 37 + 11) as u8
}

#[test]
fn virtio_driver_crate_reads_and_writes_at_depth_on_all_queues() {
    let event_idx = VirtioFeatureFlags::RING_EVENT_IDX.bits();
    for features in [0, event_idx] {
        let _watchdog = Watchdog::new("virtio-driver");
        let dir = TempDir::new();
        let image = dir.image("disk.img", 16 * MIB);
        let socket = dir.path("disk.sock");
        let daemon = Daemon::serve(&socket, &image, &["--num-queues=2", "--cache=none"]);
        let socket = socket.to_str().unwrap();
        // fio connects once for the capacity, then to work; so do we.
        drop(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket, 0).unwrap());
        let mut client = Client::connect(socket, 2, features);
        let config = client.transport.get_config().unwrap();
        assert_eq!(u64::from(config.capacity), 16 * MIB / 512);
        assert_eq!(u16::from(config.num_queues), 2);
        let depth = 32u64;
        for round in 0..16 {
            for q in 0..2usize {
                let base = (round * 2 + q as u64) * depth;
                for n in 0..depth {
                    let (slot, at) = (q as u64 * depth + n, base + n);
                    client.ram.write(slot * 4096, &[fill(at); 4096]);
                    let buffer = client.buffer(slot);
                    // SAFETY: the buffer is mapped, and ours until the completion.
                    unsafe { client.queues[q].write_raw(at * 4096, buffer, 4096, at) }.unwrap();
                }
                client.complete(q, depth as usize);
            }
        }
        client.queues[0].flush(0).unwrap();
        client.complete(0, 1);
        for at in 0..16 * 2 * depth {
            let buffer = client.buffer(0);
            // SAFETY: as above.
            unsafe { client.queues[1].read_raw(at * 4096, buffer, 4096, at) }.unwrap();
            client.complete(1, 1);
            assert_eq!(client.ram.read(0, 4096), [fill(at); 4096], "block {at}");
        }
        client.queues[0].discard(0, MIB, 0).unwrap();
        client.queues[0]
            .write_zeroes(2 * MIB, MIB, true, 1)
            .unwrap();
        client.complete(0, 2);
        assert_eq!(std::fs::metadata(&image).unwrap().blocks(), 2 * MIB / 512);
        // Closes without GET_VRING_BASE; the next client is served.
        drop(client);
        let mut client = Client::connect(socket, 1, features);
        client.queues[0].flush(0).unwrap();
        client.complete(0, 1);
        drop(client);
        daemon.terminate();
    }
}
