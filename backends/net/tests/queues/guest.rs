//! A guest on the fake driver, and the device under test on a port made of sockets.

use std::sync::Arc;

use berth_net::device::Identity;
use berth_net::mac::Mac;
use berth_net::net_device::NetDevice;
use berth_net::port::testing::SocketPort;
use berth_net::settings::Settings;
use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
use berth_queue_worker::{Device, Metrics};

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A guest on a device on a port.
pub(crate) struct Guest {
    pub(crate) port: Arc<SocketPort>,
    pub(crate) metrics: Metrics,
    pub(crate) driver: FakeDriver,
}

impl Guest {
    /// With `pairs` pairs, without the features `without`, on a port that is full at times.
    pub(crate) fn new(pairs: u16, without: &[u32], queue_size: u16) -> Self {
        let port = SocketPort::new(pairs).unwrap();
        Self::on(port, settings(pairs), without, queue_size)
    }

    /// The same on a port that says it is never full.
    pub(crate) fn on_roomy(without: &[u32], queue_size: u16) -> Self {
        let port = SocketPort::roomy(1).unwrap();
        Self::on(port, settings(1), without, queue_size)
    }

    /// On this port, with these settings.
    pub(crate) fn on(
        port: SocketPort,
        settings: Settings,
        without: &[u32],
        queue_size: u16,
    ) -> Self {
        let port = Arc::new(port);
        let device = NetDevice::new(settings, port.clone());
        let metrics = Metrics::new(NetDevice::NAME, device.num_queues());
        let features = without
            .iter()
            .fold(u64::MAX, |bits, bit| bits & !(1 << bit));
        let setup = Setup {
            num_queues: settings.identity.num_queues(),
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
    pub(crate) fn post(&mut self, count: usize, len: u32) -> Vec<u64> {
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
    pub(crate) fn offer(&mut self, bytes: &[u8], cuts: &[usize]) {
        self.offer_quietly(bytes, cuts);
        self.driver.queues[TX].kick_if_wanted();
    }

    /// The same without a kick.
    pub(crate) fn offer_quietly(&mut self, bytes: &[u8], cuts: &[usize]) {
        let mut rest = bytes;
        let mut buffers = Vec::new();
        for &cut in cuts {
            let (piece, tail) = rest.split_at(cut);
            buffers.push(self.readable(piece));
            rest = tail;
        }
        buffers.push(self.readable(rest));
        self.driver.queues[TX].add(&buffers).unwrap();
    }

    pub(crate) fn readable(&self, bytes: &[u8]) -> Buffer {
        Buffer::readable(self.driver.ram.place(bytes), bytes.len() as u32)
    }

    /// Sends a command; the answer.
    pub(crate) fn command(&mut self, bytes: &[u8]) -> u8 {
        let control = self.driver.queues.len() - 1;
        let command = self.readable(bytes);
        let answer = self.driver.ram.place(&[0xee]);
        let len = self.driver.queues[control].run(&[command, Buffer::writable(answer, 1)]);
        assert_eq!(len, 1);
        self.driver.ram.read(answer, 1)[0]
    }

    pub(crate) fn dropped(&self, queue: u16) -> u64 {
        self.metrics.queue(queue).unwrap().dropped.get()
    }

    /// Takes frames that were sent until one has come.
    pub(crate) fn sent(&self) -> Vec<u8> {
        self.port
            .take(0)
            .expect("the used entry comes after the frame was sent")
    }
}

/// A card with an address.
pub(crate) fn settings(pairs: u16) -> Settings {
    Settings::from(Identity {
        mac: Some(Mac(OWN)),
        mtu: None,
        pairs,
    })
}

/// Twelve bytes of header and a frame to `to`, `len` bytes in all, recognisable by `seed`.
pub(crate) fn frame(header: [u8; 12], to: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = header.to_vec();
    bytes.extend(to);
    bytes.extend((bytes.len()..len).map(|i| (i as u8).wrapping_mul(31) ^ seed));
    bytes
}

/// A header that asks for nothing.
pub(crate) const PLAIN: [u8; 12] = [0; 12];
