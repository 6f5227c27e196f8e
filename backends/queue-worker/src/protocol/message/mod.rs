//! vhost-user messages as bytes: parsing of requests, building of replies. Pure, no I/O.
//!
//! ```text
//!   0        4        8        12
//!   | request | flags | size    | payload, `size` bytes | and up to 32 fds beside it
//!               │ bits 0-1 version (1), bit 2 reply, bit 3 need_reply
//! ```
//!
//! Every byte is the frontend's. A message that is malformed (wrong version, a payload too short,
//! fds missing or too many) is a [`CodecError`] and ends the session; whether a well-formed
//! request makes sense is the session's business. Numbers are in machine byte order.
//! Spec: vhost-user, "Message Specification" and "Front-end message types".
#![forbid(unsafe_code)]

mod build;
mod parse;
#[cfg(test)]
mod tests;

pub use vhost::vhost_user::message::{BackendReq, FrontendReq};

pub use build::{
    backend_request, frontend_request, is_reply, reply_config, reply_inflight, reply_u64,
    reply_vring_base,
};

use crate::guest_memory::RegionInfo;

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 12;
/// Largest payload accepted. The largest that any request needs is a memory table.
pub const MAX_PAYLOAD: usize = 4096;
/// Most fds accepted with one message.
pub const MAX_FDS: usize = 32;

const VERSION: u32 = 1;
const FLAG_VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// A message that does not follow the protocol's framing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// Wrong version, reply bit, or reserved bits.
    #[error("message {request} has flags {flags:#x}, expected version 1 and no reply")]
    BadFlags {
        /// Request number.
        request: u32,
        /// The flags.
        flags: u32,
    },
    /// More payload than any request has.
    #[error("message {request} claims {size} bytes of payload")]
    TooLarge {
        /// Request number.
        request: u32,
        /// Claimed size.
        size: u32,
    },
    /// A request number that the specification does not know.
    #[error("unknown request {0}")]
    UnknownRequest(u32),
    /// The payload ends early.
    #[error("{request:?} with {size} bytes of payload, expected at least {expected}")]
    ShortPayload {
        /// The request.
        request: FrontendReq,
        /// Bytes there.
        size: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// A payload that contradicts itself.
    #[error("{request:?} with a payload that contradicts itself")]
    BadPayload {
        /// The request.
        request: FrontendReq,
    },
    /// Fds missing or too many.
    #[error("{request:?} with {got} file descriptors, expected {expected}")]
    BadFds {
        /// The request.
        request: FrontendReq,
        /// How many came.
        got: usize,
        /// How many should have.
        expected: usize,
    },
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number, possibly unknown.
    pub request: u32,
    /// Flags, checked.
    flags: u32,
    /// Payload bytes that follow, at most [`MAX_PAYLOAD`].
    pub size: usize,
}

impl Header {
    /// Checks version, flags and size of a header.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Header, CodecError> {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        if flags & !FLAG_NEED_REPLY != VERSION {
            return Err(CodecError::BadFlags { request, flags });
        }
        match usize::try_from(size) {
            Ok(len) if len <= MAX_PAYLOAD => Ok(Header {
                request,
                flags,
                size: len,
            }),
            _ => Err(CodecError::TooLarge { request, size }),
        }
    }

    /// Whether the frontend waits for an acknowledgement.
    pub fn need_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// The addresses of SET_VRING_ADDR, as the frontend sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringAddr {
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
}

/// Where the in-flight region lies, and for how many queues of which size it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightInfo {
    /// Bytes of it; not said by a frontend that asks for one.
    pub map_size: u64,
    /// Where it begins in its file.
    pub map_offset: u64,
    /// Queues.
    pub num_queues: u16,
    /// Entries of the largest of their rings.
    pub queue_size: u16,
}

impl InflightInfo {
    /// The payload: a C struct, with padding at its end.
    pub fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.map_size.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.map_offset.to_ne_bytes());
        bytes[16..18].copy_from_slice(&self.num_queues.to_ne_bytes());
        bytes[18..20].copy_from_slice(&self.queue_size.to_ne_bytes());
        bytes
    }

    /// From a payload, with or without the padding.
    pub fn parse(bytes: &[u8]) -> Option<InflightInfo> {
        let (words, rest) = bytes.split_first_chunk::<16>()?;
        let (size, offset) = words.split_at(8);
        let halves = rest.first_chunk::<4>()?;
        Some(InflightInfo {
            map_size: u64::from_ne_bytes(size.try_into().ok()?),
            map_offset: u64::from_ne_bytes(offset.try_into().ok()?),
            num_queues: u16::from_ne_bytes([halves[0], halves[1]]),
            queue_size: u16::from_ne_bytes([halves[2], halves[3]]),
        })
    }
}

/// Where the dirty log lies in its file, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogArea {
    /// Length in bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// A parsed request. Fds stay beside it, in the order in which they came.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    /// One fd for each region.
    SetMemTable(Vec<RegionInfo>),
    /// One fd.
    SetLogBase(LogArea),
    /// One fd.
    SetLogFd,
    SetVringNum {
        index: u32,
        num: u32,
    },
    /// `log_used`: guest address of the used ring, where writes to it are to be logged.
    SetVringAddr {
        index: u32,
        addr: VringAddr,
        log_used: Option<u64>,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    /// One fd, or none where `has_fd` is false.
    SetVringKick {
        index: u32,
        has_fd: bool,
    },
    SetVringCall {
        index: u32,
        has_fd: bool,
    },
    SetVringErr {
        index: u32,
        has_fd: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SendRarp([u8; 6]),
    NetSetMtu(u64),
    /// One fd.
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        data: Vec<u8>,
    },
    ResetDevice,
    GetMaxMemSlots,
    /// One fd.
    AddMemReg(RegionInfo),
    RemMemReg(RegionInfo),
    GetInflightFd(InflightInfo),
    /// One fd.
    SetInflightFd(InflightInfo),
    /// Known to the specification, not offered by us.
    Unsupported(FrontendReq),
}
