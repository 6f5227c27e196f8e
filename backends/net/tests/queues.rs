//! The device's queues, driven by the fake driver over a port made of sockets: no privilege, no
//! network. What needs a real tap is in `daemon.rs`.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io;
use std::sync::Arc;

use berth_net::device::Identity;
use berth_net::mac::Mac;
use berth_net::net_device::NetDevice;
use berth_net::port::testing::{Event, SocketPort};
use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
use berth_queue_worker::{Device, Metrics};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};

const VERSION_1: u32 = 32;
const RX: usize = 0;
const TX: usize = 1;
const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A guest on a device on a port.
struct Guest {
    port: Arc<SocketPort>,
    metrics: Metrics,
    driver: FakeDriver,
}

impl Guest {
    /// With `pairs` pairs, without the features `without`.
    fn new(pairs: u16, without: &[u32], queue_size: u16) -> Self {
        let port = Arc::new(SocketPort::new(pairs).unwrap());
        let identity = Identity {
            mac: Some(Mac(OWN)),
            mtu: None,
            pairs,
        };
        let device = NetDevice::new(identity, port.clone(), 1024);
        let metrics = Metrics::new(NetDevice::NAME, device.num_queues());
        let features = without
            .iter()
            .fold(u64::MAX, |bits, bit| bits & !(1 << bit));
        let setup = Setup {
            num_queues: identity.num_queues(),
            queue_size,
            features,
            ..Setup::default()
        };
        let driver = FakeDriver::start(Arc::new(device), &metrics, setup);
        Self {
            port,
            metrics,
            driver,
        }
    }

    /// Gives the device `count` receive buffers of `len` bytes; their addresses.
    fn post(&mut self, count: usize, len: u32) -> Vec<u64> {
        let buffers: Vec<u64> = (0..count)
            .map(|_| self.driver.ram.alloc(len.into(), 16))
            .collect();
        for &gpa in &buffers {
            self.driver.queues[RX]
                .add(&[Buffer::writable(gpa, len)])
                .unwrap();
        }
        self.driver.queues[RX].kick_if_wanted();
        buffers
    }

    /// Offers a frame for transmission, header included, cut into pieces of these lengths.
    fn offer(&mut self, bytes: &[u8], cuts: &[usize]) {
        let mut rest = bytes;
        let mut buffers = Vec::new();
        for &cut in cuts {
            let (piece, tail) = rest.split_at(cut);
            buffers.push(self.readable(piece));
            rest = tail;
        }
        buffers.push(self.readable(rest));
        self.driver.queues[TX].add(&buffers).unwrap();
        self.driver.queues[TX].kick_if_wanted();
    }

    fn readable(&self, bytes: &[u8]) -> Buffer {
        Buffer::readable(self.driver.ram.place(bytes), bytes.len() as u32)
    }

    /// Sends a command; the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let control = self.driver.queues.len() - 1;
        let command = self.readable(bytes);
        let answer = self.driver.ram.place(&[0xee]);
        let len = self.driver.queues[control].run(&[command, Buffer::writable(answer, 1)]);
        assert_eq!(len, 1);
        self.driver.ram.read(answer, 1)[0]
    }

    fn dropped(&self, queue: u16) -> u64 {
        self.metrics.queue(queue).unwrap().dropped.get()
    }

    /// Takes frames that were sent until one has come.
    fn sent(&self) -> Vec<u8> {
        self.port
            .take(0)
            .expect("the used entry comes after the frame was sent")
    }
}

/// Twelve bytes of header and a frame to `to`, `len` bytes in all, recognisable by `seed`.
fn frame(header: [u8; 12], to: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = header.to_vec();
    bytes.extend(to);
    bytes.extend((bytes.len()..len).map(|i| (i as u8).wrapping_mul(31) ^ seed));
    bytes
}

const PLAIN: [u8; 12] = [0; 12];

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
fn control_commands_change_filter_and_address() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    let buffers = guest.post(8, 2048);
    let new_mac = [2, 7, 7, 7, 7, 7];
    let to_other = frame(PLAIN, [2, 9, 9, 9, 9, 9], 80, 1);
    // Act: promiscuous mode off, and another address
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    assert_eq!(guest.command(&[&[1, 1], &new_mac[..]].concat()), 0);
    guest.port.inject(0, &to_other).unwrap();
    guest.port.inject(0, &frame(PLAIN, OWN, 90, 2)).unwrap();
    guest
        .port
        .inject(0, &frame(PLAIN, new_mac, 100, 3))
        .unwrap();
    // Assert: only the last one arrives, and the configuration space follows
    assert_eq!(guest.driver.queues[RX].wait_used().1, 100);
    let got = guest.driver.ram.read(buffers[0], 100);
    assert!(got[12..] == frame(PLAIN, new_mac, 100, 3)[12..]);
    assert_eq!(guest.driver.frontend.get_config(0, 6), new_mac);
    // Act: promiscuous again
    assert_eq!(guest.command(&[0, 0, 1]), 0);
    guest.port.inject(0, &to_other).unwrap();
    assert_eq!(guest.driver.queues[RX].wait_used().1, 80);
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
fn control_commands_that_are_wrong_get_an_error() {
    let mut guest = Guest::new(1, &[], 128);
    for bad in [
        &[][..],
        &[0],
        &[9, 9, 9],
        &[4, 0, 1, 0],
        &[2, 0, 0xff, 0xff],
        &[0, 0, 1, 1],
    ] {
        assert_eq!(guest.command(bad), 1, "{bad:?}");
    }
    assert_eq!(guest.command(&vec![0; 70_000]), 1);
    // No room for the answer
    let command = guest.readable(&[0, 0, 1]);
    assert_eq!(guest.driver.queues[2].run(&[command]), 0);
    assert_eq!(guest.command(&[0, 0, 1]), 0, "and the queue lives on");
}

#[test]
fn pairs_are_attached_on_command() {
    // Arrange
    let mut guest = Guest::new(2, &[], 128);
    let events = guest.port.events();
    assert!(!events.iter().any(|e| matches!(e, Event::Attached(1, _))));
    // Act, assert
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    guest.port.wait_for(Event::Attached(1, true));
    assert_eq!(guest.command(&[4, 0, 3, 0]), 1, "there are two pairs");
    assert_eq!(guest.command(&[4, 0, 1, 0]), 0);
    assert_eq!(guest.port.events(), [Event::Attached(1, false)]);
}

#[test]
fn guest_offloads_reach_the_port() {
    let mut guest = Guest::new(1, &[], 128);
    let csum_only = 1_u64 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(
        guest.command(&[&[5, 0], &csum_only.to_le_bytes()[..]].concat()),
        0
    );
    assert_eq!(
        guest.port.events().last(),
        Some(&Event::Offloads(csum_only))
    );
}

#[test]
fn without_mq_the_control_queue_is_number_two() {
    let mut guest = Guest::new(2, &[VIRTIO_NET_F_MQ], 128);
    let command = guest.readable(&[0, 0, 1]);
    let answer = guest.driver.ram.place(&[0xee]);
    assert_eq!(
        guest.driver.queues[2].run(&[command, Buffer::writable(answer, 1)]),
        1
    );
    assert_eq!(guest.driver.ram.read(answer, 1), [0]);
    // Behind it there is nothing
    guest.driver.queues[4].wait_err();
}

#[test]
fn without_control_queue_every_pair_that_runs_is_attached() {
    let guest = Guest::new(2, &[VIRTIO_NET_F_CTRL_VQ], 128);
    let mut guest = guest;
    // Pair 1 receives: its worker has started
    let gpa = guest.driver.ram.alloc(2048, 16);
    guest.driver.queues[2]
        .add(&[Buffer::writable(gpa, 2048)])
        .unwrap();
    guest.driver.queues[2].kick_if_wanted();
    guest.port.inject(1, &frame(PLAIN, OWN, 77, 1)).unwrap();
    assert_eq!(guest.driver.queues[2].wait_used().1, 77);
    assert!(guest.port.events().contains(&Event::Attached(1, true)));
    // A frontend that disables the ring takes the pair out of use, as QEMU does
    guest.driver.frontend.set_enable(2, false);
    assert_eq!(guest.port.events(), [Event::Attached(1, false)]);
}

#[test]
fn a_frontend_may_choose_the_address() {
    let mut guest = Guest::new(1, &[], 128);
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    assert_eq!(guest.driver.frontend.set_config(0, &mac), 0);
    assert_eq!(guest.driver.frontend.get_config(0, 6), mac);
    assert_ne!(
        guest.driver.frontend.set_config(0, &[1, 0, 0, 0, 0, 1]),
        0,
        "multicast"
    );
    assert_ne!(
        guest.driver.frontend.set_config(6, &[0, 0]),
        0,
        "status is read-only"
    );
    assert_eq!(guest.driver.frontend.get_config(6, 6), [1, 0, 1, 0, 0, 0]);
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
