//! All that a vhost-user device process needs except the device.
pub mod chain;
pub mod daemon;
pub mod device;
pub mod features;
pub mod guest_memory;
pub mod metrics;
pub mod session;
pub mod virtqueue;

pub use chain::{Chain, Cursor};
pub use daemon::{DaemonArgs, DaemonError, fail, init_logging, run};
pub use device::{Device, Interest, QueueError, QueueStart, QueueWorker, Ready, Source};
pub use guest_memory::{GuestMemory, GuestSlice, MemoryError};
pub use metrics::{Metrics, QueueCounters};
pub use session::SessionHandle;
pub use virtqueue::{Ring, RingError, RingLayout};
