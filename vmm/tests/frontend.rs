//! The vhost-user frontend drives a device that somebody else's code serves, with rings in memory that
//! no guest has ever run in.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod bench;
mod ring;
mod stock;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bench::{Bench, PATIENCE, disk};
use berth_vmm::config::MemoryConfig;
use berth_vmm::devices::virtio::device::{Activation, ResetProgress, TransportNotify};
use berth_vmm::memory::GuestRam;
use berth_vmm::vhost_user::{Frontends, SessionState};
use ring::wait;
use stock::{FEATURES, QUEUES, Stock};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::tempdir::TempDir;

const LIMIT: Duration = Duration::from_millis(300);
const VERSION_1: u64 = 1 << 32;

/// Tells a test what the device told the transport.
struct Notes {
    config: EventFd,
    reset: EventFd,
}

impl TransportNotify for Notes {
    fn config_changed(&self) {
        self.config.write(1).unwrap();
    }

    fn needs_reset(&self) {
        self.reset.write(1).unwrap();
    }
}

fn protocol() -> Protocol {
    Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::BACKEND_REQ
}

/// A disk with two queues whose backend is not there yet.
fn bench() -> Bench {
    bench_with(4 << 20)
}

fn bench_with(size_bytes: u64) -> Bench {
    let ram = GuestRam::new(&MemoryConfig::of(size_bytes)).unwrap();
    let frontends = Frontends::with_operation_limit(LIMIT).unwrap();
    let notes = Notes {
        config: EventFd::new(EFD_NONBLOCK).unwrap(),
        reset: EventFd::new(EFD_NONBLOCK).unwrap(),
    };
    Bench::new(ram, frontends, Arc::new(notes))
}

#[test]
fn a_stock_device_serves_rings_of_two_queues_and_again_after_a_reset() {
    let mut bench = bench();
    let stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    assert_eq!(bench.device.features(), FEATURES & !(1 << 30));
    let mut config = [0; 8];
    bench.device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config), 2048);
    for round in 0..2 {
        let (mut first, mut second) = (bench.driver(0x10_0000), bench.driver(0x12_0000));
        bench.activate(&[&first, &second]);
        for _ in 0..300 {
            first.submit();
            second.submit();
            first.complete();
            second.complete();
        }
        bench.reset();
        let done = stock.seen.requests.load(Ordering::SeqCst);
        assert_eq!(done, 600 * (round + 1));
        first.submit();
    }
    assert_eq!(*stock.seen.acked.lock().unwrap(), FEATURES);
    assert!(bench.frontends.stop(PATIENCE).is_empty());
    assert_eq!(
        stock.seen.requests.load(Ordering::SeqCst),
        1200,
        "a ring that was taken back ran"
    );
}

#[test]
fn rings_above_the_pci_hole_are_served_through_the_second_region() {
    let mut bench = bench_with((3 << 30) + (4 << 20));
    let _stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    let (mut low, mut high) = (bench.driver(0x10_0000), bench.driver((4 << 30) + 0x10_0000));
    bench.activate(&[&high, &low]);
    for _ in 0..10 {
        high.submit();
        high.complete();
        low.submit();
        low.complete();
    }
}

#[test]
fn a_device_with_no_more_than_the_least_protocol_is_served_too() {
    let mut bench = bench();
    let _stock = Stock::listen(&bench.path, Protocol::CONFIG);
    assert!(bench.frontends.wait_settled(PATIENCE));
    let mut queues = [0; 2];
    bench.device.read_config(34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 1);
    let mut driver = bench.driver(0x10_0000);
    bench.activate(&[&driver]);
    driver.submit();
    driver.complete();
    bench.reset();
}

#[test]
fn a_driver_that_starts_before_a_backend_is_back_is_served_when_it_is() {
    let mut bench = bench();
    let stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    stock.die();
    let mut driver = bench.driver(0x10_0000);
    bench.wait_for(SessionState::Waiting);
    let features = bench.device.features();
    assert!(bench.device.accepts(features));
    let activation = Activation {
        features,
        queues: vec![driver.setup(0)],
        memory: bench.ram.memory().clone(),
    };
    bench.device.activate(activation).unwrap();
    driver.submit();
    let _stock = Stock::listen(&bench.path, protocol());
    driver.complete();
}

#[test]
fn a_backend_that_died_goes_on_where_it_stopped() {
    let mut bench = bench();
    let mut stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    let mut driver = bench.driver(0x10_0000);
    bench.activate(&[&driver]);
    for death in 0..3 {
        for _ in 0..200 {
            driver.submit();
            driver.complete();
        }
        let seen = stock.die();
        bench.wait_for(SessionState::Waiting);
        // Asked while nobody is there.
        driver.submit();
        stock = Stock::listen(&bench.path, protocol());
        driver.complete();
        let expected = 200 + usize::from(death > 0);
        assert_eq!(seen.requests.load(Ordering::SeqCst), expected);
    }
    bench.reset();
    assert!(bench.frontends.stop(PATIENCE).is_empty());
}

#[test]
fn a_write_to_the_cache_mode_reaches_the_backend_and_its_successor() {
    let mut bench = bench();
    let stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    let driver = bench.driver(0x10_0000);
    bench.activate(&[&driver]);
    bench.device.write_config(32, &[1]);
    bench.device.write_config(0, &[1]);
    let written = |seen: &stock::Seen| {
        let begin = Instant::now();
        while seen.written.lock().unwrap().is_empty() {
            assert!(begin.elapsed() < PATIENCE, "nothing written");
            std::thread::yield_now();
        }
        seen.written.lock().unwrap().clone()
    };
    assert_eq!(written(&stock.seen), [(32, vec![1])]);
    stock.die();
    let stock = Stock::listen(&bench.path, protocol());
    assert_eq!(written(&stock.seen), [(32, vec![1])]);
    bench.wait_for(SessionState::Live);
    let mut mode = [0];
    bench.device.read_config(32, &mut mode);
    assert_eq!(mode, [1]);
}

#[test]
fn a_silent_backend_does_not_keep_the_guest_from_booting() {
    let mut bench = bench();
    let begin = Instant::now();
    let _silent = UnixListener::bind(&bench.path).unwrap();
    assert!(bench.frontends.wait_settled(PATIENCE));
    assert!(begin.elapsed() >= LIMIT);
    assert_eq!(bench.device.features(), VERSION_1);
    assert!(!bench.device.accepts(VERSION_1));
    let begin = Instant::now();
    assert_eq!(bench.device.reset_progress(), ResetProgress::Done);
    bench.frontends.stop(LIMIT);
    assert!(begin.elapsed() < 2 * LIMIT + Duration::from_secs(1));
}

#[test]
fn nobody_there_is_waited_for_and_the_vm_may_give_up() {
    let bench = bench();
    assert!(!bench.frontends.wait_settled(Duration::from_millis(50)));
    bench.wait_for(SessionState::Waiting);
    assert!(bench.frontends.stop(PATIENCE).is_empty());
    assert_eq!(bench.frontends.sessions()[0].state, SessionState::Closed);
}

#[test]
fn an_interrupt_that_moves_arrives_at_its_new_place() {
    let mut bench = bench();
    let _stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    let mut driver = bench.driver(0x10_0000);
    bench.activate(&[&driver]);
    let elsewhere = EventFd::new(EFD_NONBLOCK).unwrap();
    bench.device.set_call(0, elsewhere.try_clone().unwrap());
    wait(&elsewhere, "interrupt for what was missed");
    driver.submit();
    wait(&elsewhere, "interrupt");
    driver.complete();
}

#[test]
fn a_queue_that_the_backend_does_not_serve_is_refused() {
    let mut bench = bench();
    let _stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    const { assert!(QUEUES > 2) };
    let driver = bench.driver(0x10_0000);
    let activation = Activation {
        features: VERSION_1,
        queues: vec![driver.setup(2)],
        memory: bench.ram.memory().clone(),
    };
    let error = bench.device.activate(activation).unwrap_err();
    assert_eq!(error.to_string(), "_disk0: queue 2: the backend serves 2");
}

#[test]
fn what_can_never_be_a_socket_is_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let mut frontends = Frontends::new().unwrap();
    let mut error = |path: &Path| frontends.connect(disk(path)).err().unwrap().to_string();
    let file = dir.as_path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(error(&file).ends_with("file is not a socket"));
    assert!(error(dir.as_path()).ends_with("is not a socket"));
    let long = PathBuf::from("/".to_owned() + &"x".repeat(107));
    assert!(error(&long).contains("at most 107 bytes"));
}
