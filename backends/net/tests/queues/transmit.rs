//! Frames from the guest.

use std::io;
use std::time::Instant;

use berth_net::port::testing::SocketPort;
use berth_net::settings::{EngineChoice, Settings};
use berth_queue_worker::testing::TIMEOUT;
use virtio_bindings::virtio_net::VIRTIO_NET_F_HOST_TSO4;

use crate::guest::{Guest, OWN, PLAIN, RX, TX, frame, settings};

#[test]
fn a_frame_from_the_guest_however_it_is_cut() {
    let mut guest = Guest::new(1, &[], 128);
    let cuts: [&[usize]; 5] = [
        &[],
        &[12],
        &[5, 7],
        &[20],
        &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ];
    for (seed, cut) in cuts.iter().enumerate() {
        let sent = frame(PLAIN, OWN, 400, seed as u8);
        guest.offer(&sent, cut);
        let (_, len) = guest.driver.queues[TX].wait_used();
        assert_eq!(len, 0);
        assert!(guest.sent() == sent, "cut at {cut:?}");
    }
    let counters = guest.metrics.queue(1).unwrap();
    assert_eq!(counters.requests.get(), 5);
    assert_eq!(counters.bytes_from_guest.get(), 5 * 388);
}

#[test]
fn indirect_descriptors_carry_frames_too() {
    let mut guest = Guest::new(1, &[], 128);
    let sent = frame(PLAIN, OWN, 9000, 1);
    let buffers = [
        guest.readable(&sent[..12]),
        guest.readable(&sent[12..5000]),
        guest.readable(&sent[5000..]),
    ];
    guest.driver.queues[TX].add_indirect(&buffers).unwrap();
    guest.driver.queues[TX].kick_if_wanted();
    guest.driver.queues[TX].wait_used();
    assert!(guest.sent() == sent);
}

#[test]
fn frames_that_may_not_be_sent_are_dropped_and_counted() {
    // Arrange: TSO for IPv4 was not negotiated
    let mut guest = Guest::new(1, &[VIRTIO_NET_F_HOST_TSO4], 128);
    let mut tso4 = PLAIN;
    tso4[..2].copy_from_slice(&[1, 1]);
    let mut tso6 = PLAIN;
    tso6[..2].copy_from_slice(&[1, 4]);
    // Act
    guest.offer(&frame(tso4, OWN, 3000, 1), &[12]);
    guest.offer(&[0; 11], &[]);
    guest.offer(&frame(tso6, OWN, 3000, 2), &[12]);
    for _ in 0..3 {
        guest.driver.queues[TX].wait_used();
    }
    // Assert
    assert_eq!(guest.dropped(1), 2);
    assert!(guest.sent() == frame(tso6, OWN, 3000, 2));
    assert_eq!(
        guest.port.take(0).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn a_full_port_holds_frames_back_and_loses_none() {
    // Arrange: more frames than the port has room for, so that some wait in the ring
    let mut guest = Guest::new(1, &[], 128);
    let numbered = |n: u32| frame(PLAIN, OWN, 6000, n as u8);
    for n in 0..120 {
        guest.offer(&numbered(n), &[]);
    }
    // Act: take one, offer one
    for n in 0..600 {
        let sent = guest.port.wait_sent(0).unwrap();
        // Assert: in order, none missing
        assert!(sent == numbered(n), "frame {n}");
        guest.driver.queues[TX].wait_used();
        guest.offer(&numbered(n + 120), &[]);
    }
    assert_eq!(guest.dropped(1), 0);
}

#[test]
fn nonsense_in_the_ring_stops_that_queue_only() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    guest.post(4, 2048);
    // Act: an avail index far ahead
    guest.driver.queues[TX].set_avail_idx(999);
    guest.driver.queues[TX].kick();
    // Assert
    guest.driver.queues[TX].wait_err();
    guest.port.inject(0, &frame(PLAIN, OWN, 66, 1)).unwrap();
    assert_eq!(guest.driver.queues[RX].wait_used().1, 66);
}

#[test]
fn a_batch_of_frames_goes_out_in_order() {
    frames_go_out_in_order(EngineChoice::Auto);
}

#[test]
fn frames_that_go_one_by_one_keep_their_order() {
    frames_go_out_in_order(EngineChoice::Sync);
}

fn frames_go_out_in_order(engine: EngineChoice) {
    // Arrange: all there at once; some in one piece, some cut, some with a header to be cleared,
    // some that may not be sent
    let settings = Settings {
        engine,
        ..settings(1)
    };
    let port = SocketPort::roomy(1).unwrap();
    let mut guest = Guest::on(port, settings, &[VIRTIO_NET_F_HOST_TSO4], 256);
    let meaningless = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7];
    let forbidden = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let header = |n: usize| match n % 7 {
        3 => meaningless,
        5 => forbidden,
        _ => PLAIN,
    };
    for n in 0..80 {
        let cuts: &[usize] = if n % 3 == 0 { &[5, 7, 20] } else { &[] };
        guest.offer_quietly(&frame(header(n), OWN, 60 + n, n as u8), cuts);
    }
    // Act
    guest.driver.queues[TX].kick();
    // Assert
    for n in 0..80 {
        guest.driver.queues[TX].wait_used();
        if header(n) != forbidden {
            let sent = frame(PLAIN, OWN, 60 + n, n as u8);
            assert!(guest.port.wait_sent(0).unwrap()[12..] == sent[12..], "{n}");
        }
    }
    assert_eq!(guest.dropped(1), 11);
    let counters = guest.metrics.queue(1).unwrap();
    assert_eq!(counters.requests.get(), 69);
}

#[test]
fn a_port_that_is_full_after_all_repeats_no_frame_and_counts_those_it_loses() {
    // Arrange: it says that it never is, so frames go many at a time
    const FRAMES: u64 = 120;
    let mut guest = Guest::on_roomy(&[], 256);
    let numbered = |n: u64| frame(PLAIN, OWN, 6000, n as u8);
    for n in 0..FRAMES {
        guest.offer(&numbered(n), &[]);
    }
    // Act: room comes while batches go out, so some frames are overtaken by others
    let (mut seen, mut used) = (Vec::new(), 0);
    let deadline = Instant::now() + TIMEOUT;
    while used < FRAMES {
        assert!(Instant::now() < deadline, "{used} frames used");
        seen.extend(guest.port.take(0));
        while guest.driver.queues[TX].poll_used().is_some() {
            used += 1;
        }
    }
    seen.extend(std::iter::from_fn(|| guest.port.take(0).ok()));
    // Assert
    assert_eq!(seen.len() as u64 + guest.dropped(1), FRAMES);
    let known = (0..FRAMES).filter(|n| seen.contains(&numbered(*n)));
    assert_eq!(known.count(), seen.len(), "a frame twice, or a broken one");
}

#[test]
fn a_disabled_queue_takes_frames_and_throws_them_away() {
    // Arrange
    let mut guest = Guest::on_roomy(&[], 128);
    guest.offer(&frame(PLAIN, OWN, 100, 1), &[]);
    guest.driver.queues[TX].wait_used();
    assert!(guest.sent() == frame(PLAIN, OWN, 100, 1));
    // Act
    guest.driver.frontend.set_enable(1, false);
    for n in 0..100 {
        guest.offer(&frame(PLAIN, OWN, 100, n), &[]);
    }
    // Assert
    for _ in 0..100 {
        guest.driver.queues[TX].wait_used();
    }
    assert_eq!(guest.dropped(1), 100);
    assert_eq!(
        guest.port.take(0).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    // Act, assert: frames to the guest wait meanwhile
    guest.driver.frontend.set_enable(0, false);
    guest.port.inject(0, &frame(PLAIN, OWN, 66, 2)).unwrap();
    let buffers = guest.post(4, 2048);
    guest.driver.frontend.set_enable(1, true);
    guest.offer(&frame(PLAIN, OWN, 100, 3), &[]);
    guest.driver.queues[TX].wait_used();
    assert!(guest.sent() == frame(PLAIN, OWN, 100, 3));
    assert_eq!(guest.driver.queues[RX].poll_used(), None);
    guest.driver.frontend.set_enable(0, true);
    assert_eq!(guest.driver.queues[RX].wait_used().1, 66);
    let got = guest.driver.ram.read(buffers[0], 66);
    assert!(got[12..] == frame(PLAIN, OWN, 66, 2)[12..]);
}
