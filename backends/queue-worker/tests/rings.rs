//! Rings: notification suppression both ways, and everything a driver can get wrong.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::testing::{
    Buffer, DriverQueue, Echo, FakeDriver, GuestRam, Setup, TIMEOUT,
};
use berth_queue_worker::{Device, Metrics, SessionOptions, features};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn echo(setup: Setup) -> (FakeDriver, Metrics) {
    let device = Echo::new(setup.num_queues);
    let metrics = Metrics::new(Echo::NAME, setup.num_queues);
    let driver = FakeDriver::start(device, &metrics, setup);
    (driver, metrics)
}

fn batch(driver: &mut FakeDriver, count: usize) {
    for _ in 0..count {
        let out = driver.ram.alloc(8, 8);
        driver.queues[0].add(&[Buffer::writable(out, 8)]).unwrap();
    }
    driver.queues[0].kick_if_wanted();
    for _ in 0..count {
        driver.queues[0].wait_used();
    }
}

#[test]
fn every_doorbell_is_counted_and_batches_are_signalled_once() {
    for features in [u64::MAX, !(1 << features::RING_EVENT_IDX)] {
        let setup = Setup {
            features,
            ..Setup::default()
        };
        let (mut driver, metrics) = echo(setup);
        for _ in 0..200 {
            batch(&mut driver, 64);
        }
        let kicks = driver.queues[0].kicks();
        driver.frontend.stop_queue(0);
        driver.finish();
        let counters = metrics.queue(0).unwrap();
        assert_eq!(counters.requests.get(), 200 * 64);
        assert_eq!(counters.kicks.get(), kicks);
        assert!(counters.calls.get() <= counters.batches.get());
        assert!(counters.batches.get() < 200 * 64 / 4, "{counters:?}");
    }
}

fn polled(limit: Duration) -> Setup {
    Setup {
        options: SessionOptions { poll_limit: limit },
        ..Setup::default()
    }
}

#[test]
fn busy_queue_is_watched_and_needs_no_kicks() {
    // A limit that no wait of this test exceeds: so the window opens until it covers them.
    for features in [u64::MAX, !(1 << features::RING_EVENT_IDX)] {
        let (mut driver, metrics) = echo(Setup {
            features,
            ..polled(TIMEOUT)
        });
        let counters = metrics.queue(0).unwrap();
        let out = driver.ram.alloc(8, 8);
        let deadline = Instant::now() + TIMEOUT;
        while counters.polls.get() < 100 {
            driver.queues[0].run(&[Buffer::writable(out, 8)]);
            assert!(Instant::now() < deadline, "{counters:?}");
        }
        let requests = counters.requests.get();
        driver.frontend.stop_queue(0);
        // A kick is asked for only before a sleep.
        let kicks = driver.queues[0].kicks();
        assert!(kicks <= counters.sleeps.get(), "{kicks} {counters:?}");
        assert!(kicks < requests, "{kicks} {counters:?}");
        driver.finish();
    }
}

#[test]
fn queue_that_falls_idle_sleeps_and_is_woken_by_a_kick() {
    let (mut driver, metrics) = echo(polled(Duration::from_millis(5)));
    let counters = metrics.queue(0).unwrap();
    let out = driver.ram.alloc(8, 8);
    for _ in 0..100 {
        driver.queues[0].run(&[Buffer::writable(out, 8)]);
    }
    let deadline = Instant::now() + TIMEOUT;
    for _ in 0..10 {
        let sleeps = counters.sleeps.get();
        driver.queues[0].run(&[Buffer::writable(out, 8)]);
        while counters.sleeps.get() == sleeps {
            assert!(Instant::now() < deadline, "{counters:?}");
            std::thread::yield_now();
        }
    }
    driver.finish();
}

#[test]
fn poll_limit_of_nothing_turns_polling_off() {
    let (mut driver, metrics) = echo(polled(Duration::ZERO));
    let out = driver.ram.alloc(8, 8);
    for _ in 0..1000 {
        driver.queues[0].run(&[Buffer::writable(out, 8)]);
    }
    driver.finish();
    let counters = metrics.queue(0).unwrap();
    assert_eq!(counters.polls.get(), 0);
    assert!(counters.sleeps.get() > 0);
}

#[test]
fn driver_that_wants_no_interrupts_gets_none() {
    let setup = Setup {
        features: !(1 << features::RING_EVENT_IDX),
        ..Setup::default()
    };
    let (mut driver, metrics) = echo(setup);
    driver.queues[0].set_no_interrupt(true);
    for _ in 0..10 {
        let out = driver.ram.alloc(8, 8);
        driver.queues[0].add(&[Buffer::writable(out, 8)]).unwrap();
    }
    driver.queues[0].kick();
    for _ in 0..10 {
        driver.queues[0].spin_used();
    }
    driver.frontend.stop_queue(0);
    assert_eq!(driver.queues[0].take_calls(), 0);
    driver.finish();
    assert_eq!(metrics.queue(0).unwrap().calls.get(), 0);
}

#[test]
fn indices_wrap_around() {
    let setup = Setup {
        queue_size: 2,
        ..Setup::default()
    };
    let (mut driver, _) = echo(setup);
    let out = driver.ram.alloc(8, 8);
    for _ in 0..0x10005 {
        driver.queues[0].run(&[Buffer::writable(out, 8)]);
    }
    assert_eq!(driver.frontend.stop_queue(0), 5);
    driver.finish();
}

#[test]
fn buffers_may_cross_from_region_to_region_and_be_empty() {
    let (mut driver, _) = echo(Setup::default());
    let end = driver.ram.info().gpa + driver.ram.info().size;
    let more = GuestRam::new(end, 0x1000);
    assert_eq!(driver.frontend.add_mem_reg(&more.info(), more.fd()), 0);
    let text = driver.ram.place(b"across the border");
    let written = driver.queues[0].run(&[
        Buffer::readable(0, 0),
        Buffer::readable(text, 17),
        Buffer::writable(end - 6, 17),
    ]);
    assert_eq!(written, 17);
    assert_eq!(driver.ram.read(end - 6, 6), b"across");
    assert_eq!(more.read(end, 11), b" the border");
    driver.finish();
}

/// What a hostile driver does to its ring.
type Attack = fn(&GuestRam, &mut DriverQueue);

fn offer_head(ram: &GuestRam, queue: &mut DriverQueue, desc: (u64, u32, u16, u16)) {
    let [table, _, _] = queue.gpas();
    let (addr, len, flags, next) = desc;
    let addr = if addr == 0 { ram.alloc(64, 16) } else { addr };
    queue.write_desc(table, 0, addr, len, (flags, next));
    queue.offer(0);
}

const ATTACKS: &[(&str, Attack)] = &[
    ("avail index ahead of the ring", |_, q| {
        q.set_avail_idx(q.avail_idx().wrapping_add(1000));
    }),
    ("avail index backwards", |_, q| {
        q.set_avail_idx(q.avail_idx().wrapping_sub(1));
    }),
    ("head outside the table", |_, q| q.offer(0xffff)),
    ("head one past the table", |_, q| q.offer(q.size())),
    ("next outside the table", |ram, q| {
        offer_head(ram, q, (0, 16, NEXT, 0x8000));
    }),
    ("a loop of one", |ram, q| {
        offer_head(ram, q, (0, 16, NEXT, 0));
    }),
    ("a loop of two", |ram, q| {
        let [table, _, _] = q.gpas();
        q.write_desc(table, 1, ram.alloc(16, 16), 16, (NEXT, 0));
        offer_head(ram, q, (0, 16, NEXT, 1));
    }),
    ("an address outside memory", |ram, q| {
        offer_head(ram, q, (0x10, 16, WRITE, 0));
    }),
    ("an address at the very end", |ram, q| {
        offer_head(ram, q, (u64::MAX, 16, WRITE, 0));
    }),
    ("a length past the end of memory", |ram, q| {
        offer_head(ram, q, (0, u32::MAX, WRITE, 0));
    }),
    ("readable after writable", |ram, q| {
        let [table, _, _] = q.gpas();
        q.write_desc(table, 1, ram.alloc(16, 16), 16, (0, 0));
        offer_head(ram, q, (0, 16, NEXT | WRITE, 1));
    }),
    ("an indirect table of no whole entry", |ram, q| {
        offer_head(ram, q, (0, 24, INDIRECT, 0));
    }),
    ("an empty indirect table", |ram, q| {
        offer_head(ram, q, (0, 0, INDIRECT, 0));
    }),
    ("an endless indirect table", |ram, q| {
        offer_head(ram, q, (0, 0xffff_fff0, INDIRECT, 0));
    }),
    ("an indirect table outside memory", |ram, q| {
        offer_head(ram, q, (0x40, 16, INDIRECT, 0));
    }),
    ("indirect with next", |ram, q| {
        offer_head(ram, q, (0, 16, INDIRECT | NEXT, 1));
    }),
    ("indirect in indirect", |ram, q| {
        let table = ram.alloc(32, 16);
        q.write_desc(table, 0, ram.alloc(16, 16), 16, (INDIRECT, 0));
        offer_head(ram, q, (table, 32, INDIRECT, 0));
    }),
    ("a loop in an indirect table", |ram, q| {
        let table = ram.alloc(32, 16);
        q.write_desc(table, 0, ram.alloc(16, 16), 16, (NEXT, 1));
        q.write_desc(table, 1, ram.alloc(16, 16), 16, (NEXT, 0));
        offer_head(ram, q, (table, 32, INDIRECT, 0));
    }),
];

#[test]
fn nonsense_in_a_ring_stops_that_queue_and_no_other() {
    let setup = Setup {
        num_queues: 2,
        ..Setup::default()
    };
    let (mut driver, _) = echo(setup);
    let ram = Arc::clone(&driver.ram);
    let features = driver.features;
    for (what, attack) in ATTACKS {
        eprintln!("{what}");
        attack(&ram, &mut driver.queues[0]);
        driver.queues[0].kick();
        driver.queues[0].wait_err();
        // The other queue works, and so does the control channel.
        driver.queues[1].run(&[Buffer::writable(ram.alloc(8, 8), 8)]);
        assert_eq!(driver.frontend.number(FrontendReq::GET_QUEUE_NUM), 2);
        // Set up anew, this one works again.
        driver.frontend.stop_queue(0);
        driver.queues[0].reset();
        driver.frontend.start_queue(&driver.queues[0], 0, features);
        driver.queues[0].run(&[Buffer::writable(ram.alloc(8, 8), 8)]);
    }
    driver.finish();
}

#[test]
fn indirect_descriptor_that_was_not_negotiated_is_nonsense() {
    let setup = Setup {
        features: !(1 << features::RING_INDIRECT_DESC),
        ..Setup::default()
    };
    let (mut driver, _) = echo(setup);
    let out = driver.ram.alloc(8, 8);
    driver.queues[0].add_indirect(&[Buffer::writable(out, 8)]);
    driver.queues[0].kick();
    driver.queues[0].wait_err();
    driver.finish();
}

#[test]
fn ring_that_does_not_lie_in_memory_breaks_its_queue() {
    let (mut driver, _) = echo(Setup::default());
    driver.frontend.stop_queue(0);
    // Its last byte is past the end of the region.
    let info = driver.ram.info();
    let end = info.uva + info.size;
    let [_, avail, used] = driver.queues[0].uvas();
    for desc in [end - 128 * 16 + 16, info.uva + 1] {
        let words: Vec<u8> = [0, desc, used, avail, 0]
            .iter()
            .flat_map(|w: &u64| w.to_ne_bytes())
            .collect();
        driver
            .frontend
            .request(FrontendReq::SET_VRING_ADDR, &words, &[]);
        let queue = &driver.queues[0];
        let kick = queue.kick_fd();
        driver
            .frontend
            .request(FrontendReq::SET_VRING_KICK, &[0; 8], &[kick]);
        queue.wait_err();
        driver.frontend.stop_queue(0);
    }
    driver.finish();
}

#[test]
fn signal_that_a_predecessor_still_owed_is_made_up_for() {
    let (mut driver, _) = echo(Setup::default());
    let features = driver.features;
    let queue = &mut driver.queues[0];
    let out = driver.ram.alloc(8, 8);
    queue.run(&[Buffer::writable(out, 8)]);
    // Published, but the signal for it went astray: the driver asked for one and waits.
    queue.add(&[Buffer::writable(out, 8)]).unwrap();
    queue.kick();
    queue.spin_used();
    assert_eq!(driver.frontend.stop_queue(0), 2);
    queue.take_calls();
    driver.frontend.start_queue(queue, 2, features);
    queue.wait_call();
    // Into a call fd that the frontend then replaces: that was for nothing, too.
    let payload = 0u64.to_ne_bytes();
    let call = [queue.call_fd()];
    driver
        .frontend
        .request(FrontendReq::SET_VRING_CALL, &payload, &call);
    queue.wait_call();
    // Once is enough.
    driver.frontend.set_enable(0, false);
    driver.frontend.set_enable(0, true);
    driver.frontend.set_enable(0, false);
    assert_eq!(queue.take_calls(), 0);
    driver.finish();
}
