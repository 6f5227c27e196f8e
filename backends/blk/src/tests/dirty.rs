//! All that the disk writes into guest memory is in the dirty log: data, status bytes, serials, and
//! what a request wrote before it failed.

use berth_queue_worker::testing::LogWatch;

use super::*;

/// xorshift: the same requests in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Adds one request of any kind, well-formed or wrong, with its buffers anywhere in the area.
fn add_random(driver: &mut FakeDriver, queue: usize, area: u64, random: &mut Random) -> bool {
    let kinds = [
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
        99,
    ];
    let kind = kinds[random.below(kinds.len() as u64) as usize];
    // One in many lies past the end of the disk, or is no whole sector.
    let sector = random.below(2 * MIB / 512 + 40);
    let mut buffers = vec![header(&driver.ram, kind, sector)];
    let writable = !matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    for _ in 0..random.below(4) {
        // Some need a bounce buffer for direct I/O.
        let align = if random.below(3) > 0 { 512 } else { 1 };
        let gpa = area + random.below(MIB) / align * align;
        let len = 512 * (1 + random.below(24)) as u32 + u32::from(random.below(12) == 0);
        buffers.push(Buffer { gpa, len, writable });
    }
    buffers.push(Buffer::writable(area + random.below(MIB), 1));
    driver.queues[queue].add(&buffers).is_some()
}

fn random_requests(cache: Cache, engine: EngineChoice, seed: u64) {
    let image = TempImage::new(2 * MIB);
    image.file().write_all_at(&pattern(2 << 20, 3), 0).unwrap();
    let options = OpenOptions {
        cache,
        ..image.options()
    };
    let setup = Setup {
        num_queues: 2,
        queue_size: 256,
        ram_size: 4 << 20,
        ..Setup::default()
    };
    let mut random = Random(seed);
    let (mut driver, metrics) = drive_with(&options, setup, engine);
    let area = driver.ram.alloc(MIB + (64 << 10), 4096);
    let watch = LogWatch::start(&mut driver);
    let mut done = 0;
    for _ in 0..30 {
        watch.pause(&mut driver);
        let mut added = [0, 0];
        for _ in 0..1 + random.below(30) {
            let queue = random.below(2) as usize;
            added[queue] += usize::from(add_random(&mut driver, queue, area, &mut random));
        }
        watch.run(&mut driver, |driver| {
            for (queue, count) in added.iter().enumerate() {
                for _ in 0..*count {
                    driver.queues[queue].wait_used();
                }
            }
        });
        done += added[0] + added[1];
    }
    driver.finish();
    let total = |n: u16| metrics.queue(n).unwrap().requests.get();
    assert_eq!(total(0) + total(1), done as u64, "none broke its queue");
    assert!(metrics.queue(0).unwrap().bytes_to_guest.get() > 0);
}

#[test]
fn every_byte_that_the_disk_wrote_is_in_the_dirty_log() {
    random_requests(Cache::Writeback, EngineChoice::Auto, 1);
    random_requests(Cache::Writeback, EngineChoice::Sync, 2);
    random_requests(Cache::None, EngineChoice::Auto, 3);
    random_requests(Cache::None, EngineChoice::Sync, 4);
}
