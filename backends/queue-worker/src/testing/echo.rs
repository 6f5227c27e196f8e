//! A small device to test the library itself with: what the driver writes comes back.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::device::protocol::{NET_MTU, RARP};
use crate::{
    Chain, Device, Interest, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring,
    SessionHandle,
};

/// Copies each request's readable bytes into its writable ones.
#[derive(Debug)]
pub struct Echo {
    num_queues: u16,
    config: Mutex<Vec<u8>>,
    handle: Mutex<Option<SessionHandle>>,
    /// How often new features were acknowledged.
    pub features_acked: AtomicU64,
    /// How often the device was reset.
    pub resets: AtomicU64,
    /// The last MTU the frontend set.
    pub mtu: AtomicU64,
    /// The last address the frontend wanted announced.
    pub rarp: Mutex<[u8; 6]>,
}

impl Echo {
    /// A device with this many queues.
    pub fn new(num_queues: u16) -> Arc<Echo> {
        Arc::new(Echo {
            num_queues,
            config: Mutex::new(b"echo device configuration".to_vec()),
            handle: Mutex::default(),
            features_acked: AtomicU64::default(),
            resets: AtomicU64::default(),
            mtu: AtomicU64::default(),
            rarp: Mutex::default(),
        })
    }

    /// Changes the configuration space and tells the frontend.
    pub fn change_config(&self, config: &[u8]) {
        *self.config.lock().unwrap() = config.to_vec();
        if let Some(handle) = &*self.handle.lock().unwrap() {
            handle.config_changed();
        }
    }
}

impl Device for Echo {
    const NAME: &'static str = "echo";
    type Worker = EchoWorker;

    fn features(&self) -> u64 {
        0
    }

    fn protocol_features(&self) -> u64 {
        NET_MTU | RARP
    }

    fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        let mut config = self.config.lock().unwrap();
        let offset = offset as usize;
        let place = config.get_mut(offset..offset.saturating_add(data.len()));
        place
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(data);
        Ok(())
    }

    fn features_acked(&self, _features: u64) {
        self.features_acked.fetch_add(1, Ordering::Relaxed);
    }

    fn new_worker(&self, start: &QueueStart) -> io::Result<EchoWorker> {
        Ok(EchoWorker {
            counters: Arc::clone(&start.counters),
            chain: Chain::new(),
        })
    }

    fn session_started(&self, handle: SessionHandle) {
        *self.handle.lock().unwrap() = Some(handle);
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.mtu.store(u64::from(mtu), Ordering::Relaxed);
        Ok(())
    }

    fn send_rarp(&self, mac: [u8; 6]) -> io::Result<()> {
        *self.rarp.lock().unwrap() = mac;
        Ok(())
    }
}

/// The worker of [`Echo`].
#[derive(Debug)]
pub struct EchoWorker {
    counters: Arc<QueueCounters>,
    chain: Chain,
}

impl QueueWorker for EchoWorker {
    fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
        while ring.pop_into(&mut self.chain)? {
            let (mut from, mut to) = (self.chain.reader(), self.chain.writer());
            let mut buf = [0; 512];
            let mut copied = 0;
            loop {
                let room = buf.len().min(to.remaining());
                let got = from.read(&mut buf[..room]);
                if got == 0 {
                    break;
                }
                copied += to.write(&buf[..got]);
            }
            ring.push_used(self.chain.head(), copied as u32)?;
            self.counters.requests.add(1);
        }
        Ok(Interest::KICK)
    }

    fn drain(&mut self, _ring: &mut Ring) -> Result<(), QueueError> {
        self.chain.release();
        Ok(())
    }
}
