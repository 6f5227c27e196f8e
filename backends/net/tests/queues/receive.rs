//! Frames to the guest.

use berth_net::port::testing::{Event, SocketPort};
use berth_net::settings::{EngineChoice, Settings};
use berth_queue_worker::testing::Buffer;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MRG_RXBUF,
};

use crate::guest::{Guest, OWN, PLAIN, RX, TX, frame, settings};

const VERSION_1: u32 = 32;

#[test]
fn a_frame_reaches_the_guest_in_one_buffer() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    let buffers = guest.post(4, 2048);
    let sent = frame([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff], OWN, 100, 1);
    // Act
    guest.port.inject(0, &sent).unwrap();
    let (_, len) = guest.driver.queues[RX].wait_used();
    // Assert
    assert_eq!(len, 100);
    let got = guest.driver.ram.read(buffers[0], 100);
    assert_eq!(got[..10], sent[..10], "DATA_VALID is passed on");
    assert_eq!(got[10..12], [1, 0], "num_buffers");
    assert_eq!(got[12..], sent[12..]);
    let counters = guest.metrics.queue(0).unwrap();
    assert_eq!(counters.requests.get(), 1);
    assert_eq!(counters.bytes_to_guest.get(), 88);
}

#[test]
fn flags_are_zero_without_guest_csum() {
    let mut guest = Guest::new(1, &[VIRTIO_NET_F_GUEST_CSUM], 128);
    let buffers = guest.post(1, 2048);
    let sent = frame([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], OWN, 100, 1);
    guest.port.inject(0, &sent).unwrap();
    guest.driver.queues[RX].wait_used();
    assert_eq!(guest.driver.ram.read(buffers[0], 1), [0]);
}

#[test]
fn a_legacy_driver_has_a_header_of_ten_bytes() {
    // Arrange
    let mut guest = Guest::new(1, &[VERSION_1, VIRTIO_NET_F_MRG_RXBUF], 128);
    assert!(guest.port.events().contains(&Event::HeaderLen(10)));
    let buffers = guest.post(1, 2048);
    let sent = frame(PLAIN, OWN, 90, 3);
    // Act
    guest.port.inject(0, &sent[2..]).unwrap();
    guest.driver.queues[RX].wait_used();
    guest.offer(&sent[2..], &[10]);
    guest.driver.queues[TX].wait_used();
    // Assert
    assert_eq!(guest.driver.ram.read(buffers[0], 88), sent[2..]);
    assert_eq!(guest.sent(), sent[2..]);
}

#[test]
fn a_long_frame_is_spread_over_mergeable_buffers() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    let buffers = guest.post(100, 1536);
    let mut next = 0;
    // Act: the first spills, the second meets a large pool, the third is short
    for (seed, len) in [(1, 65_562), (2, 65_000), (3, 60)] {
        let sent = frame(PLAIN, OWN, len, seed);
        guest.port.inject(0, &sent).unwrap();
        let (_, first) = guest.driver.queues[RX].wait_used();
        let count = len.div_ceil(1536);
        // Assert: all buffers of the frame are there when the first one is
        let mut lens = vec![first];
        for _ in 1..count {
            lens.push(guest.driver.queues[RX].poll_used().unwrap().1);
        }
        assert_eq!(guest.driver.queues[RX].poll_used(), None);
        assert_eq!(lens.iter().sum::<u32>() as usize, len);
        assert!(lens[..count - 1].iter().all(|&len| len == 1536));
        let mut got = Vec::new();
        for (gpa, len) in buffers[next..].iter().zip(&lens) {
            got.extend(guest.driver.ram.read(*gpa, *len as usize));
        }
        assert_eq!(got[10..12], (count as u16).to_le_bytes());
        assert!(
            got[12..] == sent[12..],
            "content of the frame of {len} bytes"
        );
        next += count;
        guest.post(0, 0);
    }
    assert_eq!(guest.dropped(0), 0);
}

#[test]
fn a_frame_waits_for_the_buffers_it_lacks() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    let mut buffers = guest.post(2, 1536);
    let long = frame(PLAIN, OWN, 10_000, 5);
    guest.port.inject(0, &long).unwrap();
    guest.port.inject(0, &frame(PLAIN, OWN, 64, 6)).unwrap();
    // Act
    buffers.extend(guest.post(3, 1536));
    buffers.extend(guest.post(4, 1536));
    // Assert
    let mut got = Vec::new();
    for gpa in &buffers[..7] {
        let (_, len) = guest.driver.queues[RX].wait_used();
        got.extend(guest.driver.ram.read(*gpa, len as usize));
    }
    assert_eq!(got.len(), 10_000);
    assert!(got[12..] == long[12..]);
    let (_, len) = guest.driver.queues[RX].wait_used();
    assert_eq!(len, 64);
    assert_eq!(guest.dropped(0), 0);
}

#[test]
fn a_frame_that_can_never_fit_is_dropped() {
    // Arrange: the whole ring is 16 buffers of 512 bytes
    let mut guest = Guest::new(1, &[], 16);
    let buffers = guest.post(16, 512);
    // Act
    guest.port.inject(0, &frame(PLAIN, OWN, 20_000, 7)).unwrap();
    let short = frame(PLAIN, OWN, 300, 8);
    guest.port.inject(0, &short).unwrap();
    // Assert
    let (_, len) = guest.driver.queues[RX].wait_used();
    assert_eq!(len, 300);
    let got = guest.driver.ram.read(buffers[0], 300);
    assert!(got[12..] == short[12..]);
    assert_eq!(guest.dropped(0), 1);
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_or_is_dropped() {
    let mut guest = Guest::new(1, &[VIRTIO_NET_F_MRG_RXBUF], 128);
    let buffers = guest.post(8, 1600);
    guest.port.inject(0, &frame(PLAIN, OWN, 1601, 1)).unwrap();
    let sent = frame(PLAIN, OWN, 1600, 2);
    guest.port.inject(0, &sent).unwrap();
    let (_, len) = guest.driver.queues[RX].wait_used();
    assert_eq!(len, 1600);
    let got = guest.driver.ram.read(buffers[0], 1600);
    assert_eq!(got[10..12], [1, 0]);
    assert!(got[12..] == sent[12..]);
    assert_eq!(guest.dropped(0), 1);
}

#[test]
fn frames_wait_in_the_port_until_there_are_buffers() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    for seed in 0..20 {
        guest.port.inject(0, &frame(PLAIN, OWN, 200, seed)).unwrap();
    }
    // Act
    let buffers = guest.post(20, 1536);
    // Assert
    for (seed, gpa) in buffers.iter().enumerate() {
        let (_, len) = guest.driver.queues[RX].wait_used();
        let got = guest.driver.ram.read(*gpa, len as usize);
        assert!(
            got[12..] == frame(PLAIN, OWN, 200, seed as u8)[12..],
            "frame {seed}"
        );
    }
}

#[test]
fn buffers_held_are_given_back_when_the_queue_stops() {
    // Arrange: one frame used, the pool holds more
    let mut guest = Guest::new(1, &[], 128);
    let buffers = guest.post(50, 1536);
    guest.port.inject(0, &frame(PLAIN, OWN, 5000, 1)).unwrap();
    for _ in 0..4 {
        guest.driver.queues[RX].wait_used();
    }
    // Act
    let base = guest.driver.frontend.stop_queue(0);
    // Assert
    assert_eq!(base, 4);
    let features = guest.driver.features;
    let driver = &mut guest.driver;
    driver
        .frontend
        .start_queue(&driver.queues[RX], base, features);
    guest.port.inject(0, &frame(PLAIN, OWN, 100, 2)).unwrap();
    guest.driver.queues[RX].wait_used();
    let got = guest.driver.ram.read(buffers[4], 100);
    assert!(got[12..] == frame(PLAIN, OWN, 100, 2)[12..]);
}

#[test]
fn a_buffer_without_room_for_the_header_comes_back_empty() {
    let mut guest = Guest::new(1, &[], 128);
    let ram = &guest.driver.ram;
    let (small, good) = (ram.alloc(8, 16), ram.alloc(2048, 16));
    let queue = &mut guest.driver.queues[RX];
    queue.add(&[Buffer::writable(small, 8)]).unwrap();
    queue.add(&[Buffer::writable(good, 2048)]).unwrap();
    queue.kick_if_wanted();
    guest.port.inject(0, &frame(PLAIN, OWN, 100, 2)).unwrap();
    assert_eq!(guest.driver.queues[RX].wait_used().1, 0);
    assert_eq!(guest.driver.queues[RX].wait_used().1, 100);
}

#[test]
fn a_useless_buffer_does_not_stall_a_frame_that_lacks_buffers() {
    // Arrange: the frame needs more than the first buffer, and the second cannot help
    let mut guest = Guest::new(1, &[], 128);
    let ram = &guest.driver.ram;
    let (good, small) = (ram.alloc(1536, 16), ram.alloc(8, 16));
    let queue = &mut guest.driver.queues[RX];
    queue.add(&[Buffer::writable(good, 1536)]).unwrap();
    queue.add(&[Buffer::writable(small, 8)]).unwrap();
    queue.kick_if_wanted();
    // Act
    guest.port.inject(0, &frame(PLAIN, OWN, 5000, 1)).unwrap();
    guest.port.inject(0, &frame(PLAIN, OWN, 100, 2)).unwrap();
    // Assert
    assert_eq!(guest.driver.queues[RX].wait_used().1, 100);
    assert_eq!(guest.driver.queues[RX].wait_used().1, 0);
    assert_eq!(guest.dropped(0), 1);
}

#[test]
fn the_filter_sees_addresses_cut_across_buffers() {
    // Arrange: the address begins in the first buffer and ends in the second
    let mut guest = Guest::new(1, &[], 128);
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    guest.post(20, 15);
    // Act
    guest
        .port
        .inject(0, &frame(PLAIN, [2, 0, 0, 0, 0, 9], 40, 1))
        .unwrap();
    guest.port.inject(0, &frame(PLAIN, OWN, 45, 2)).unwrap();
    // Assert
    let lens: Vec<u32> = (0..3)
        .map(|_| guest.driver.queues[RX].wait_used().1)
        .collect();
    assert_eq!(lens, [15, 15, 15]);
    assert_eq!(guest.driver.queues[RX].poll_used(), None);
}

#[test]
fn frames_of_a_batch_keep_their_order_whatever_they_are() {
    frames_keep_their_order(EngineChoice::Auto);
}

#[test]
fn frames_that_come_one_by_one_keep_their_order() {
    frames_keep_their_order(EngineChoice::Sync);
}

fn frames_keep_their_order(engine: EngineChoice) {
    // Arrange: enough frames wait for batches of many reads; some are for others, some are long
    let settings = Settings {
        engine,
        ..settings(1)
    };
    let mut guest = Guest::on(SocketPort::roomy(1).unwrap(), settings, &[], 256);
    assert_eq!(guest.command(&[0, 0, 0]), 0, "promiscuous mode off");
    let other = [2, 9, 9, 9, 9, 9];
    let len = |n: usize| match n % 16 {
        7 => 4000,
        13 => 1700,
        _ => 80 + n,
    };
    let to = |n: usize| if n % 11 == 3 { other } else { OWN };
    let wanted: Vec<usize> = (0..100).filter(|n| to(*n) == OWN).collect();
    for n in 0..100 {
        let bytes = frame(PLAIN, to(n), len(n), n as u8);
        guest.port.inject(0, &bytes).unwrap();
    }
    // Act
    let buffers = guest.post(180, 1536);
    // Assert
    let mut buffers = buffers.iter();
    for n in wanted {
        let mut got = Vec::new();
        while got.len() < len(n) {
            let (_, part) = guest.driver.queues[RX].wait_used();
            let gpa = buffers.next().unwrap();
            got.extend(guest.driver.ram.read(*gpa, part as usize));
        }
        assert_eq!(got[10..12], (len(n).div_ceil(1536) as u16).to_le_bytes());
        assert!(
            got[12..] == frame(PLAIN, OWN, len(n), n as u8)[12..],
            "frame {n}"
        );
    }
    assert_eq!(guest.dropped(0), 0);
    // Act, assert: buffers that were popped ahead are still in turn
    let base = guest.driver.frontend.stop_queue(0);
    assert_eq!(usize::from(base), 180 - buffers.len());
}

#[test]
fn without_mergeable_buffers_a_batch_drops_what_is_too_long() {
    let mut guest = Guest::on_roomy(&[VIRTIO_NET_F_MRG_RXBUF], 256);
    for n in 0..100 {
        let len = if n % 10 == 9 { 1601 } else { 100 + n };
        guest
            .port
            .inject(0, &frame(PLAIN, OWN, len, n as u8))
            .unwrap();
    }
    let buffers = guest.post(90, 1600);
    let whole = (0..100).filter(|n| n % 10 != 9);
    for (n, gpa) in whole.zip(buffers) {
        let (_, len) = guest.driver.queues[RX].wait_used();
        let got = guest.driver.ram.read(gpa, len as usize);
        assert!(
            got[12..] == frame(PLAIN, OWN, 100 + n, n as u8)[12..],
            "{n}"
        );
    }
}

/// What segmentation needs: without it no frame is longer than the MTU.
const SEGMENTATION: [u32; 5] = [
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
];

#[test]
fn frames_keep_their_order_where_none_can_be_longer_than_the_mtu() {
    // Arrange: frames of many lengths; some are for others, some for two buffers
    let port = SocketPort::with_longest(1, 1700).unwrap();
    let mut guest = Guest::on(port, settings(1), &SEGMENTATION, 256);
    assert_eq!(guest.command(&[0, 0, 0]), 0, "promiscuous mode off");
    let other = [2, 9, 9, 9, 9, 9];
    let to = |n: usize| if n % 11 == 3 { other } else { OWN };
    let len = |n: usize| match n {
        82 | 150 => 1600,
        100..120 if n.is_multiple_of(3) => 900,
        _ => 60 + n,
    };
    for n in 0..200 {
        let header = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let bytes = frame(header, to(n), len(n), n as u8);
        guest.port.inject(0, &bytes).unwrap();
    }
    // Act
    let buffers = guest.post(240, 1536);
    // Assert
    let mut buffers = buffers.iter();
    for n in (0..200).filter(|n| to(*n) == OWN) {
        let mut got = Vec::new();
        while got.len() < len(n) {
            let (_, part) = guest.driver.queues[RX].wait_used();
            let gpa = buffers.next().unwrap();
            got.extend(guest.driver.ram.read(*gpa, part as usize));
        }
        assert_eq!(got.len(), len(n), "frame {n}");
        assert_eq!(got[..2], [2, 0], "DATA_VALID is passed on");
        assert_eq!(got[10..12], (len(n).div_ceil(1536) as u16).to_le_bytes());
        assert!(
            got[12..] == frame(PLAIN, OWN, len(n), n as u8)[12..],
            "frame {n}"
        );
    }
    assert_eq!(guest.dropped(0), 0);
    // Act, assert: buffers that were popped ahead are still in turn
    let base = guest.driver.frontend.stop_queue(0);
    assert_eq!(usize::from(base), 240 - buffers.len());
}

#[test]
fn short_frames_have_no_flags_without_guest_csum_and_a_cut_one_is_dropped() {
    // Arrange
    let without = [&SEGMENTATION[..], &[VIRTIO_NET_F_GUEST_CSUM]].concat();
    let port = SocketPort::with_longest(1, 1700).unwrap();
    let mut guest = Guest::on(port, settings(1), &without, 128);
    let header = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    for n in 0..60 {
        // The MTU has been raised meanwhile.
        let len = if n == 50 { 3000 } else { 100 };
        let bytes = frame(header, OWN, len, n as u8);
        guest.port.inject(0, &bytes).unwrap();
    }
    // Act
    let buffers = guest.post(64, 4096);
    // Assert
    for (n, gpa) in (0..60).filter(|n| *n != 50).zip(buffers) {
        let (_, len) = guest.driver.queues[RX].wait_used();
        let got = guest.driver.ram.read(gpa, len as usize);
        assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert!(
            got[12..] == frame(header, OWN, 100, n as u8)[12..],
            "frame {n}"
        );
    }
    assert_eq!(guest.dropped(0), 1);
}
