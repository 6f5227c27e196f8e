//! `berth-net`: a vhost-user network device over a tap.
//!
//! ```text
//!   args ─▶ config ─▶ port::tap (attached)  ─▶ net_device ─▶ queue-worker's run loop
//!
//!   guest ─▶ tx.rs ──header.rs──▶ port ─▶ tap        one thread a queue, no lock between them
//!   guest ◀─ rx.rs ◀─filter.rs─── port ◀─ tap
//!   guest ─▶ ctrl_queue.rs ──ctrl.rs──▶ state.rs ─▶ filter, offloads, attached queues
//! ```
//!
//! A library so that tests, fuzz targets and benchmarks can link the parts. Spec: virtio 1.3, 5.1.

pub mod args;
pub mod config;
pub mod ctrl;
pub mod ctrl_queue;
pub mod device;
pub mod filter;
pub mod header;
pub mod mac;
pub mod net_device;
pub mod port;
pub mod rarp;
pub mod rx;
pub mod settings;
pub mod state;
pub mod testing;
pub mod tx;
