//! What a driver can get wrong in a split ring.

use crate::guest_memory::MemoryError;
use crate::inflight::InflightError;
use crate::log::LogError;

/// What the driver did wrong. None of these can come from a driver that follows the specification.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// avail.idx ran ahead of the ring.
    #[error("avail index {avail} is {ahead} ahead of {next} in a ring of {size}")]
    AvailJump {
        /// What the driver wrote.
        avail: u16,
        /// What we expected to take next.
        next: u16,
        /// The difference.
        ahead: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index outside of its table.
    #[error("descriptor index {index} is outside a table of {len}")]
    BadIndex {
        /// The index.
        index: u16,
        /// Length of the table.
        len: usize,
    },
    /// A loop, or a chain without end.
    #[error("descriptor chain at head {head} does not end after {limit} descriptors")]
    Endless {
        /// Head of the chain.
        head: u16,
        /// How many descriptors were followed.
        limit: usize,
    },
    /// An indirect table of a size that is 0 or no multiple of 16, or too long.
    #[error("indirect table of {len} bytes at gpa {gpa:#x}")]
    BadIndirect {
        /// Its address.
        gpa: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// An indirect descriptor inside an indirect table, with NEXT, or not negotiated.
    #[error("indirect descriptor where none is allowed, in the chain at head {head}")]
    UnexpectedIndirect {
        /// Head of the chain.
        head: u16,
    },
    /// A readable descriptor after a writable one.
    #[error("device-readable descriptor after a writable one, in the chain at head {head}")]
    BadOrder {
        /// Head of the chain.
        head: u16,
    },
    /// An address outside of guest memory.
    #[error("bad address in the ring")]
    Memory(#[from] MemoryError),
    /// What an earlier process left in the in-flight region cannot be.
    #[error("cannot continue the ring")]
    Inflight(#[from] InflightError),
    /// Writes that cannot be logged for a migration.
    #[error("cannot log a write")]
    Log(#[from] LogError),
}
