//! The other side, for unit tests, fuzz targets and benches: a driver and a vhost-user frontend.
//!
//! ```text
//!   GuestRam (memfd) ◀── DriverQueue: descriptors, avail, used, kick, call, err
//!        │ SET_MEM_TABLE
//!   FakeFrontend ── socketpair ── Session under test
//!   FakeDriver = all three, negotiated and running
//! ```
//!
//! Everything panics with a message where the other side does not behave: this is test code.
//! Waits are for events with a deadline ([`TIMEOUT`]), never for time to pass.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

mod driver;
mod echo;
mod frontend;
mod log;
mod ram;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use driver::{Buffer, DriverQueue};
pub use echo::{Echo, EchoWorker};
pub use frontend::{FakeFrontend, Inflight};
pub use log::LogWatch;
pub use ram::GuestRam;

use crate::daemon::serve_connection;
use crate::device::Device;
use crate::features;
use crate::metrics::Metrics;
use crate::session::{SessionError, SessionOptions};

/// How long anything may take before a test fails.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// What a [`FakeDriver`] sets up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Queues to start.
    pub num_queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Feature bits that the driver wants, of those offered. PROTOCOL_FEATURES is among them or
    /// not: without it no protocol feature is negotiated and rings are enabled from the start.
    pub features: u64,
    /// Bytes of guest memory.
    pub ram_size: u64,
    /// Have the backend note requests in flight where they outlive it.
    pub inflight: bool,
    /// How the session is run, where it runs in this process.
    pub options: SessionOptions,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            num_queues: 1,
            queue_size: 128,
            features: u64::MAX,
            ram_size: 16 << 20,
            inflight: false,
            options: SessionOptions::default(),
        }
    }
}

/// A driver with its frontend, connected to a session and running.
#[derive(Debug)]
pub struct FakeDriver {
    /// The control channel.
    pub frontend: FakeFrontend,
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// The queues, started and enabled.
    pub queues: Vec<DriverQueue>,
    /// Features that were negotiated.
    pub features: u64,
    /// The region of requests in flight, if there is one.
    pub inflight: Option<Inflight>,
    /// The session's thread, where it runs in this process.
    thread: Option<JoinHandle<SessionError>>,
}

impl FakeDriver {
    /// Runs a session for `device` on a thread of this process and drives it.
    pub fn start<D: Device>(device: Arc<D>, metrics: &Metrics, setup: Setup) -> FakeDriver {
        let (frontend, thread) = serve_with(device, metrics, setup.options);
        let mut driver = FakeDriver::attach(frontend, setup);
        driver.thread = Some(thread);
        driver
    }

    /// Drives the daemon that listens on `path`.
    pub fn connect(path: &Path, setup: Setup) -> FakeDriver {
        let stream = UnixStream::connect(path).expect("connect to the daemon");
        FakeDriver::attach(FakeFrontend::new(stream), setup)
    }

    /// Negotiates and starts all queues over `frontend`.
    pub fn attach(mut frontend: FakeFrontend, setup: Setup) -> FakeDriver {
        let features = frontend.negotiate(setup.features);
        let ram = Arc::new(GuestRam::new(0x1_0000_0000, setup.ram_size));
        frontend.set_mem_table(&[&ram]);
        let queues: Vec<_> = (0..setup.num_queues)
            .map(|index| DriverQueue::new(&ram, index, setup.queue_size, features))
            .collect();
        let inflight = setup.inflight.then(|| {
            let region = frontend.get_inflight(setup.num_queues, setup.queue_size);
            assert_eq!(frontend.set_inflight(&region), 0, "region was refused");
            region
        });
        for queue in &queues {
            frontend.start_queue(queue, 0, features);
        }
        FakeDriver {
            frontend,
            ram,
            queues,
            features,
            inflight,
            thread: None,
        }
    }

    /// Goes on over `frontend`, with another backend than before: memory, the region and the rings
    /// as they are, and a kick for what may have been missed.
    pub fn resume(&mut self, mut frontend: FakeFrontend) {
        let features = frontend.negotiate(self.features);
        assert_eq!(features, self.features, "the successor offers less");
        frontend.set_mem_table(&[&self.ram]);
        if let Some(region) = &self.inflight {
            assert_eq!(frontend.set_inflight(region), 0, "region was refused");
        }
        for queue in &mut self.queues {
            frontend.start_queue(queue, queue.used_idx(), features);
            queue.kick();
        }
        self.frontend = frontend;
    }

    /// The same, with the daemon that listens on `path` now.
    pub fn reconnect(&mut self, path: &Path) {
        let stream = UnixStream::connect(path).expect("connect to the daemon");
        self.resume(FakeFrontend::new(stream));
    }

    /// Whether `bit` was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Disconnects; says why the session ended, where it ran in this process.
    pub fn finish(mut self) -> Option<SessionError> {
        self.frontend.disconnect();
        let thread = self.thread.take()?;
        Some(thread.join().expect("session thread panicked"))
    }
}

/// A session for `device` on a thread of its own, and the frontend's end of its socket.
pub fn serve<D: Device>(
    device: Arc<D>,
    metrics: &Metrics,
) -> (FakeFrontend, JoinHandle<SessionError>) {
    serve_with(device, metrics, SessionOptions::default())
}

fn serve_with<D: Device>(
    device: Arc<D>,
    metrics: &Metrics,
    options: SessionOptions,
) -> (FakeFrontend, JoinHandle<SessionError>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let metrics = metrics.clone();
    let thread = std::thread::Builder::new()
        .name("session".to_owned())
        .spawn(move || serve_connection(device, metrics, theirs, options).unwrap())
        .unwrap();
    (FakeFrontend::new(ours), thread)
}

/// Feature bits of [`Setup::features`] without PROTOCOL_FEATURES.
pub const NO_PROTOCOL_FEATURES: u64 = !(1 << features::PROTOCOL_FEATURES);
