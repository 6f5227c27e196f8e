//! A guest's network driver on the fake driver, and frames to send through it.

use std::collections::HashMap;
use std::path::Path;

use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};

/// Length of the guest's virtio-net header.
pub(crate) const HDR: usize = 12;
/// Length of an Ethernet header.
pub(crate) const ETH: usize = 14;
const BUFFER_LEN: u32 = 1536;

/// The driver of a device with `pairs` pairs and a control queue.
pub(crate) struct Guest {
    pub(crate) driver: FakeDriver,
    pairs: u16,
    /// Receive buffers by queue and head.
    posted: HashMap<(u16, u16), u64>,
}

impl Guest {
    /// Connects and starts all queues, with every feature but `without`.
    pub(crate) fn connect(socket: &Path, pairs: u16, without: &[u32]) -> Self {
        let features = without
            .iter()
            .fold(u64::MAX, |bits, bit| bits & !(1 << bit));
        let setup = Setup {
            num_queues: 2 * pairs + 1,
            queue_size: 256,
            features,
            ram_size: 64 << 20,
            inflight: true,
            ..Setup::default()
        };
        let driver = FakeDriver::connect(socket, setup);
        Self {
            driver,
            pairs,
            posted: HashMap::new(),
        }
    }

    /// Gives the device receive buffers.
    pub(crate) fn post(&mut self, pair: u16, count: usize) {
        let index = 2 * pair;
        let queue = &mut self.driver.queues[usize::from(index)];
        for _ in 0..count {
            let gpa = self.driver.ram.alloc(BUFFER_LEN.into(), 16);
            let head = queue
                .add(&[Buffer::writable(gpa, BUFFER_LEN)])
                .expect("ring has room");
            self.posted.insert((index, head), gpa);
        }
        queue.kick_if_wanted();
    }

    /// Waits for a frame, header included, on `pair`.
    pub(crate) fn receive(&mut self, pair: u16) -> Vec<u8> {
        let index = 2 * pair;
        let mut bytes = self.next_buffer(index);
        let num_buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..num_buffers {
            let more = self.next_buffer(index);
            bytes.extend(more);
        }
        bytes
    }

    /// Whether a frame, or a part of one, has come already.
    pub(crate) fn has_received(&mut self, pair: u16) -> bool {
        self.driver.queues[usize::from(2 * pair)]
            .poll_used()
            .is_some()
    }

    fn next_buffer(&mut self, index: u16) -> Vec<u8> {
        let (head, len) = self.driver.queues[usize::from(index)].wait_used();
        let gpa = self
            .posted
            .remove(&(index, head))
            .expect("a head that was posted");
        self.driver.ram.read(gpa, len as usize)
    }

    /// Sends header and frame on `pair`, and waits until the device is done with it.
    pub(crate) fn send(&mut self, pair: u16, bytes: &[u8]) {
        let (header, frame) = bytes.split_at(HDR);
        let buffers = [self.readable(header), self.readable(frame)];
        self.driver.queues[usize::from(2 * pair + 1)].run(&buffers);
    }

    /// Sends a command; whether it was done.
    pub(crate) fn command(&mut self, bytes: &[u8]) -> bool {
        let command = self.readable(bytes);
        let answer = self.driver.ram.place(&[0xee]);
        let control = usize::from(2 * self.pairs);
        self.driver.queues[control].run(&[command, Buffer::writable(answer, 1)]);
        self.driver.ram.read(answer, 1) == [0]
    }

    fn readable(&self, bytes: &[u8]) -> Buffer {
        Buffer::readable(self.driver.ram.place(bytes), bytes.len() as u32)
    }
}

/// An Ethernet frame with recognisable content, `len` bytes in all.
pub(crate) fn frame(to: [u8; 6], from: [u8; 6], ether_type: u16, len: usize) -> Vec<u8> {
    let mut bytes = [&to[..], &from[..], &ether_type.to_be_bytes()].concat();
    bytes.extend((bytes.len()..len).map(|i| (i as u8).wrapping_mul(31)));
    bytes
}

/// A TCP segment over IPv4 in an Ethernet frame, `len` bytes in all, with the checksums that
/// offloading leaves: IP's is right, TCP's is that of the pseudo header.
pub(crate) fn tcp(to: [u8; 6], from: [u8; 6], ports: (u16, u16), len: usize) -> Vec<u8> {
    let mut bytes = frame(to, from, 0x0800, len);
    let ip_len = (len - ETH) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(ip_len.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 8, 1, 10, 9, 8, 2]);
    let sum = !ones_complement_sum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut tcp = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
    let pseudo = [&ip[12..20], &[0, 6], &(ip_len - 20).to_be_bytes()].concat();
    tcp[16..18].copy_from_slice(&ones_complement_sum(&pseudo).to_be_bytes());
    bytes[ETH..ETH + 20].copy_from_slice(&ip);
    bytes[ETH + 20..ETH + 40].copy_from_slice(&tcp);
    bytes
}

fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The first ten bytes of the header of a TCP segment over IPv4 to be cut into pieces of `size`.
pub(crate) fn tso4(size: u16) -> [u8; 10] {
    let mut header = [1, 1, 54, 0, 0, 0, 34, 0, 16, 0];
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header
}
