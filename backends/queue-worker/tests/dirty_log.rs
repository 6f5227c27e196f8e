//! The dirty log of a live migration: what the device writes is in it, also while it comes and goes
//! under rings that run, and what a frontend may do to it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;

use berth_queue_worker::log::LOG_PAGE;
use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::session::SessionError;
use berth_queue_worker::testing::{
    Buffer, Echo, FakeDriver, GuestRam, LogWatch, NO_PROTOCOL_FEATURES, Setup,
};
use berth_queue_worker::{Metrics, features};

fn setup() -> Setup {
    Setup {
        num_queues: 2,
        queue_size: 64,
        ram_size: 4 << 20,
        ..Setup::default()
    }
}

fn start(setup: Setup) -> FakeDriver {
    FakeDriver::start(Echo::new(2), &Metrics::new("echo", 2), setup)
}

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

fn page(gpa: u64) -> u64 {
    gpa - gpa % LOG_PAGE
}

/// Adds a request of random buffers anywhere in memory; false where the ring is full.
fn add_random(driver: &mut FakeDriver, queue: usize, area: u64, random: &mut Random) -> bool {
    let mut buffers = Vec::new();
    for writable in [false, true] {
        for _ in 0..1 + random.below(3) {
            let gpa = area + random.below(2 << 20);
            let len = random.below(9000) as u32;
            buffers.push(Buffer { gpa, len, writable });
        }
    }
    if random.below(2) == 0 && driver.has(features::RING_INDIRECT_DESC) {
        driver.queues[queue].add_indirect(&buffers).is_some()
    } else {
        driver.queues[queue].add(&buffers).is_some()
    }
}

fn random_requests(features: u64, seed: u64) {
    let mut random = Random(seed);
    // A used ring of three pages: index, most entries, and avail_event are on pages of their own.
    let mut driver = start(Setup {
        features,
        queue_size: 1024,
        ..setup()
    });
    let area = driver.ram.alloc(2 << 20, LOG_PAGE);
    driver.ram.alloc(16384, 16);
    driver.ram.write(area, &[0xa5; 3 << 19]);
    let watch = LogWatch::start(&mut driver);
    for round in 0..40 {
        watch.pause(&mut driver);
        let mut added = [0, 0];
        for _ in 0..1 + random.below(50) {
            let queue = random.below(2) as usize;
            added[queue] += usize::from(add_random(&mut driver, queue, area, &mut random));
        }
        // Different in every round, so that what is copied changes something.
        driver.ram.write(area + (round << 12), &[round as u8; 4096]);
        let logged = watch.run(&mut driver, |driver| {
            for (queue, count) in added.iter().enumerate() {
                for _ in 0..*count {
                    driver.queues[queue].wait_used();
                }
            }
        });
        for (queue, count) in driver.queues.iter().zip(added) {
            assert!(count == 0 || logged.contains(&page(queue.gpas()[2])));
        }
    }
    driver.finish();
}

#[test]
fn every_byte_that_the_device_changed_is_in_the_log() {
    random_requests(u64::MAX, 1);
    random_requests(!(1 << features::RING_EVENT_IDX), 2);
    random_requests(!(1 << features::RING_INDIRECT_DESC), 3);
    random_requests(NO_PROTOCOL_FEATURES, 4);
}

#[test]
fn only_what_may_have_changed_is_in_the_log() {
    let mut driver = start(setup());
    let from = driver.ram.alloc(4 * LOG_PAGE, LOG_PAGE);
    let to = driver.ram.alloc(4 * LOG_PAGE, LOG_PAGE);
    driver.ram.alloc(LOG_PAGE, LOG_PAGE);
    driver.ram.write(from, &[7; 8192]);
    let watch = LogWatch::start(&mut driver);
    watch.pause(&mut driver);
    let request = [
        Buffer::readable(from, 8192),
        Buffer::writable(to + 4095, 2),
        Buffer::writable(to + 3 * LOG_PAGE, 1),
    ];
    driver.queues[0].add(&request).unwrap();
    let logged = watch.run(&mut driver, |driver| {
        driver.queues[0].wait_used();
    });
    let buffers = [to, to + LOG_PAGE, to + 3 * LOG_PAGE];
    let used = driver.queues.iter().flat_map(|queue| {
        let used = queue.gpas()[2];
        [page(used), page(used + 5 + 8 * u64::from(queue.size()))]
    });
    let may: std::collections::BTreeSet<_> = buffers.into_iter().chain(used).collect();
    assert!(buffers.iter().all(|page| logged.contains(page)));
    assert!(logged.is_subset(&may), "{logged:x?} not in {may:x?}");
    driver.finish();
}

#[test]
fn logging_begins_and_ends_while_rings_run() {
    let mut driver = start(setup());
    let out = driver.ram.alloc(LOG_PAGE, LOG_PAGE);
    let place = driver.ram.place(b"text");
    let request = [Buffer::readable(place, 4), Buffer::writable(out, 4)];
    driver.queues[0].run(&request);
    for _ in 0..10 {
        let watch = LogWatch::start(&mut driver);
        driver.queues[0].run(&request);
        watch.stop(&mut driver);
        assert!(watch.take().contains(&out), "on");
        driver.queues[0].run(&request);
        driver.frontend.set_enable(0, false);
        driver.frontend.set_enable(0, true);
        assert!(watch.take().is_empty(), "off");
    }
    driver.finish();
}

#[test]
fn each_switch_does_its_part_alone() {
    let mut driver = start(setup());
    let out = driver.ram.alloc(LOG_PAGE, LOG_PAGE);
    let used = driver.queues[0].gpas()[2];
    let request = [Buffer::readable(out, 0), Buffer::writable(out, 4)];
    let log_all = 1 << features::LOG_ALL;
    let watch = LogWatch::start(&mut driver);
    for (data, ring) in [(true, false), (false, true), (false, false), (true, true)] {
        let bits = driver.features | if data { log_all } else { 0 };
        driver.frontend.set_features(bits);
        driver
            .frontend
            .set_vring_addr_logged(&driver.queues[0], ring);
        watch.take();
        driver.queues[0].run(&request);
        let logged = watch.take();
        assert_eq!(logged.contains(&out), data);
        assert_eq!(logged.contains(&page(used)), ring);
    }
    driver.finish();
}

#[test]
fn log_may_be_replaced_by_another_under_load() {
    let mut driver = start(setup());
    let out = driver.ram.alloc(LOG_PAGE, LOG_PAGE);
    let mut watches: Vec<LogWatch> = Vec::new();
    for _ in 0..20 {
        for _ in 0..8 {
            driver.queues[0].add(&[Buffer::writable(out, 4)]).unwrap();
        }
        driver.queues[0].kick();
        let watch = LogWatch::start(&mut driver);
        if let Some(old) = watches.last() {
            old.take();
        }
        for _ in 0..8 {
            driver.queues[0].wait_used();
        }
        driver.queues[0].run(&[Buffer::writable(out, 4)]);
        watches.push(watch);
    }
    watches[19].pause(&mut driver);
    assert!(watches[19].take().contains(&out));
    assert!(watches.iter().all(|watch| watch.take().is_empty()));
    driver.finish();
}

#[test]
fn frontend_is_told_of_new_bits_where_it_asked() {
    let mut driver = start(setup());
    let watch = LogWatch::start(&mut driver);
    let (mut told, log_fd) = std::io::pipe().unwrap();
    let fds = [log_fd.as_fd()];
    driver.frontend.request(FrontendReq::SET_LOG_FD, &[], &fds);
    let out = driver.ram.alloc(LOG_PAGE, LOG_PAGE);
    driver.queues[0].run(&[Buffer::writable(out, 4)]);
    driver.frontend.set_enable(0, false);
    told.read_exact(&mut [0; 8]).unwrap();
    assert!(watch.take().contains(&page(driver.queues[0].gpas()[2])));
    driver.finish();
}

#[test]
fn log_that_is_too_small_or_not_there_is_refused() {
    let mut driver = start(setup());
    let info = driver.ram.info();
    let size = (info.gpa + info.size).div_ceil(8 * LOG_PAGE);
    let log = GuestRam::new(0, size);
    let null = std::fs::File::open("/dev/null").unwrap();
    let frontend = &mut driver.frontend;
    assert_ne!(frontend.set_log_base(size, 1, log.fd()), 0, "past its file");
    assert_ne!(frontend.set_log_base(size - 1, 0, log.fd()), 0, "too small");
    assert_ne!(frontend.set_log_base(0, 0, log.fd()), 0, "empty");
    assert_ne!(frontend.set_log_base(size, 0, null.as_fd()), 0, "no memory");
    assert_eq!(frontend.set_log_base(size, 0, log.fd()), 0);
    driver.finish();
}

#[test]
fn queue_stops_rather_than_leave_a_write_out_of_the_log() {
    let mut driver = start(setup());
    let watch = LogWatch::start(&mut driver);
    // Memory that came later, above the log's end.
    let more = Arc::new(GuestRam::new(0x8_0000_0000, 1 << 20));
    assert_eq!(driver.frontend.add_mem_reg(&more.info(), more.fd()), 0);
    let request = [Buffer::writable(more.info().gpa, 4)];
    driver.queues[0].add(&request).unwrap();
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    // Without logging, or with a log that covers it, all is well.
    watch.stop(&mut driver);
    driver.queues[1].run(&request);
    driver.finish();
}

#[test]
fn frontend_that_truncates_the_log_ends_its_session_only() {
    let mut other = start(setup());
    let mut driver = start(setup());
    let watch = LogWatch::start(&mut driver);
    watch.memory().truncate();
    driver.queues[0].add(&[Buffer::writable(driver.ram.info().gpa, 0)]);
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    assert!(driver.frontend.is_closed());
    let error = driver.finish().unwrap();
    assert!(matches!(error, SessionError::MemoryLost), "{error}");
    let out = other.ram.alloc(8, 8);
    other.queues[0].run(&[Buffer::writable(out, 8)]);
    other.finish();
}
