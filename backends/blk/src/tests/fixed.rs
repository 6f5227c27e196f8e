//! Registered buffers: what goes through them, and that they follow the guest's memory.
#![expect(unsafe_code, reason = "punches holes into guest memory")]

use std::os::fd::AsRawFd;

use super::*;

const LEN: u32 = 64 << 10;
/// Little, as users without privileges may lock 8 MiB, all tests together.
const RAM: u64 = 1 << 20;

/// A disk in a ring that has guest memory registered, or not; what counts the transfers.
struct Fixture {
    driver: FakeDriver,
    device: Arc<BlkDevice>,
}

fn fixture(options: &OpenOptions, engine: EngineChoice, fixed_buffers: FixedBuffers) -> Fixture {
    let disk = Disk::open(options).unwrap();
    let config = BlkConfig {
        fixed_buffers,
        ..config(engine)
    };
    let device = Arc::new(BlkDevice::new(disk, &config));
    let metrics = Metrics::new(BlkDevice::NAME, 1);
    let setup = Setup {
        ram_size: RAM,
        ..Setup::default()
    };
    let driver = FakeDriver::start(Arc::clone(&device), &metrics, setup);
    Fixture { driver, device }
}

fn registered(options: &OpenOptions, engine: EngineChoice) -> Fixture {
    fixture(options, engine, FixedBuffers::GuestNeverDiscards)
}

impl Fixture {
    /// The counter, when the queue has been stopped: what has been answered is in it.
    fn finish(self) -> u64 {
        self.driver.finish();
        let text = self.device.metrics();
        let line = text.lines().last().expect("a metric");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

fn options(image: &TempImage, cache: Cache) -> OpenOptions {
    OpenOptions {
        cache,
        ..image.options()
    }
}

/// A hole in the memory behind `gpa`: what is there next is another page.
fn discard(ram: &GuestRam, gpa: u64, len: u32) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let at = (gpa - ram.info().gpa) as libc::off_t;
    // SAFETY: integers only; the memory is a guest's, which nothing in Rust refers to.
    let result = unsafe { libc::fallocate(ram.fd().as_raw_fd(), mode, at, len.into()) };
    assert_eq!(result, 0);
}

#[test]
fn single_buffers_go_through_the_registered_ones_and_come_back() {
    for (cache, engine) in [
        (Cache::Writeback, EngineChoice::IoUring),
        (Cache::None, EngineChoice::IoUring),
        (Cache::Writeback, EngineChoice::SqPoll),
        (Cache::None, EngineChoice::SqPoll),
    ] {
        let image = TempImage::new(MIB);
        let mut fixture = registered(&options(&image, cache), engine);
        let driver = &mut fixture.driver;
        let ram = Arc::clone(&driver.ram);
        let data = pattern(LEN as usize, 21);
        let gpa = ram.alloc(LEN.into(), 4096);
        ram.write(gpa, &data);
        let out = Buffer::readable(gpa, LEN);
        assert_eq!(run(driver, VIRTIO_BLK_T_OUT, 8, &[out]), OK);
        assert_eq!(run(driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert!(image.bytes(4096, LEN as usize) == data);
        let back = ram.alloc(LEN.into(), 4096);
        let buffer = Buffer::writable(back, LEN);
        assert_eq!(run(driver, VIRTIO_BLK_T_IN, 8, &[buffer]), OK);
        assert!(ram.read(back, LEN as usize) == data);
        assert_eq!(fixture.finish(), 2, "{cache:?} {engine:?}");
    }
}

#[test]
fn what_no_registered_buffer_holds_goes_the_ordinary_way() {
    let image = TempImage::new(MIB);
    let data = pattern(LEN as usize, 22);
    image.file().write_all_at(&data, 0).unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let mut fixture = registered(&options(&image, cache), EngineChoice::IoUring);
        let driver = &mut fixture.driver;
        let ram = Arc::clone(&driver.ram);
        let gpa = ram.alloc(2 * u64::from(LEN), 4096);
        // Two segments.
        let half = LEN / 2;
        let pieces = [
            Buffer::writable(gpa, half),
            Buffer::writable(gpa + u64::from(LEN), half),
        ];
        assert_eq!(run(driver, VIRTIO_BLK_T_IN, 0, &pieces), OK);
        assert!(ram.read(gpa, half as usize) == data[..half as usize]);
        let second = ram.read(gpa + u64::from(LEN), half as usize);
        assert!(second == data[half as usize..]);
        // One at an odd address: direct I/O takes it through a buffer of the daemon's.
        let odd = Buffer::writable(gpa + 5, LEN);
        assert_eq!(run(driver, VIRTIO_BLK_T_IN, 0, &[odd]), OK);
        assert!(ram.read(gpa + 5, LEN as usize) == data);
        let fixed = u64::from(cache == Cache::Writeback);
        assert_eq!(fixture.finish(), fixed, "{cache:?}");
    }
}

#[test]
fn registered_buffers_follow_regions_that_come_and_go() {
    let image = TempImage::new(MIB);
    let data = pattern(MIB as usize, 23);
    image.file().write_all_at(&data, 0).unwrap();
    let mut fixture = registered(&image.options(), EngineChoice::IoUring);
    let driver = &mut fixture.driver;
    let ram = Arc::clone(&driver.ram);
    let first = ram.alloc(LEN.into(), 4096);
    let rounds = 40;
    for round in 0..rounds {
        // Elsewhere for the guest, and most likely where the last one was for the daemon.
        let region = GuestRam::new(0x9_0000_0000 + (round << 24), RAM);
        assert_eq!(driver.frontend.add_mem_reg(&region.info(), region.fd()), 0);
        let gpa = region.alloc(LEN.into(), 4096);
        for (ram, gpa, sector) in [(&*ram, first, round % 8), (&region, gpa, round % 8 + 100)] {
            let buffer = Buffer::writable(gpa, LEN);
            assert_eq!(run(driver, VIRTIO_BLK_T_IN, sector, &[buffer]), OK);
            let at = sector as usize * 512;
            assert!(ram.read(gpa, LEN as usize) == data[at..at + LEN as usize]);
        }
        assert_eq!(driver.frontend.rem_mem_reg(&region.info()), 0);
        // Nothing of it is held any more: a buffer in it is outside of guest memory.
        region.truncate();
    }
    // All memory at once, by a new table.
    driver.frontend.set_mem_table(&[&ram]);
    let buffer = Buffer::writable(first, LEN);
    assert_eq!(run(driver, VIRTIO_BLK_T_IN, 200, &[buffer]), OK);
    assert!(ram.read(first, LEN as usize) == data[102_400..102_400 + LEN as usize]);
    assert_eq!(fixture.finish(), 2 * rounds + 1);
}

#[test]
fn guest_that_discards_a_page_reads_it_anew_by_default() {
    let image = TempImage::new(MIB);
    let data = pattern(LEN as usize, 24);
    image.file().write_all_at(&data, 0).unwrap();
    for cache in [Cache::Writeback, Cache::None] {
        let off = FixedBuffers::default();
        let options = options(&image, cache);
        let mut fixture = fixture(&options, EngineChoice::IoUring, off);
        let driver = &mut fixture.driver;
        let ram = Arc::clone(&driver.ram);
        let gpa = ram.alloc(LEN.into(), 4096);
        let buffer = Buffer::writable(gpa, LEN);
        for _ in 0..3 {
            assert_eq!(run(driver, VIRTIO_BLK_T_IN, 0, &[buffer]), OK);
            assert!(ram.read(gpa, LEN as usize) == data);
            discard(&ram, gpa, LEN);
            assert!(ram.read(gpa, LEN as usize) == vec![0; LEN as usize]);
        }
        let Fixture { driver, device } = fixture;
        driver.finish();
        assert_eq!(device.metrics(), "", "nothing to count");
    }
}
