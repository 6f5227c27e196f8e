//! Sessions as real frontends hold them, with their odd habits, and as hostile ones would.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use berth_queue_worker::protocol::message::{
    FrontendReq, HEADER_SIZE, InflightInfo, frontend_request,
};
use berth_queue_worker::session::SessionError;
use berth_queue_worker::testing::{
    Buffer, DriverQueue, Echo, FakeDriver, FakeFrontend, GuestRam, NO_PROTOCOL_FEATURES, Setup,
    TIMEOUT, serve,
};
use berth_queue_worker::{Device, Metrics, features};

fn echo(setup: Setup) -> (FakeDriver, Arc<Echo>, Metrics) {
    let device = Echo::new(setup.num_queues.max(2));
    let metrics = Metrics::new(Echo::NAME, device.num_queues());
    let driver = FakeDriver::start(Arc::clone(&device), &metrics, setup);
    (driver, device, metrics)
}

fn frontend() -> (FakeFrontend, std::thread::JoinHandle<SessionError>) {
    let device = Echo::new(2);
    serve(device, &Metrics::new(Echo::NAME, 2))
}

/// Sends `text` through a queue and expects it back.
fn say(ram: &GuestRam, queue: &mut DriverQueue, text: &[u8]) {
    let out = ram.alloc(text.len() as u64, 1);
    let len = text.len() as u32;
    let place = ram.place(text);
    let written = queue.run(&[Buffer::readable(place, len), Buffer::writable(out, len)]);
    assert_eq!(written, len);
    assert_eq!(ram.read(out, text.len()), text);
}

fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

#[test]
fn qemu_enables_rings_before_it_sets_features_and_sets_features_twice() {
    let (mut frontend, session) = frontend();
    for _ in 0..3 {
        frontend.request(FrontendReq::SET_VRING_ENABLE, &state(0, 1), &[]);
    }
    let features = frontend.negotiate(u64::MAX);
    let ram = Arc::new(GuestRam::new(0, 1 << 20));
    frontend.set_mem_table(&[&ram]);
    frontend.request(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[]);
    let mut queue = DriverQueue::new(&ram, 0, 64, features);
    // Enabled long ago: the kick is what starts it.
    frontend.start_queue(&queue, 0, features & NO_PROTOCOL_FEATURES);
    say(&ram, &mut queue, b"early");
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn without_protocol_features_rings_are_enabled_and_still_can_be_disabled() {
    let setup = Setup {
        features: NO_PROTOCOL_FEATURES,
        ..Setup::default()
    };
    let (mut driver, _, _) = echo(setup);
    assert!(!driver.has(features::PROTOCOL_FEATURES));
    say(&driver.ram, &mut driver.queues[0], b"enabled by default");
    // DPDK sends SET_VRING_ENABLE all the same.
    driver.frontend.set_enable(0, false);
    driver.frontend.set_enable(0, true);
    say(&driver.ram, &mut driver.queues[0], b"and again");
    driver.finish();
}

#[test]
fn regions_of_odd_size_come_and_go_while_the_ring_runs() {
    // libblkio: ADD_MEM_REG only, guest addresses are its own, sizes are not whole pages.
    let (mut frontend, session) = frontend();
    let features = frontend.negotiate(!(1 << features::RING_INDIRECT_DESC));
    let rings = Arc::new(GuestRam::new(0x7000_0000, 0x3b10));
    assert_eq!(frontend.number(FrontendReq::GET_MAX_MEM_SLOTS), 509);
    assert_eq!(frontend.add_mem_reg(&rings.info(), rings.fd()), 0);
    let mut queue = DriverQueue::new(&rings, 0, 128, features);
    frontend.start_queue(&queue, 0, features);
    for round in 0..20u64 {
        let data = GuestRam::new(0x9000_0000 + (round << 24), 0x1010);
        assert_eq!(frontend.add_mem_reg(&data.info(), data.fd()), 0);
        assert_ne!(
            frontend.add_mem_reg(&data.info(), data.fd()),
            0,
            "twice the same addresses"
        );
        say(&data, &mut queue, b"in a region of its own");
        assert_eq!(frontend.rem_mem_reg(&data.info()), 0);
        assert_ne!(frontend.rem_mem_reg(&data.info()), 0, "it is gone");
    }
    // A buffer in a region that was removed breaks the queue.
    queue.add(&[Buffer::writable(0x9000_0000, 16)]).unwrap();
    queue.kick();
    queue.wait_err();
    assert_eq!(frontend.number(FrontendReq::GET_QUEUE_NUM), 2, "lives on");
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let (mut frontend, session) = frontend();
    frontend.negotiate(u64::MAX);
    let ram = GuestRam::new(0x1000, 0x10000);
    let with = |change: fn(&mut berth_queue_worker::guest_memory::RegionInfo)| {
        let mut info = ram.info();
        change(&mut info);
        info
    };
    let bad = [
        with(|info| info.size = 0),
        with(|info| info.size = 0x10001),
        with(|info| info.file_offset = 0x1000),
        with(|info| info.gpa = u64::MAX - 0xfff),
        with(|info| info.uva = u64::MAX - 0xfff),
        with(|info| info.file_offset = u64::MAX - 0xfff),
    ];
    for info in bad {
        assert_ne!(frontend.add_mem_reg(&info, ram.fd()), 0, "{info:x?}");
    }
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_ne!(frontend.add_mem_reg(&ram.info(), null.as_fd()), 0);
    assert_eq!(frontend.add_mem_reg(&ram.info(), ram.fd()), 0);
    // An offset that is no whole page.
    let odd = berth_queue_worker::guest_memory::RegionInfo {
        gpa: 0x90_0000,
        size: 0x100,
        uva: 0x90_0000,
        file_offset: 0x1234,
    };
    assert_eq!(frontend.add_mem_reg(&odd, ram.fd()), 0);
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn stopped_ring_goes_on_where_it_was() {
    let (mut driver, _, _) = echo(Setup::default());
    let features = driver.features;
    let mut expected = 0;
    for _ in 0..5 {
        for _ in 0..100 {
            say(&driver.ram, &mut driver.queues[0], b"again");
        }
        expected += 100;
        let base = driver.frontend.stop_queue(0);
        assert_eq!(base, expected);
        // Offered while the ring is stopped, with no kick that anybody hears.
        let out = Buffer::writable(driver.ram.alloc(8, 8), 8);
        driver.queues[0].add(&[out]).unwrap();
        driver
            .frontend
            .start_queue(&driver.queues[0], base, features);
        driver.queues[0].wait_used();
        expected += 1;
    }
    driver.finish();
}

#[test]
fn disabled_ring_is_left_alone_until_it_is_enabled() {
    let (mut driver, _, metrics) = echo(Setup::default());
    say(&driver.ram, &mut driver.queues[0], b"on");
    driver.frontend.set_enable(0, false);
    let out = driver.ram.alloc(4, 4);
    driver.queues[0].add(&[Buffer::writable(out, 4)]).unwrap();
    driver.queues[0].kick();
    // An answered request later, still nothing.
    driver.frontend.number(FrontendReq::GET_FEATURES);
    assert_eq!(driver.queues[0].poll_used(), None);
    assert_eq!(metrics.queue(0).unwrap().requests.get(), 1);
    driver.frontend.set_enable(0, true);
    driver.queues[0].wait_used();
    driver.finish();
}

#[test]
fn configuration_is_read_and_written_at_any_offset_and_size() {
    let (mut driver, _, _) = echo(Setup::default());
    assert_eq!(driver.frontend.get_config(5, 6), b"device");
    let long = driver.frontend.get_config(0, 60);
    assert_eq!(&long[..25], b"echo device configuration");
    assert_eq!(long[25..], [0; 35]);
    assert_eq!(driver.frontend.get_config(4000, 57), [0; 57]);
    assert_eq!(driver.frontend.get_config(u32::MAX, 1), [0; 1]);
    assert_eq!(driver.frontend.set_config(0, b"ECHO"), 0);
    assert_eq!(driver.frontend.get_config(0, 6), b"ECHO d");
    assert_ne!(driver.frontend.set_config(24, b"past"), 0);
    assert_ne!(driver.frontend.set_config(u32::MAX, b"x"), 0);
    driver.finish();
}

#[test]
fn frontend_hears_of_a_changed_configuration() {
    let (mut driver, device, _) = echo(Setup::default());
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    let fds: [BorrowedFd; 1] = [theirs.as_fd()];
    driver
        .frontend
        .request(FrontendReq::SET_BACKEND_REQ_FD, &[], &fds);
    device.change_config(b"new");
    let mut message = [0; HEADER_SIZE];
    (&ours).read_exact(&mut message).unwrap();
    // CONFIG_CHANGE_MSG is request 2, version 1, no payload.
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.frontend.get_config(0, 3), b"new");
    // A channel that the frontend has closed does no harm.
    drop(ours);
    drop(theirs);
    device.change_config(b"newer");
    assert_eq!(driver.frontend.get_config(0, 5), b"newer");
    driver.finish();
}

#[test]
fn network_requests_reach_the_device() {
    let (mut driver, device, _) = echo(Setup::default());
    let mtu = 9000u64.to_ne_bytes();
    driver.frontend.request(FrontendReq::NET_SET_MTU, &mtu, &[]);
    assert_eq!(device.mtu.load(Ordering::Relaxed), 9000);
    let mac = [2, 0, 0, 0, 0, 7, 0, 0];
    driver.frontend.request(FrontendReq::SEND_RARP, &mac, &[]);
    assert_eq!(*device.rarp.lock().unwrap(), [2, 0, 0, 0, 0, 7]);
    let absurd = (1u64 << 40).to_ne_bytes();
    let ack = driver
        .frontend
        .try_request(FrontendReq::NET_SET_MTU, &absurd, &[]);
    assert_ne!(ack, 0);
    driver.finish();
}

#[test]
fn reset_stops_all_rings_and_tells_the_device() {
    let (mut driver, device, _) = echo(Setup {
        num_queues: 2,
        ..Setup::default()
    });
    for queue in &mut driver.queues {
        say(&driver.ram, queue, b"before");
    }
    driver.frontend.request(FrontendReq::RESET_DEVICE, &[], &[]);
    assert_eq!(device.resets.load(Ordering::Relaxed), 1);
    let features = driver.frontend.negotiate(u64::MAX);
    for queue in &mut driver.queues {
        queue.reset();
        driver.frontend.start_queue(queue, 0, features);
        say(&driver.ram, queue, b"after");
    }
    driver.frontend.request(FrontendReq::RESET_OWNER, &[], &[]);
    driver.queues[0].add(&[Buffer::writable(0, 0)]).unwrap();
    driver.queues[0].kick();
    driver.frontend.number(FrontendReq::GET_FEATURES);
    assert_eq!(driver.queues[0].poll_used(), None, "rings are disabled");
    driver.finish();
}

#[test]
fn in_flight_region_is_sealed_has_room_and_comes_back() {
    let (mut frontend, session) = frontend();
    frontend.negotiate(u64::MAX);
    let region = frontend.get_inflight(2, 128);
    // The device takes rings of 1024, so that is what there is room for, and for a saved state.
    assert_eq!(region.info.map_size, 2 * (16 + 16 * 1024 + 48 + 4096));
    assert_eq!((region.info.num_queues, region.info.queue_size), (2, 128));
    let file = std::fs::File::from(region.file.try_clone().unwrap());
    assert_eq!(file.metadata().unwrap().len(), region.info.map_size);
    assert!(file.set_len(0).is_err(), "sealed against shrinking");
    assert_eq!(frontend.set_inflight(&region), 0);
    assert_eq!(frontend.set_inflight(&region), 0, "as often as it likes");
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn in_flight_region_that_cannot_be_is_refused() {
    let (mut frontend, session) = frontend();
    frontend.negotiate(u64::MAX);
    let mut region = frontend.get_inflight(1, 64);
    let good = region.info;
    let with = |change: fn(&mut InflightInfo)| {
        let mut info = good;
        change(&mut info);
        info
    };
    let bad = [
        with(|info| info.map_size = 0),
        with(|info| info.map_size = 31),
        with(|info| info.map_size = u64::MAX),
        with(|info| info.map_size += 1),
        with(|info| info.map_offset = 64),
        with(|info| info.map_offset = 1),
        with(|info| info.map_offset = u64::MAX - 7),
        with(|info| info.num_queues = 0),
        with(|info| info.num_queues = u16::MAX),
    ];
    for info in bad {
        region.info = info;
        assert_ne!(frontend.set_inflight(&region), 0, "{info:x?}");
    }
    for (num_queues, queue_size) in [(0, 64), (3, 64), (1, 0)] {
        let asked = InflightInfo {
            num_queues,
            queue_size,
            ..InflightInfo::default()
        };
        let ack = frontend.try_request(FrontendReq::GET_INFLIGHT_FD, &asked.to_bytes(), &[]);
        assert_ne!(ack, 0, "{asked:?}");
    }
    region.info = good;
    assert_eq!(frontend.set_inflight(&region), 0);
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn senseless_requests_are_refused_and_the_session_goes_on() {
    let (mut frontend, session) = frontend();
    frontend.negotiate(u64::MAX);
    let refused = [
        (
            FrontendReq::SET_FEATURES,
            (1u64 << 50).to_ne_bytes().to_vec(),
        ),
        (
            FrontendReq::SET_PROTOCOL_FEATURES,
            (1u64 << 16).to_ne_bytes().to_vec(),
        ),
        (FrontendReq::SET_VRING_NUM, state(0, 3)),
        (FrontendReq::SET_VRING_NUM, state(0, 0)),
        (FrontendReq::SET_VRING_NUM, state(0, 65536)),
        (FrontendReq::SET_VRING_NUM, state(2, 128)),
        (FrontendReq::SET_VRING_NUM, state(u32::MAX, 128)),
        (FrontendReq::SET_VRING_BASE, state(0, 0x10000)),
        (FrontendReq::SET_VRING_ENABLE, state(9, 1)),
        (
            FrontendReq::SET_VRING_KICK,
            (1u64 << 8).to_ne_bytes().to_vec(),
        ),
        (FrontendReq::POSTCOPY_ADVISE, vec![]),
    ];
    for (request, payload) in refused {
        let ack = frontend.try_request(request, &payload, &[]);
        assert_ne!(ack, 0, "{request:?}");
    }
    assert_eq!(frontend.number(FrontendReq::GET_QUEUE_NUM), 2);
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn refusal_without_acknowledgement_ends_the_session() {
    let (mut frontend, session) = frontend();
    frontend.send(FrontendReq::SET_VRING_NUM, &state(0, 3), &[]);
    assert!(frontend.is_closed());
    let error = session.join().unwrap();
    assert!(matches!(error, SessionError::Refused { .. }), "{error}");
}

#[test]
fn broken_framing_ends_the_session() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let many: Vec<BorrowedFd> = (0..32).map(|_| null.as_fd()).collect();
    let set_features = frontend_request(2, false, &[0; 8]);
    let mut wrong_version = set_features.clone();
    wrong_version[4] = 2;
    let mut reply = set_features.clone();
    reply[4] = 5;
    let mut huge = set_features.clone();
    huge[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    let cases: [(&str, &[u8], &[BorrowedFd]); 8] = [
        ("version", &wrong_version, &[]),
        ("reply bit", &reply, &[]),
        ("size", &huge, &[]),
        ("unknown request", &frontend_request(999, true, &[]), &[]),
        ("short payload", &frontend_request(2, true, &[0; 7]), &[]),
        ("an fd too many", &set_features, &many[..1]),
        ("many fds", &set_features, &many),
        ("no fd", &frontend_request(12, true, &[0; 8]), &[]),
    ];
    for (what, bytes, fds) in cases {
        let (mut frontend, session) = frontend();
        frontend.send_raw(bytes, fds);
        assert!(frontend.is_closed(), "{what}");
        let error = session.join().unwrap();
        assert!(
            matches!(error, SessionError::Connection(_)),
            "{what}: {error}"
        );
    }
}

#[test]
fn frontend_may_vanish_or_dribble_in_the_middle_of_a_message() {
    let bytes = frontend_request(FrontendReq::SET_FEATURES.into(), true, &[0; 8]);
    for cut in 1..bytes.len() {
        let (mut frontend, session) = frontend();
        frontend.send_raw(&bytes[..cut], &[]);
        frontend.disconnect();
        let error = session.join().unwrap().to_string();
        assert!(error.contains("in the middle"), "{cut} bytes: {error}");
    }
    let (mut frontend, session) = frontend();
    for byte in &bytes {
        frontend.send_raw(std::slice::from_ref(byte), &[]);
    }
    assert_eq!(frontend.number_reply(FrontendReq::SET_FEATURES), 0);
    frontend.disconnect();
    session.join().unwrap();
}

#[test]
fn frontend_that_closes_with_requests_in_the_ring_is_survived() {
    let device = Echo::new(1);
    let metrics = Metrics::new(Echo::NAME, 1);
    for _ in 0..10 {
        let mut driver = FakeDriver::start(Arc::clone(&device), &metrics, Setup::default());
        for _ in 0..50 {
            driver.queues[0].add(&[Buffer::writable(driver.ram.alloc(8, 8), 8)]);
        }
        driver.queues[0].kick();
        driver.finish();
    }
}

#[test]
fn call_fd_that_blocks_cannot_hold_up_the_session() {
    let (mut driver, _, _) = echo(Setup {
        features: !(1 << features::RING_EVENT_IDX),
        ..Setup::default()
    });
    // A pipe that is full: the write that signals the driver blocks.
    let (_reader, writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut &writer, &[0; 65536]).unwrap();
    driver
        .frontend
        .request(FrontendReq::SET_VRING_CALL, &[0; 8], &[writer.as_fd()]);
    driver.queues[0]
        .add(&[Buffer::writable(driver.ram.alloc(8, 8), 8)])
        .unwrap();
    driver.queues[0].kick();
    driver.queues[0].spin_used();
    assert_eq!(driver.frontend.stop_queue(0), 1);
    driver.finish();
}

#[test]
fn frontend_that_truncates_guest_memory_ends_its_session_only() {
    let device = Echo::new(2);
    let metrics = Metrics::new(Echo::NAME, 2);
    let start = || FakeDriver::start(Arc::clone(&device), &metrics, Setup::default());
    let mut other = start();
    for _ in 0..3 {
        let mut driver = start();
        say(&driver.ram, &mut driver.queues[0], b"all is well");
        driver.ram.truncate();
        driver.queues[0].kick();
        driver.queues[0].wait_err();
        assert!(driver.frontend.is_closed());
        let error = driver.finish().unwrap();
        assert!(matches!(error, SessionError::MemoryLost), "{error}");
        // A session in the same process that lost nothing goes on.
        say(&other.ram, &mut other.queues[0], b"and still is");
    }
    other.finish();
}
