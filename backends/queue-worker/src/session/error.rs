//! Why requests are refused, and why sessions end.

use std::io;

use super::memory::MAX_MEM_SLOTS;
use crate::guest_memory::MemoryError;
use crate::inflight::InflightError;
use crate::log::LogError;
use crate::protocol::connection::ConnectionError;
use crate::protocol::message::Request;

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A queue that the device does not have.
    #[error("no queue {0}")]
    NoQueue(u32),
    /// A ring size the device does not take.
    #[error("ring size {num} is not a power of two up to {max}")]
    BadRingSize {
        /// What was asked.
        num: u32,
        /// The device's limit.
        max: u16,
    },
    /// Feature bits that were not offered.
    #[error("features {0:#x} were not offered")]
    NotOffered(u64),
    /// Too many memory regions.
    #[error("more than {MAX_MEM_SLOTS} memory regions")]
    TooManyRegions,
    /// A ring index above 16 bits.
    #[error("ring index {0:#x} is above 16 bits")]
    BadBase(u32),
    /// The base of a ring that runs, or a new in-flight region while one does.
    #[error("queue {0} runs, which does not go together")]
    Running(u32),
    /// A kick without fd asks for busy polling of the ring.
    #[error("queue {0} has no kick fd, and polling of a ring is not supported")]
    NoKick(u32),
    /// A request that belongs to a protocol feature we do not offer.
    #[error("not supported")]
    Unsupported,
    /// Guest memory.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// The in-flight region.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The dirty log.
    #[error("cannot log writes")]
    Log(#[from] LogError),
    /// The device said no, or a system call failed.
    #[error("device")]
    Device(#[from] io::Error),
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection, or the framing of a message.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// A request was refused, and the frontend did not ask for an acknowledgement.
    #[error("cannot do {request:?} of the frontend")]
    Refused {
        /// The request.
        request: Box<Request>,
        /// Why not.
        source: Refusal,
    },
    /// The frontend truncated the file behind guest memory.
    #[error("the frontend took guest memory away while it was in use")]
    MemoryLost,
}
