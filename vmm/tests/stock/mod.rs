//! A vhost-user device built on `vhost-user-backend`, which shares no code with the frontend under test.

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
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::ring::{Buffer, Ring};

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
        let mut config = [0; 256];
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

/// A driver of the device: asks for one buffer after the other, and checks it.
pub(crate) struct Driver {
    ring: Ring,
    buffer: Buffer,
}

impl Driver {
    /// With a ring of its own, and the buffer behind it.
    pub(crate) fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        Self {
            ring: Ring::new(memory, base, size),
            buffer: Buffer {
                gpa: base + Ring::LEN,
                len: 64,
                writable: true,
            },
        }
    }

    /// What the transport would hand over for its ring.
    pub(crate) fn setup(&self, index: u16) -> QueueSetup {
        self.ring.setup(index)
    }

    /// Makes the buffer available and rings the doorbell.
    pub(crate) fn submit(&mut self) {
        let gpa = GuestAddress(self.buffer.gpa);
        self.ring.memory.write_slice(&[0; 64], gpa).unwrap();
        self.ring.submit(&[self.buffer]);
    }

    /// Waits until it came back, and checks it.
    pub(crate) fn complete(&mut self) {
        assert_eq!(self.ring.complete(), self.buffer.len);
        let mut bytes = [0; 64];
        let gpa = GuestAddress(self.buffer.gpa);
        self.ring.memory.read_slice(&mut bytes, gpa).unwrap();
        assert_eq!(bytes, [PATTERN; 64]);
    }
}
