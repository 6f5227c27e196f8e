//! All that a vhost-user device process needs except the device.
//!
//! ```text
//!  frontend (VMM, QEMU, DPDK, …)            this process
//!  ┌───────────────┐ vhost-user socket  ┌───────────────────────────────────────────────┐
//!  │ control       │◀──────────────────▶│ control thread: protocol ─▶ session ─▶ vring   │
//!  │               │   features, fds    │                               │ commands      │
//!  │ guest memory ═╪═══ mapped here ═══▶│ one thread a queue, "NAME-qN": ▼               │
//!  │ kick ─────────┼───────────────────▶│   worker: Ring ─▶ Chain ─▶ your QueueWorker    │
//!  │ call ◀────────┼────────────────────│           used entries, one signal a batch     │
//!  └───────────────┘                    │ "metrics" thread: counters as Prometheus text  │
//!                                       └───────────────────────────────────────────────┘
//! ```
//!
//! A device says what it is ([`Device`]) and handles one queue at a time ([`QueueWorker`]);
//! everything else is here: the vhost-user control channel with our own codec (docs/adr/0001),
//! mapping of guest memory, the split ring with EVENT_IDX and indirect descriptors, threads,
//! notification suppression, sockets, signals, counters, and a fake driver for tests.
//!
//! Invariants: one thread owns a ring, and no lock is taken on its data path. Guest memory is
//! never a Rust reference. What a guest or a frontend gets wrong stops that queue or ends that
//! session, with one rate-limited line; the process lives on.
//!
//! Spec: vhost-user (QEMU docs/interop/vhost-user.rst); virtio 1.3, 2.7 "Split Virtqueues".
//!
//! # A complete tiny device
//!
//! Every request's readable bytes come back upper-cased in its writable ones.
//!
//! ```
//! use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
//! use berth_queue_worker::*;
//! use std::sync::Arc;
//!
//! struct Shout;
//!
//! impl Device for Shout {
//!     const NAME: &'static str = "shout";
//!     type Worker = Shouter;
//!     fn features(&self) -> u64 {
//!         0
//!     }
//!     fn num_queues(&self) -> u16 {
//!         1
//!     }
//!     fn config(&self) -> Vec<u8> {
//!         b"shout v1".to_vec()
//!     }
//!     fn new_worker(&self, start: &QueueStart) -> std::io::Result<Shouter> {
//!         Ok(Shouter { counters: Arc::clone(&start.counters), chain: Chain::new() })
//!     }
//! }
//!
//! struct Shouter {
//!     counters: Arc<QueueCounters>,
//!     chain: Chain,
//! }
//!
//! impl QueueWorker for Shouter {
//!     fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
//!         while ring.pop_into(&mut self.chain)? {
//!             let mut text = vec![0; self.chain.readable_len().min(4096)];
//!             self.chain.reader().read(&mut text);
//!             text.make_ascii_uppercase();
//!             let written = self.chain.writer().write(&text);
//!             ring.push_used(self.chain.head(), written as u32)?;
//!             self.counters.requests.add(1);
//!         }
//!         Ok(Interest::KICK)
//!     }
//! }
//!
//! // A daemon's main would now call `run(&args, Shout)`. Here the fake driver is its frontend:
//! let metrics = Metrics::new(Shout::NAME, 1);
//! let mut driver = FakeDriver::start(Arc::new(Shout), &metrics, Setup::default());
//! assert_eq!(driver.frontend.get_config(0, 5), b"shout");
//!
//! let (said, answer) = (driver.ram.place(b"ahoy"), driver.ram.alloc(4, 16));
//! driver.queues[0].run(&[Buffer::readable(said, 4), Buffer::writable(answer, 4)]);
//! assert_eq!(driver.ram.read(answer, 4), b"AHOY");
//! driver.finish();
//! assert_eq!(metrics.queue(0).unwrap().requests.get(), 1);
//! ```

pub mod chain;
mod command;
pub mod control_socket;
pub mod daemon;
pub mod device;
pub mod endpoint;
pub mod features;
pub mod guest_memory;
pub mod inflight;
pub mod latency;
pub mod log;
pub mod metrics;
pub mod notify;
mod polling;
pub mod protocol;
pub mod rate_limit;
pub mod sandbox;
pub mod saved_state;
pub mod session;
mod sigbus;
mod signals;
mod sys;
pub mod testing;
pub mod uring;
pub mod usage;
pub mod virtqueue;
mod vring;
mod worker;

pub use chain::{Chain, Cursor};
pub use daemon::{DaemonArgs, DaemonError, fail, init_logging, run};
pub use device::{Device, Interest, Poll, QueueError, QueueStart, QueueWorker, Ready, Source};
pub use guest_memory::{GuestMemory, GuestSlice, MemoryError};
pub use metrics::{Metrics, QueueCounters};
pub use rate_limit::{RateLimit, RateLimiter, Throttle};
pub use sandbox::Syscall;
pub use session::{SessionHandle, SessionOptions};
pub use uring::IoRing;
pub use usage::parse_args;
pub use virtqueue::{Ring, RingError, RingLayout};
