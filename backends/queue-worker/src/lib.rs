//! All that a vhost-user device process needs except the device.
pub mod chain;
mod command;
pub mod daemon;
pub mod device;
pub mod endpoint;
pub mod features;
pub mod guest_memory;
pub mod metrics;
pub mod notify;
pub mod protocol;
pub mod session;
mod sys;
pub mod virtqueue;
mod vring;
mod worker;

pub use chain::{Chain, Cursor};
pub use daemon::{DaemonArgs, DaemonError, fail, init_logging, run};
pub use device::{Device, Interest, QueueError, QueueStart, QueueWorker, Ready, Source};
pub use guest_memory::{GuestMemory, GuestSlice, MemoryError};
pub use metrics::{Metrics, QueueCounters};
pub use session::SessionHandle;
pub use virtqueue::{Ring, RingError, RingLayout};
