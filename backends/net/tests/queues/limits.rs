//! Rate limits.

use berth_net::port::testing::SocketPort;
use berth_net::settings::Settings;

use crate::guest::{Guest, OWN, PLAIN, RX, TX, frame, settings};

/// Ten frames at once, and after that one in an hour.
const TEN: &str = "ops_size=10,ops_refill_time=36000000";

fn limited(settings: Settings) -> Guest {
    Guest::on(SocketPort::roomy(1).unwrap(), settings, &[], 128)
}

#[test]
fn frames_over_the_limit_wait_in_the_ring() {
    // Arrange
    let limit = Some(TEN.parse().unwrap());
    let mut guest = limited(Settings {
        rate_limit_tx: limit,
        ..settings(1)
    });
    // Act: twenty, all there at once
    for n in 0..20 {
        guest.offer_quietly(&frame(PLAIN, OWN, 100, n), &[]);
    }
    guest.driver.queues[TX].kick();
    // Assert: ten go
    for n in 0..10 {
        guest.driver.queues[TX].wait_used();
        assert!(guest.sent() == frame(PLAIN, OWN, 100, n));
    }
    // Act: stop
    let base = guest.driver.frontend.stop_queue(1);
    // Assert: the one that was held is back in the ring, and none was dropped
    assert_eq!(base, 10);
    assert_eq!(guest.driver.queues[TX].poll_used(), None);
    assert_eq!(guest.metrics.queue(1).unwrap().throttled.get(), 1);
    assert_eq!(guest.dropped(1), 0);
}

#[test]
fn frames_over_the_limit_stay_in_the_port() {
    // Arrange
    let limit = Some(TEN.parse().unwrap());
    let mut guest = limited(Settings {
        rate_limit_rx: limit,
        ..settings(1)
    });
    for n in 0..20 {
        guest.port.inject(0, &frame(PLAIN, OWN, 100, n)).unwrap();
    }
    // Act
    guest.post(30, 1536);
    // Assert: ten, and the one that found the bucket empty
    for _ in 0..11 {
        assert_eq!(guest.driver.queues[RX].wait_used().1, 100);
    }
    // Act: stop
    let base = guest.driver.frontend.stop_queue(0);
    // Assert
    assert_eq!(base, 11);
    assert_eq!(guest.metrics.queue(0).unwrap().throttled.get(), 1);
}

#[test]
fn a_frame_that_was_held_goes_when_it_is_paid_for() {
    // Arrange: a bucket of 1000 bytes, full again in 20 ms
    let limit = Some("bw_size=1000,bw_refill_time=20".parse().unwrap());
    let mut guest = limited(Settings {
        rate_limit_tx: limit,
        ..settings(1)
    });
    // Act, assert: ten times as much, in order
    for n in 0..10 {
        guest.offer(&frame(PLAIN, OWN, 912, n), &[]);
    }
    for n in 0..10 {
        assert!(guest.port.wait_sent(0).unwrap() == frame(PLAIN, OWN, 912, n));
        guest.driver.queues[TX].wait_used();
    }
    assert!(guest.metrics.queue(1).unwrap().throttled.get() >= 1);
}
