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

pub use vhost::vhost_user::message::{BackendReq, FrontendReq};

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
/// Bit 8 of a kick, call or err message: no fd comes with it.
const VRING_NOFD: u64 = 1 << 8;
const VRING_INDEX_MASK: u64 = 0xff;
/// Bit 0 of SET_VRING_ADDR's flags: writes to the used ring are logged.
const VRING_F_LOG: u32 = 1;

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

/// Reads fields off a payload.
struct Payload<'a> {
    request: FrontendReq,
    bytes: &'a [u8],
    at: usize,
}

impl Payload<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let end = self.at + N;
        let field = self.bytes.get(self.at..end).and_then(|b| b.try_into().ok());
        self.at = end;
        field.ok_or(CodecError::ShortPayload {
            request: self.request,
            size: self.bytes.len(),
            expected: end,
        })
    }

    fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_ne_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_ne_bytes(self.take()?))
    }

    fn region(&mut self) -> Result<RegionInfo, CodecError> {
        Ok(RegionInfo {
            gpa: self.u64()?,
            size: self.u64()?,
            uva: self.u64()?,
            file_offset: self.u64()?,
        })
    }

    fn region_after_padding(&mut self) -> Result<RegionInfo, CodecError> {
        self.u64()?;
        self.region()
    }

    fn inflight(&mut self) -> Result<InflightInfo, CodecError> {
        let bytes = self.take::<20>()?;
        InflightInfo::parse(&bytes).ok_or(CodecError::BadPayload {
            request: self.request,
        })
    }

    fn vring_state(&mut self) -> Result<(u32, u32), CodecError> {
        Ok((self.u32()?, self.u32()?))
    }

    fn vring_fd(&mut self) -> Result<(u32, bool), CodecError> {
        let value = self.u64()?;
        // Masked to 8 bits, so it fits.
        let index = (value & VRING_INDEX_MASK) as u32;
        Ok((index, value & VRING_NOFD == 0))
    }
}

impl Request {
    /// Parses the payload of a request that came with `num_fds` fds.
    pub fn parse(header: &Header, bytes: &[u8], num_fds: usize) -> Result<Request, CodecError> {
        let code = FrontendReq::try_from(header.request)
            .map_err(|_| CodecError::UnknownRequest(header.request))?;
        let mut payload = Payload {
            request: code,
            bytes,
            at: 0,
        };
        let request = parse_payload(code, &mut payload)?;
        request.check_fds(code, num_fds)?;
        Ok(request)
    }

    fn check_fds(&self, request: FrontendReq, got: usize) -> Result<(), CodecError> {
        use Request as R;
        let expected = match self {
            R::SetMemTable(regions) => regions.len(),
            R::AddMemReg(_)
            | R::SetBackendReqFd
            | R::SetInflightFd(_)
            | R::SetLogBase(_)
            | R::SetLogFd => 1,
            R::SetVringKick { has_fd, .. }
            | R::SetVringCall { has_fd, .. }
            | R::SetVringErr { has_fd, .. } => usize::from(*has_fd),
            // Some frontends send the region's fd along; it is closed unused.
            R::RemMemReg(_) if got == 1 => 1,
            R::Unsupported(_) => got,
            _ => 0,
        };
        if got == expected {
            Ok(())
        } else {
            Err(CodecError::BadFds {
                request,
                got,
                expected,
            })
        }
    }
}

fn parse_payload(code: FrontendReq, payload: &mut Payload) -> Result<Request, CodecError> {
    use FrontendReq as F;
    use Request as R;
    Ok(match code {
        F::GET_FEATURES => R::GetFeatures,
        F::SET_FEATURES => R::SetFeatures(payload.u64()?),
        F::SET_OWNER => R::SetOwner,
        F::RESET_OWNER => R::ResetOwner,
        F::GET_PROTOCOL_FEATURES => R::GetProtocolFeatures,
        F::SET_PROTOCOL_FEATURES => R::SetProtocolFeatures(payload.u64()?),
        F::GET_QUEUE_NUM => R::GetQueueNum,
        F::RESET_DEVICE => R::ResetDevice,
        F::NET_SET_MTU => R::NetSetMtu(payload.u64()?),
        F::SEND_RARP => {
            let [a, b, c, d, e, f, _, _] = payload.take::<8>()?;
            R::SendRarp([a, b, c, d, e, f])
        }
        F::SET_BACKEND_REQ_FD => R::SetBackendReqFd,
        F::GET_CONFIG | F::SET_CONFIG => parse_config(code, payload)?,
        F::SET_MEM_TABLE => parse_mem_table(payload)?,
        F::SET_LOG_BASE => {
            let (size, offset) = (payload.u64()?, payload.u64()?);
            R::SetLogBase(LogArea { size, offset })
        }
        F::SET_LOG_FD => R::SetLogFd,
        F::GET_MAX_MEM_SLOTS => R::GetMaxMemSlots,
        F::ADD_MEM_REG => R::AddMemReg(payload.region_after_padding()?),
        F::REM_MEM_REG => R::RemMemReg(payload.region_after_padding()?),
        F::GET_INFLIGHT_FD => R::GetInflightFd(payload.inflight()?),
        F::SET_INFLIGHT_FD => R::SetInflightFd(payload.inflight()?),
        F::SET_VRING_NUM
        | F::SET_VRING_ADDR
        | F::SET_VRING_BASE
        | F::GET_VRING_BASE
        | F::SET_VRING_KICK
        | F::SET_VRING_CALL
        | F::SET_VRING_ERR
        | F::SET_VRING_ENABLE => parse_vring(code, payload)?,
        other => R::Unsupported(other),
    })
}

fn parse_vring(code: FrontendReq, payload: &mut Payload) -> Result<Request, CodecError> {
    use FrontendReq as F;
    use Request as R;
    Ok(match code {
        F::SET_VRING_KICK => {
            let (index, has_fd) = payload.vring_fd()?;
            R::SetVringKick { index, has_fd }
        }
        F::SET_VRING_CALL => {
            let (index, has_fd) = payload.vring_fd()?;
            R::SetVringCall { index, has_fd }
        }
        F::SET_VRING_ERR => {
            let (index, has_fd) = payload.vring_fd()?;
            R::SetVringErr { index, has_fd }
        }
        F::SET_VRING_ADDR => {
            let (index, flags) = payload.vring_state()?;
            let addr = VringAddr {
                desc: payload.u64()?,
                used: payload.u64()?,
                avail: payload.u64()?,
            };
            let log_guest_addr = payload.u64()?;
            let log_used = (flags & VRING_F_LOG != 0).then_some(log_guest_addr);
            R::SetVringAddr {
                index,
                addr,
                log_used,
            }
        }
        _ => {
            let (index, num) = payload.vring_state()?;
            match code {
                F::SET_VRING_NUM => R::SetVringNum { index, num },
                F::SET_VRING_BASE => R::SetVringBase { index, base: num },
                F::GET_VRING_BASE => R::GetVringBase { index },
                F::SET_VRING_ENABLE => R::SetVringEnable {
                    index,
                    enable: num != 0,
                },
                other => R::Unsupported(other),
            }
        }
    })
}

fn parse_config(code: FrontendReq, payload: &mut Payload) -> Result<Request, CodecError> {
    let (offset, size, flags) = (payload.u32()?, payload.u32()?, payload.u32()?);
    let bad = CodecError::BadPayload { request: code };
    let len = usize::try_from(size).unwrap_or(usize::MAX);
    // A GET_CONFIG need not bring the room for its answer, and some frontends do not.
    if code == FrontendReq::GET_CONFIG {
        if len > MAX_PAYLOAD - 12 {
            return Err(bad);
        }
        return Ok(Request::GetConfig {
            offset,
            size,
            flags,
        });
    }
    let data = payload.bytes.get(12..).and_then(|rest| rest.get(..len));
    Ok(Request::SetConfig {
        offset,
        flags,
        data: data.ok_or(bad)?.to_vec(),
    })
}

fn parse_mem_table(payload: &mut Payload) -> Result<Request, CodecError> {
    let (count, _padding) = (payload.u32()?, payload.u32()?);
    if usize::try_from(count).unwrap_or(usize::MAX) > MAX_FDS {
        return Err(CodecError::BadPayload {
            request: FrontendReq::SET_MEM_TABLE,
        });
    }
    let regions = (0..count).map(|_| payload.region());
    Ok(Request::SetMemTable(regions.collect::<Result<_, _>>()?))
}

fn message(request: u32, flags: u32, payload: &[&[u8]]) -> Vec<u8> {
    let size: usize = payload.iter().map(|part| part.len()).sum();
    let mut bytes = Vec::with_capacity(HEADER_SIZE + size);
    bytes.extend_from_slice(&request.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    // Payloads are built here, from at most MAX_PAYLOAD bytes.
    bytes.extend_from_slice(&(size as u32).to_ne_bytes());
    for part in payload {
        bytes.extend_from_slice(part);
    }
    bytes
}

/// A reply whose payload is one number: features, counts, acknowledgements (0 is success).
pub fn reply_u64(request: u32, value: u64) -> Vec<u8> {
    message(request, VERSION | FLAG_REPLY, &[&value.to_ne_bytes()])
}

/// The reply to GET_VRING_BASE.
pub fn reply_vring_base(index: u32, base: u16) -> Vec<u8> {
    message(
        FrontendReq::GET_VRING_BASE.into(),
        VERSION | FLAG_REPLY,
        &[&index.to_ne_bytes(), &u32::from(base).to_ne_bytes()],
    )
}

/// The reply to GET_INFLIGHT_FD; the region's fd goes with it.
pub fn reply_inflight(info: &InflightInfo) -> Vec<u8> {
    message(
        FrontendReq::GET_INFLIGHT_FD.into(),
        VERSION | FLAG_REPLY,
        &[&info.to_bytes()],
    )
}

/// The reply to GET_CONFIG. Empty `data` tells the frontend that the read failed.
pub fn reply_config(offset: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    message(
        FrontendReq::GET_CONFIG.into(),
        VERSION | FLAG_REPLY,
        &[
            &offset.to_ne_bytes(),
            &(data.len() as u32).to_ne_bytes(),
            &flags.to_ne_bytes(),
            data,
        ],
    )
}

/// A request from us to the frontend, without payload, that wants no reply.
pub fn backend_request(request: BackendReq) -> Vec<u8> {
    message(request.into(), VERSION, &[])
}

/// A request as a frontend sends it; the fake frontend's side of the codec.
pub fn frontend_request(request: u32, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
    message(request, flags, &[payload])
}

/// Whether `flags` are those of a reply; the fake frontend's side of the codec.
pub fn is_reply(flags: u32) -> bool {
    flags & FLAG_VERSION_MASK == VERSION && flags & FLAG_REPLY != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(code: FrontendReq, payload: &[u8], fds: usize) -> Result<Request, CodecError> {
        let bytes = frontend_request(code.into(), false, payload);
        let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap())?;
        assert_eq!(header.size, payload.len());
        Request::parse(&header, &bytes[HEADER_SIZE..], fds)
    }

    fn words(values: &[u64]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_ne_bytes()).collect()
    }

    #[test]
    fn header_with_foreign_version_reply_or_reserved_bits_is_refused() {
        for flags in [0u32, 2, 3, 1 | FLAG_REPLY, 1 | 1 << 4, 1 | 1 << 31] {
            let mut bytes = [0; HEADER_SIZE];
            bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
            assert!(Header::parse(&bytes).is_err(), "flags {flags:#x}");
        }
        let mut bytes = [0; HEADER_SIZE];
        bytes[4..8].copy_from_slice(&(VERSION | FLAG_NEED_REPLY).to_ne_bytes());
        assert!(Header::parse(&bytes).unwrap().need_reply());
    }

    #[test]
    fn header_with_absurd_size_is_refused() {
        let mut bytes = [0; HEADER_SIZE];
        bytes[4..8].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[8..].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_ne_bytes());
        assert!(matches!(
            Header::parse(&bytes),
            Err(CodecError::TooLarge { .. })
        ));
    }

    #[test]
    fn fds_must_match_the_request() {
        assert!(parse(FrontendReq::SET_FEATURES, &words(&[1]), 0).is_ok());
        assert!(parse(FrontendReq::SET_FEATURES, &words(&[1]), 1).is_err());
        assert!(parse(FrontendReq::SET_VRING_KICK, &words(&[3]), 0).is_err());
        assert_eq!(
            parse(FrontendReq::SET_VRING_CALL, &words(&[3 | VRING_NOFD]), 0),
            Ok(Request::SetVringCall {
                index: 3,
                has_fd: false
            })
        );
    }

    #[test]
    fn dirty_log_needs_its_area_and_one_fd() {
        let area = words(&[0x2000, 0x1000]);
        let request = parse(FrontendReq::SET_LOG_BASE, &area, 1);
        let expected = LogArea {
            size: 0x2000,
            offset: 0x1000,
        };
        assert_eq!(request, Ok(Request::SetLogBase(expected)));
        assert!(parse(FrontendReq::SET_LOG_BASE, &area, 0).is_err());
        assert!(parse(FrontendReq::SET_LOG_BASE, &area, 2).is_err());
        assert!(parse(FrontendReq::SET_LOG_BASE, &area[..8], 1).is_err());
        assert_eq!(
            parse(FrontendReq::SET_LOG_FD, &[], 1),
            Ok(Request::SetLogFd)
        );
        assert!(parse(FrontendReq::SET_LOG_FD, &[], 0).is_err());
    }

    #[test]
    fn used_ring_is_logged_where_the_flag_says_so() {
        for (flags, expected) in [(0, None), (1, Some(0x5000)), (2, None), (3, Some(0x5000))] {
            let payload = words(&[flags << 32, 0x1000, 0x3000, 0x2000, 0x5000]);
            let request = parse(FrontendReq::SET_VRING_ADDR, &payload, 0).unwrap();
            let Request::SetVringAddr { log_used, .. } = request else {
                panic!("{request:?}")
            };
            assert_eq!(log_used, expected, "flags {flags}");
        }
        let short = words(&[0, 0x1000, 0x3000, 0x2000]);
        assert!(parse(FrontendReq::SET_VRING_ADDR, &short, 0).is_err());
    }

    #[test]
    fn memory_table_needs_a_region_and_an_fd_for_each_that_it_counts() {
        let two = words(&[2, 0, 0x1000, 0x7000, 0, 0x1000, 0x1000, 0x8000, 0x1000]);
        let table = parse(FrontendReq::SET_MEM_TABLE, &two, 2).unwrap();
        let Request::SetMemTable(regions) = table else {
            panic!("{table:?}")
        };
        assert_eq!(regions[1].file_offset, 0x1000);
        assert!(parse(FrontendReq::SET_MEM_TABLE, &two, 1).is_err());
        assert!(parse(FrontendReq::SET_MEM_TABLE, &two[..60], 2).is_err());
        assert!(parse(FrontendReq::SET_MEM_TABLE, &words(&[33]), 0).is_err());
    }

    #[test]
    fn config_reads_take_any_size_and_writes_need_their_data() {
        let head = |size: u32| {
            [0u32, size, 0]
                .iter()
                .flat_map(|v| v.to_ne_bytes())
                .collect::<Vec<_>>()
        };
        for size in [1, 57, 60, 256] {
            let request = parse(FrontendReq::GET_CONFIG, &head(size), 0).unwrap();
            assert!(matches!(request, Request::GetConfig { size: s, .. } if s == size));
        }
        assert!(parse(FrontendReq::GET_CONFIG, &head(u32::MAX), 0).is_err());
        let mut write = head(2);
        write.push(7);
        assert!(parse(FrontendReq::SET_CONFIG, &write, 0).is_err());
        write.push(8);
        assert!(parse(FrontendReq::SET_CONFIG, &write, 0).is_ok());
    }

    #[test]
    fn requests_that_are_not_offered_are_told_apart_from_unknown_ones() {
        assert_eq!(
            parse(FrontendReq::POSTCOPY_ADVISE, &[], 0),
            Ok(Request::Unsupported(FrontendReq::POSTCOPY_ADVISE))
        );
        let bytes = frontend_request(4711, false, &[]);
        let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap()).unwrap();
        assert_eq!(
            Request::parse(&header, &[], 0),
            Err(CodecError::UnknownRequest(4711))
        );
    }
}
