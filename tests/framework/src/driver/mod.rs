//! A driver and its frontend in one: guest memory, rings and a vhost-user connection of our own.
//!
//! ```text
//!   Memory (memfd) ◀── Ring: descriptors, avail, used, kick, call; an account of every head
//!        │ SET_MEM_TABLE
//!   Link: vhost::Frontend ── socket ──▶ the daemon; the inflight region outlives the connection
//! ```
//!
//! It shares nothing with the daemons but what the crates `vhost` and `vm-memory` say about the protocol and
//! memory, so that neither side's mistake is also the other's. The rings are by hand: the crate
//! `virtio-driver` keeps its transport trait to itself (`Iova` and `EventFd::new` are private) and asserts
//! where an account is wanted.
//!
//! [`Link::dial`] may be called again and again for the same rings, as a VMM does when a backend has died. It
//! goes on where the used ring ends, hands the inflight region back, and neither kicks nor looks at the rings
//! by itself: what is lost by the backend then stays lost, and is seen.
//!
//! virtio 1.3, 2.7 (split virtqueues); vhost-user, "Inflight I/O tracking".

mod link;
mod memory;
mod ring;

pub use link::{Inflight, Link, Wanted};
pub use memory::Memory;
pub use ring::{Fault, Piece, Ring, Used};
pub use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// Feature bits that a driver here uses, by their numbers.
pub mod features {
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_RING_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
}
