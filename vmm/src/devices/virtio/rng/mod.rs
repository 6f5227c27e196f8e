//! virtio-rng: entropy for the guest from a file of the host (virtio 1.3, 5.4).
//!
//! One queue, no configuration, no features of its own. A worker thread takes each buffer of the guest,
//! fills it from the source, and gives it back; the transport's threads only start and stop it.
//!
//! A source that has nothing at the moment (a FIFO) keeps the guest waiting and nobody else.

mod device;
#[cfg(test)]
mod tests;
mod worker;

pub use self::device::{Error, Rng};
