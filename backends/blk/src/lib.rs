//! `berth-blk`: a disk as a vhost-user device process.
//!
//! ```text
//!   frontend ◀─ vhost-user ─▶ queue-worker ─▶ BlkWorker, one thread a queue
//!                                              │ request: parse, check
//!   guest memory ◀──────── io_uring ───────────┤ engine: readv / writev / fsync / fallocate
//!                              │               ▼
//!                              └────────▶ image: raw file or block device, locked
//! ```
//!
//! Data moves between the image and guest memory without a copy of ours. A library beside the
//! binary so that tests, fuzz targets and benches can link it. Start reading at [`device`], then
//! [`worker`]. Features and limits: docs/devices/blk.md. Spec: virtio 1.3, 5.2.

pub mod args;
pub mod device;
pub mod engine;
pub mod image;
pub mod request;
mod resize;
mod task;
pub mod worker;

#[cfg(test)]
mod tests;

pub use device::{BlkConfig, BlkDevice};
