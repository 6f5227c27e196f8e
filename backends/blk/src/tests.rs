//! The disk driven end to end by the fake driver, over a socketpair, on real files.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::testing::{Buffer, DriverQueue, FakeDriver, GuestRam, Setup};
use berth_queue_worker::{Device, Metrics};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::engine::{EngineChoice, FixedBuffers};
use crate::image::{Cache, Disk, ImageError, LockTime, OpenOptions};
use crate::{BlkConfig, BlkDevice};

mod batches;
mod dirty;
mod fixed;
mod limits;
mod live;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const MIB: u64 = 1 << 20;

/// A file that goes away with the test.
struct TempImage(PathBuf);

impl TempImage {
    fn new(size: u64) -> TempImage {
        TempImage::at(&std::env::temp_dir(), size)
    }

    fn at(dir: &Path, size: u64) -> TempImage {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("berth-blk-test-{}-{n}.img", std::process::id());
        let path = dir.join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        TempImage(path)
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            path: self.0.clone(),
            read_only: false,
            cache: Cache::Writeback,
            lock: LockTime::Always,
        }
    }

    fn file(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.0)
            .unwrap()
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl Drop for TempImage {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn serial() -> [u8; 20] {
    *b"berth-serial-0001\0\0\0"
}

/// A disk on `image`, driven.
fn drive(options: &OpenOptions, setup: Setup) -> (FakeDriver, Metrics) {
    drive_with(options, setup, EngineChoice::Auto)
}

fn drive_with(options: &OpenOptions, setup: Setup, engine: EngineChoice) -> (FakeDriver, Metrics) {
    drive_config(options, setup, &config(engine))
}

fn config(engine: EngineChoice) -> BlkConfig {
    BlkConfig {
        serial: serial(),
        num_queues: 1,
        queue_size: 1024,
        engine,
        fixed_buffers: FixedBuffers::Off,
        rate_limit: None,
    }
}

fn drive_config(options: &OpenOptions, setup: Setup, config: &BlkConfig) -> (FakeDriver, Metrics) {
    let disk = Disk::open(options).unwrap();
    let config = BlkConfig {
        num_queues: setup.num_queues,
        ..*config
    };
    let device = BlkDevice::new(disk, &config);
    let metrics = Metrics::new(BlkDevice::NAME, setup.num_queues);
    let driver = FakeDriver::start(Arc::new(device), &metrics, setup);
    (driver, metrics)
}

fn header(ram: &GuestRam, kind: u32, sector: u64) -> Buffer {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    Buffer::readable(ram.place(&bytes), 16)
}

/// Runs one request; its status.
fn request(ram: &GuestRam, queue: &mut DriverQueue, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    let status = ram.place(&[0xff]);
    let mut buffers = vec![header(ram, kind, sector)];
    buffers.extend(data);
    buffers.push(Buffer::writable(status, 1));
    queue.run(&buffers);
    ram.read(status, 1)[0]
}

fn run(driver: &mut FakeDriver, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    let ram = Arc::clone(&driver.ram);
    request(&ram, &mut driver.queues[0], kind, sector, data)
}

fn write(driver: &mut FakeDriver, sector: u64, data: &[u8]) -> u8 {
    let gpa = driver.ram.place(data);
    let buffer = Buffer::readable(gpa, data.len() as u32);
    run(driver, VIRTIO_BLK_T_OUT, sector, &[buffer])
}

fn read(driver: &mut FakeDriver, sector: u64, len: usize) -> (u8, Vec<u8>) {
    let gpa = driver.ram.alloc(len as u64, 512);
    let buffer = Buffer::writable(gpa, len as u32);
    let status = run(driver, VIRTIO_BLK_T_IN, sector, &[buffer]);
    (status, driver.ram.read(gpa, len))
}

fn ranges(driver: &mut FakeDriver, kind: u32, list: &[(u64, u32, u32)]) -> u8 {
    let mut bytes = Vec::new();
    for (sector, num, flags) in list {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(num.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    let gpa = driver.ram.place(&bytes);
    run(
        driver,
        kind,
        0,
        &[Buffer::readable(gpa, bytes.len() as u32)],
    )
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    for (cache, engine) in [
        (Cache::Writeback, EngineChoice::Auto),
        (Cache::None, EngineChoice::Auto),
        (Cache::Writeback, EngineChoice::IoUring),
        (Cache::None, EngineChoice::IoUring),
        (Cache::Writeback, EngineChoice::SqPoll),
        (Cache::None, EngineChoice::SqPoll),
        (Cache::Writeback, EngineChoice::Sync),
        (Cache::None, EngineChoice::Sync),
    ] {
        let image = TempImage::new(4 * MIB);
        let options = OpenOptions {
            cache,
            ..image.options()
        };
        let (mut driver, metrics) = drive_with(&options, Setup::default(), engine);
        let data = pattern(64 << 10, 1);
        assert_eq!(write(&mut driver, 8, &data), OK);
        assert_eq!(run(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(image.bytes(4096, data.len()), data);
        assert_eq!(read(&mut driver, 8, data.len()), (OK, data));
        driver.finish();
        let counters = metrics.queue(0).unwrap();
        assert_eq!(counters.requests.get(), 3);
        assert_eq!(counters.bytes_from_guest.get(), 64 << 10);
        assert_eq!(counters.bytes_to_guest.get(), 64 << 10);
    }
}

#[test]
fn any_framing_and_alignment_of_buffers_is_taken_by_direct_io() {
    let image = TempImage::new(4 * MIB);
    let options = OpenOptions {
        cache: Cache::None,
        ..image.options()
    };
    let (mut driver, _) = drive(&options, Setup::default());
    let ram = Arc::clone(&driver.ram);
    // More than a bounce buffer holds.
    let long = pattern(300 << 10, 11);
    let place = ram.alloc(300 << 10, 512) + 101;
    let _ = ram.alloc(4096, 16);
    ram.write(place, &long);
    let one = Buffer::readable(place, 300 << 10);
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_OUT, 100, &[one]), OK);
    assert_eq!(image.bytes(51200, 300 << 10), long);
    ram.write(place, &vec![0; 300 << 10]);
    let one = Buffer::writable(place, 300 << 10);
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_IN, 100, &[one]), OK);
    assert_eq!(ram.read(place, 300 << 10), long);
    let data = pattern(8192, 7);
    // An odd address, and pieces of odd lengths that cross pages.
    let gpa = ram.alloc(8192 + 13, 4096) + 13;
    ram.write(gpa, &data);
    let pieces = [
        Buffer::readable(gpa, 1),
        Buffer::readable(gpa + 1, 4095),
        Buffer::readable(gpa + 4096, 4096),
    ];
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_OUT, 16, &pieces), OK);
    assert_eq!(image.bytes(8192, 8192), data);
    let back = ram.alloc(8192 + 5, 4096) + 5;
    let pieces = [
        Buffer::writable(back, 100),
        Buffer::writable(back + 100, 8092),
    ];
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_IN, 16, &pieces), OK);
    assert_eq!(ram.read(back, 8192), data);
    driver.finish();
}

#[test]
fn header_and_status_may_be_cut_into_any_descriptors() {
    let image = TempImage::new(MIB);
    let (mut driver, _) = drive(&image.options(), Setup::default());
    let ram = Arc::clone(&driver.ram);
    assert_eq!(write(&mut driver, 0, &pattern(512, 3)), OK);
    let head = header(&ram, VIRTIO_BLK_T_IN, 0);
    let out = ram.alloc(513, 16);
    let buffers = [
        Buffer::readable(head.gpa, 3),
        Buffer::readable(head.gpa + 3, 13),
        Buffer::writable(out, 513),
    ];
    assert_eq!(driver.queues[0].run(&buffers), 513);
    assert_eq!(ram.read(out, 512), pattern(512, 3));
    assert_eq!(ram.read(out + 512, 1), [OK]);
    // The same through an indirect table.
    ram.write(out, &[0xee; 513]);
    driver.queues[0].add_indirect(&buffers).unwrap();
    driver.queues[0].kick();
    driver.queues[0].wait_used();
    assert_eq!(ram.read(out, 512), pattern(512, 3));
    driver.finish();
}

#[test]
fn discard_frees_blocks_and_write_zeroes_keeps_or_frees_them() {
    for engine in [EngineChoice::Auto, EngineChoice::Sync] {
        discard_and_write_zeroes(engine);
    }
}

fn discard_and_write_zeroes(engine: EngineChoice) {
    let image = TempImage::new(4 * MIB);
    let (mut driver, _) = drive_with(&image.options(), Setup::default(), engine);
    assert_eq!(write(&mut driver, 0, &pattern(2 << 20, 9)), OK);
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    let full = image.file().metadata().unwrap().blocks();
    assert_eq!(
        ranges(
            &mut driver,
            VIRTIO_BLK_T_DISCARD,
            &[(0, 1024, 0), (2048, 1024, 0)]
        ),
        OK
    );
    let after_discard = image.file().metadata().unwrap().blocks();
    assert_eq!(full - after_discard, 2048, "two holes of 512 KiB");
    assert_eq!(image.bytes(0, 512), [0; 512]);
    // Zeros without unmap: the space stays.
    let zeroes = VIRTIO_BLK_T_WRITE_ZEROES;
    assert_eq!(ranges(&mut driver, zeroes, &[(1024, 1024, 0)]), OK);
    assert_eq!(image.file().metadata().unwrap().blocks(), after_discard);
    assert_eq!(image.bytes(512 << 10, 512 << 10), vec![0; 512 << 10]);
    assert_eq!(ranges(&mut driver, zeroes, &[(1024, 1024, 1)]), OK);
    assert_eq!(
        image.file().metadata().unwrap().blocks(),
        after_discard - 1024
    );
    assert_eq!(image.file().metadata().unwrap().len(), 4 * MIB);
    // What lies outside, and flags that nobody knows.
    assert_eq!(ranges(&mut driver, zeroes, &[(8191, 2, 0)]), IOERR);
    assert_eq!(ranges(&mut driver, zeroes, &[(0, 1, 2)]), UNSUPP);
    assert_eq!(
        ranges(&mut driver, VIRTIO_BLK_T_DISCARD, &[(0, 1, 1)]),
        UNSUPP
    );
    assert_eq!(ranges(&mut driver, VIRTIO_BLK_T_DISCARD, &[]), IOERR);
    driver.finish();
}

#[test]
fn zeros_are_written_where_the_file_system_cannot_make_them() {
    // tmpfs punches holes, but does not know FALLOC_FL_ZERO_RANGE.
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        eprintln!("skipped: no /dev/shm");
        return;
    }
    for engine in [EngineChoice::Auto, EngineChoice::Sync] {
        let image = TempImage::at(shm, 4 * MIB);
        image.file().write_all_at(&vec![7; 4 << 20], 0).unwrap();
        let (mut driver, _) = drive_with(&image.options(), Setup::default(), engine);
        // Longer than one step, and not a whole number of steps; then a second range.
        let list = [(8, 2001, 0), (4096, 8, 0)];
        assert_eq!(ranges(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, &list), OK);
        driver.finish();
        assert_eq!(image.bytes(0, 4096), [7; 4096]);
        assert_eq!(image.bytes(4096, 2001 * 512), vec![0; 2001 * 512]);
        assert_eq!(image.bytes(2009 * 512, 512), [7; 512]);
        assert_eq!(image.bytes(2 * MIB, 4096), [0; 4096]);
        assert_eq!(image.bytes(2 * MIB + 4096, 512), [7; 512]);
        assert_eq!(image.file().metadata().unwrap().blocks(), 4 * MIB / 512);
    }
}

#[test]
fn read_only_disk_refuses_every_write_and_says_so() {
    let image = TempImage::new(MIB);
    image.file().write_all_at(&pattern(512, 5), 0).unwrap();
    let options = OpenOptions {
        read_only: true,
        ..image.options()
    };
    let (mut driver, _) = drive(&options, Setup::default());
    assert!(driver.has(5), "VIRTIO_BLK_F_RO");
    assert!(!driver.has(13) && !driver.has(14));
    assert_eq!(write(&mut driver, 0, &[1; 512]), IOERR);
    assert_eq!(
        ranges(&mut driver, VIRTIO_BLK_T_DISCARD, &[(0, 1, 0)]),
        IOERR
    );
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(read(&mut driver, 0, 512), (OK, pattern(512, 5)));
    driver.finish();
}

#[test]
fn requests_outside_the_disk_or_not_in_sectors_fail_alone() {
    let image = TempImage::new(MIB);
    let (mut driver, metrics) = drive(&image.options(), Setup::default());
    let sectors = MIB / 512;
    assert_eq!(read(&mut driver, sectors, 512).0, IOERR);
    assert_eq!(read(&mut driver, sectors - 1, 1024).0, IOERR);
    assert_eq!(read(&mut driver, u64::MAX, 512).0, IOERR);
    assert_eq!(read(&mut driver, u64::MAX / 512, 512).0, IOERR);
    assert_eq!(read(&mut driver, 0, 511).0, IOERR);
    assert_eq!(write(&mut driver, 0, &[0; 100]), IOERR);
    assert_eq!(run(&mut driver, 4711, 0, &[]), UNSUPP);
    assert_eq!(read(&mut driver, sectors - 1, 512).0, OK);
    driver.finish();
    assert_eq!(metrics.queue(0).unwrap().errors.get(), 7);
}

#[test]
fn image_truncated_under_us_fails_what_is_lost_and_serves_the_rest() {
    let image = TempImage::new(MIB);
    let (mut driver, _) = drive(&image.options(), Setup::default());
    image.file().set_len(MIB / 2).unwrap();
    assert_eq!(read(&mut driver, MIB / 512 - 8, 4096).0, IOERR);
    assert_eq!(read(&mut driver, 0, 4096).0, OK);
    driver.finish();
}

#[test]
fn serial_and_configuration_are_what_was_asked_for() {
    let image = TempImage::new(MIB);
    let setup = Setup {
        num_queues: 4,
        ..Setup::default()
    };
    let (mut driver, _) = drive(&image.options(), setup);
    let id = driver.ram.alloc(20, 16);
    let buffer = Buffer::writable(id, 20);
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[buffer]), OK);
    assert_eq!(driver.ram.read(id, 20), serial());
    for size in [8, 57, 60, 200] {
        let config = driver.frontend.get_config(0, size);
        assert_eq!(config.len(), size as usize);
        assert_eq!(config[..8], (MIB / 512).to_le_bytes());
    }
    let config = driver.frontend.get_config(0, 60);
    assert_eq!(config[34..36], 4u16.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[56], 1);
    assert_eq!(driver.frontend.get_config(34, 2), 4u16.to_le_bytes());
    driver.finish();
}

#[test]
fn write_cache_can_be_turned_off_and_nothing_else_changed() {
    let image = TempImage::new(MIB);
    let (mut driver, _) = drive(&image.options(), Setup::default());
    assert_eq!(driver.frontend.get_config(32, 1), [1]);
    assert_eq!(driver.frontend.set_config(32, &[0]), 0);
    assert_eq!(driver.frontend.get_config(32, 1), [0]);
    assert_eq!(write(&mut driver, 0, &pattern(4096, 2)), OK);
    assert_ne!(driver.frontend.set_config(32, &[2]), 0);
    assert_ne!(driver.frontend.set_config(0, &[0; 8]), 0);
    driver.finish();
    // Without FLUSH every write is durable; it must work as well.
    let setup = Setup {
        features: !(1 << VIRTIO_BLK_F_FLUSH),
        ..Setup::default()
    };
    let (mut driver, _) = drive(&image.options(), setup);
    assert_eq!(write(&mut driver, 0, &pattern(4096, 4)), OK);
    assert_eq!(read(&mut driver, 0, 4096), (OK, pattern(4096, 4)));
    driver.finish();
}

#[test]
fn deep_queues_side_by_side_lose_nothing() {
    let image = TempImage::new(16 * MIB);
    let setup = Setup {
        num_queues: 2,
        queue_size: 1024,
        ram_size: 64 * MIB,
        ..Setup::default()
    };
    let (mut driver, metrics) = drive(&image.options(), setup);
    let ram = Arc::clone(&driver.ram);
    // More requests than an engine has room for, all at once, on both queues.
    let count = 340u64;
    let status = ram.alloc(2 * count, 16);
    for (q, queue) in driver.queues.iter_mut().enumerate() {
        for n in 0..count {
            let at = q as u64 * count + n;
            let data = ram.place(&pattern(4096, at as u8));
            let buffers = [
                header(&ram, VIRTIO_BLK_T_OUT, at * 8),
                Buffer::readable(data, 4096),
                Buffer::writable(status + at, 1),
            ];
            queue.add(&buffers).unwrap();
        }
        queue.kick_if_wanted();
    }
    for queue in &mut driver.queues {
        for _ in 0..count {
            queue.wait_used();
        }
    }
    assert_eq!(
        ram.read(status, 2 * count as usize),
        vec![OK; 2 * count as usize]
    );
    for at in 0..2 * count {
        assert_eq!(image.bytes(at * 4096, 4096), pattern(4096, at as u8));
    }
    let kicks: u64 = driver.queues.iter().map(DriverQueue::kicks).sum();
    driver.finish();
    let sum = |f: fn(&berth_queue_worker::QueueCounters) -> u64| -> u64 {
        (0..2).map(|q| f(metrics.queue(q).unwrap())).sum()
    };
    assert_eq!(sum(|c| c.requests.get()), 2 * count);
    assert_eq!(sum(|c| c.kicks.get()), kicks, "every doorbell is counted");
}

#[test]
fn sixteen_queues_of_full_size_are_served_each_by_itself() {
    let image = TempImage::new(16 * MIB);
    let setup = Setup {
        num_queues: 16,
        queue_size: 1024,
        ram_size: 64 * MIB,
        ..Setup::default()
    };
    let (mut driver, metrics) = drive(&image.options(), setup);
    assert_eq!(driver.frontend.get_config(34, 2), 16u16.to_le_bytes());
    let ram = Arc::clone(&driver.ram);
    for (n, queue) in driver.queues.iter_mut().enumerate() {
        let data = pattern(8192, n as u8);
        let buffer = Buffer::readable(ram.place(&data), 8192);
        let sector = n as u64 * 16;
        let status = request(&ram, queue, VIRTIO_BLK_T_OUT, sector, &[buffer]);
        assert_eq!(status, OK);
        assert_eq!(image.bytes(sector * 512, 8192), data);
    }
    driver.finish();
    for queue in 0..16 {
        assert_eq!(metrics.queue(queue).unwrap().requests.get(), 1);
    }
}

#[test]
fn request_without_room_for_a_status_breaks_its_queue_and_no_other() {
    let image = TempImage::new(MIB);
    let setup = Setup {
        num_queues: 2,
        ..Setup::default()
    };
    let (mut driver, _) = drive(&image.options(), setup);
    let ram = Arc::clone(&driver.ram);
    driver.queues[0]
        .add(&[header(&ram, VIRTIO_BLK_T_IN, 0)])
        .unwrap();
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    let out = Buffer::writable(ram.alloc(512, 512), 512);
    let other = &mut driver.queues[1];
    assert_eq!(request(&ram, other, VIRTIO_BLK_T_IN, 0, &[out]), OK);
    // Set up again, it works.
    driver.frontend.stop_queue(0);
    driver.queues[0].reset();
    let features = driver.features;
    driver.frontend.start_queue(&driver.queues[0], 0, features);
    assert_eq!(run(&mut driver, VIRTIO_BLK_T_IN, 0, &[out]), OK);
    driver.finish();
}

#[test]
fn second_writer_is_kept_out_and_told_who_holds_the_image() {
    let image = TempImage::new(MIB);
    let first = Disk::open(&image.options()).unwrap();
    let refused = Disk::open(&image.options());
    assert!(matches!(refused, Err(ImageError::Lock { .. })));
    let reader = OpenOptions {
        read_only: true,
        ..image.options()
    };
    assert!(matches!(Disk::open(&reader), Err(ImageError::Lock { .. })));
    drop(first);
    // Readers share.
    let one = Disk::open(&reader).unwrap();
    let two = Disk::open(&reader).unwrap();
    assert!(matches!(
        Disk::open(&image.options()),
        Err(ImageError::Lock { .. })
    ));
    drop((one, two));
    Disk::open(&image.options()).unwrap();
}

#[test]
fn images_that_cannot_be_disks_are_refused_by_name() {
    let odd = TempImage::new(1000);
    let error = Disk::open(&odd.options()).unwrap_err();
    assert!(matches!(
        error,
        ImageError::BadSize {
            size_bytes: 1000,
            ..
        }
    ));
    let empty = TempImage::new(0);
    let error = Disk::open(&empty.options()).unwrap_err();
    assert!(matches!(error, ImageError::Empty { .. }));
    let at = |path: &str| OpenOptions {
        path: path.into(),
        ..odd.options()
    };
    let error = Disk::open(&at("/nonexistent/disk.img")).unwrap_err();
    assert!(matches!(error, ImageError::Open { .. }));
    for path in ["/", "/dev/null"] {
        let error = Disk::open(&at(path)).unwrap_err();
        assert!(matches!(error, ImageError::WrongKind { .. }), "{path}");
    }
}
