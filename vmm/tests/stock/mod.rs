//! A vhost-user device built on `vhost-user-backend`, which shares no code with the frontend under test,
//! and the driver's side of a split ring.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};

use berth_vmm::devices::virtio::device::QueueSetup;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Backend, Listener};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT,
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Features of the device: VERSION_1, INDIRECT_DESC, PROTOCOL_FEATURES, FLUSH, CONFIG_WCE, MQ.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 30 | 1 << 9 | 1 << 11 | 1 << 12;
/// Queues of the device.
pub(crate) const QUEUES: usize = 4;
/// What the device fills buffers with.
pub(crate) const PATTERN: u8 = 0xb7;

/// What a test sees of the device.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) acked: Mutex<u64>,
    pub(crate) written: Mutex<Vec<(u32, Vec<u8>)>>,
    pub(crate) requests: AtomicUsize,
}

/// Fills each buffer that the driver gives it.
struct Filler {
    seen: Arc<Seen>,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    protocol: VhostUserProtocolFeatures,
}

impl VhostUserBackendMut for Filler {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn acked_features(&mut self, features: u64) {
        *self.seen.acked.lock().unwrap() = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; 60];
        config[..8].copy_from_slice(&2048_u64.to_le_bytes());
        config[34..36].copy_from_slice(&(QUEUES as u16).to_le_bytes());
        config[offset as usize..][..size as usize].to_vec()
    }

    fn set_config(&mut self, offset: u32, data: &[u8]) -> io::Result<()> {
        let written = (offset, data.to_vec());
        self.seen.written.lock().unwrap().push(written);
        Ok(())
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {}

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(
        &mut self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.as_ref().expect("memory before kicks").memory();
        let vring = &vrings[usize::from(device_event)];
        let mut any = false;
        loop {
            let chain = vring
                .get_mut()
                .get_queue_mut()
                .pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let mut len = 0;
            for desc in chain.writable() {
                let bytes = vec![PATTERN; desc.len() as usize];
                memory
                    .write_slice(&bytes, desc.addr())
                    .map_err(io::Error::other)?;
                len += desc.len();
            }
            vring.add_used(head, len).map_err(io::Error::other)?;
            self.seen.requests.fetch_add(1, Ordering::SeqCst);
            any = true;
        }
        if any {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

/// The device as a daemon: one connection after another until it is dropped.
pub(crate) struct Stock {
    pub(crate) seen: Arc<Seen>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
    connections: mpsc::Receiver<ShutdownHandle>,
    closing: Arc<AtomicBool>,
}

impl Stock {
    /// Listens, with these protocol features besides REPLY_ACK.
    pub(crate) fn listen(path: &Path, protocol: VhostUserProtocolFeatures) -> Self {
        let seen = Arc::<Seen>::default();
        let closing = Arc::<AtomicBool>::default();
        let mut listener = Listener::new(path, true).unwrap();
        let (sender, connections) = mpsc::channel();
        let (thread_seen, thread_closing) = (Arc::clone(&seen), Arc::clone(&closing));
        let thread = thread::spawn(move || {
            while !thread_closing.load(Ordering::SeqCst) {
                let filler = Filler {
                    seen: Arc::clone(&thread_seen),
                    memory: None,
                    protocol,
                };
                let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
                let filler = Arc::new(Mutex::new(filler));
                let mut daemon = VhostUserDaemon::new("stock".to_owned(), filler, memory).unwrap();
                daemon.start(&mut listener).unwrap();
                let _ = sender.send(daemon.shutdown_handle().unwrap());
                // How the frontend leaves is not the device's business.
                let _ = daemon.wait();
            }
        });
        Self {
            seen,
            path: path.to_owned(),
            thread: Some(thread),
            connections,
            closing,
        }
    }

    /// Dies: the connection ends and nobody listens any more.
    pub(crate) fn die(mut self) -> Arc<Seen> {
        self.end()
    }

    fn end(&mut self) -> Arc<Seen> {
        self.closing.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            while !thread.is_finished() {
                // It serves a connection, or waits for one.
                for connection in self.connections.try_iter() {
                    connection.shutdown();
                }
                drop(UnixStream::connect(&self.path));
                thread::yield_now();
            }
            thread.join().unwrap();
        }
        Arc::clone(&self.seen)
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.end();
    }
}

/// The driver's side of one ring. Everything it needs lies in 64 KiB from `base`.
pub(crate) struct Driver {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    avail: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
}

impl Driver {
    const AVAIL: u64 = 0x4000;
    const USED: u64 = 0x6000;
    const BUFFERS: u64 = 0x8000;
    const BUFFER: u32 = 64;

    /// An empty ring.
    pub(crate) fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        memory
            .write_slice(&vec![0; 0x1_0000], GuestAddress(base))
            .unwrap();
        Self {
            memory: memory.clone(),
            base,
            size,
            avail: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// What the transport would hand over for it.
    pub(crate) fn setup(&self, index: u16) -> QueueSetup {
        QueueSetup {
            index,
            size: self.size,
            desc: self.base,
            avail: self.base + Self::AVAIL,
            used: self.base + Self::USED,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
        }
    }

    fn buffer(&self, slot: u16) -> GuestAddress {
        GuestAddress(self.base + Self::BUFFERS + u64::from(slot) * u64::from(Self::BUFFER))
    }

    /// Makes a buffer available and rings the doorbell.
    pub(crate) fn submit(&mut self) {
        let slot = self.avail % self.size;
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&self.buffer(slot).0.to_le_bytes());
        desc[8..12].copy_from_slice(&Self::BUFFER.to_le_bytes());
        desc[12..14].copy_from_slice(&2_u16.to_le_bytes());
        let at = |offset: u64| GuestAddress(self.base + offset);
        let memory = &self.memory;
        memory
            .write_slice(&[0; Self::BUFFER as usize], self.buffer(slot))
            .unwrap();
        memory.write_slice(&desc, at(16 * u64::from(slot))).unwrap();
        memory
            .write_obj(slot, at(Self::AVAIL + 4 + 2 * u64::from(slot)))
            .unwrap();
        self.avail = self.avail.wrapping_add(1);
        // Release: the device that sees the index sees the descriptor too.
        memory
            .store(self.avail, at(Self::AVAIL + 2), Ordering::Release)
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// Waits until all buffers came back, and checks them.
    pub(crate) fn complete(&mut self) {
        while self.used != self.avail {
            let index = GuestAddress(self.base + Self::USED + 2);
            let used: u16 = self.memory.load(index, Ordering::Acquire).unwrap();
            if used == self.used {
                wait(&self.call, "an interrupt");
                continue;
            }
            let slot = self.used % self.size;
            let entry = GuestAddress(self.base + Self::USED + 4 + 8 * u64::from(slot));
            let [id, len]: [u32; 2] = self.memory.read_obj(entry).unwrap();
            assert_eq!((id, len), (u32::from(slot), Self::BUFFER));
            let mut bytes = [0; Self::BUFFER as usize];
            self.memory
                .read_slice(&mut bytes, self.buffer(slot))
                .unwrap();
            assert_eq!(bytes, [PATTERN; Self::BUFFER as usize]);
            self.used = self.used.wrapping_add(1);
        }
    }
}

/// Waits for an event; a test that waits long has failed.
pub(crate) fn wait(event: &EventFd, what: &str) {
    use std::os::fd::AsRawFd;
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
        .unwrap();
    let ready = epoll.wait(20_000, &mut [EpollEvent::default()]).unwrap();
    assert_eq!(ready, 1, "no {what} in 20 s");
    event.read().unwrap();
}
