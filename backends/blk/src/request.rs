//! Parsing of block requests: bytes of the guest in, checked values out. Pure, no I/O.
//!
//! ```text
//!   readable: | type u32 | reserved u32 | sector u64 | data to write, or ranges … |
//!   writable: | data read …                                            | status u8 |
//! ```
//!
//! How the driver cuts this into descriptors is its own choice (virtio 1.3, 2.7.4). The guest
//! controls every byte. Three outcomes: a [`Request`] within the limits of the disk; a status that
//! answers the request at once; or [`Malformed`], where there is not even room for a status.
//! Spec: virtio 1.3, 5.2.6.
#![forbid(unsafe_code)]

use berth_queue_worker::Chain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Bytes of a sector, the unit of every address (virtio 1.3, 5.2).
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of the request header.
pub const HEADER_SIZE: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
const RANGE_SIZE: usize = 16;
/// Most ranges of one request, told to the driver as max_discard_seg and max_write_zeroes_seg.
pub const MAX_RANGES: usize = 16;
/// Most sectors of one range, told to the driver: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// What the device answers in the status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The medium failed, or the request is outside of it.
    IoErr,
    /// The device does not know this request.
    Unsupported,
}

impl Status {
    /// The byte of the specification.
    pub fn byte(self) -> u8 {
        let value = match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoErr => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        value as u8
    }
}

/// What of the disk a request must respect.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub capacity_sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A range of bytes of the disk, inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The device may free the space (write-zeroes only).
    pub unmap: bool,
}

/// A request that is inside the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes at byte `offset` into the writable bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Length in bytes, a multiple of the sector size.
        len: usize,
    },
    /// Write `len` bytes that follow the header to byte `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Length in bytes, a multiple of the sector size.
        len: usize,
    },
    /// Make all completed writes durable.
    Flush,
    /// Write the serial into the writable bytes.
    GetId,
    /// Free these ranges.
    Discard(Vec<Range>),
    /// Make these ranges read as zeros.
    WriteZeroes(Vec<Range>),
    /// Nothing to do: this is the answer.
    Answer(Status),
}

/// A chain that is no request at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Less than a header.
    #[error("block request without a whole header")]
    NoHeader,
    /// No writable byte.
    #[error("block request without room for its status")]
    NoStatus,
}

impl Malformed {
    /// The message, for errors that carry a fixed string.
    pub fn message(self) -> &'static str {
        match self {
            Malformed::NoHeader => "block request without a whole header",
            Malformed::NoStatus => "block request without room for its status",
        }
    }
}

/// Parses and checks one request.
pub fn parse(chain: &Chain, limits: &Limits) -> Result<Request, Malformed> {
    let mut reader = chain.reader();
    let mut header = [0; HEADER_SIZE];
    if reader.read(&mut header) < HEADER_SIZE {
        return Err(Malformed::NoHeader);
    }
    let Some(writable) = chain.writable_len().checked_sub(1) else {
        return Err(Malformed::NoStatus);
    };
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes(sector);
    let fails_read_only = limits.read_only && is_write(kind);
    Ok(match kind {
        _ if fails_read_only => Request::Answer(Status::IoErr),
        VIRTIO_BLK_T_IN => match byte_range(sector, writable as u64, limits) {
            Some(offset) => Request::Read {
                offset,
                len: writable,
            },
            None => Request::Answer(Status::IoErr),
        },
        VIRTIO_BLK_T_OUT => match byte_range(sector, reader.remaining() as u64, limits) {
            Some(offset) => Request::Write {
                offset,
                len: reader.remaining(),
            },
            None => Request::Answer(Status::IoErr),
        },
        VIRTIO_BLK_T_FLUSH => Request::Flush,
        VIRTIO_BLK_T_GET_ID => Request::GetId,
        VIRTIO_BLK_T_DISCARD => {
            parse_ranges(chain, limits, false).map_or_else(Request::Answer, Request::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            parse_ranges(chain, limits, true).map_or_else(Request::Answer, Request::WriteZeroes)
        }
        _ => Request::Answer(Status::Unsupported),
    })
}

fn is_write(kind: u32) -> bool {
    matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    )
}

/// The byte offset of `sector`, if `len` bytes from there are whole sectors within the disk.
fn byte_range(sector: u64, len: u64, limits: &Limits) -> Option<u64> {
    if !len.is_multiple_of(SECTOR_SIZE) {
        return None;
    }
    let end = sector.checked_add(len / SECTOR_SIZE)?;
    (end <= limits.capacity_sectors).then(|| sector * SECTOR_SIZE)
}

fn parse_ranges(chain: &Chain, limits: &Limits, unmap_allowed: bool) -> Result<Vec<Range>, Status> {
    let mut reader = chain.reader();
    reader.skip(HEADER_SIZE);
    let len = reader.remaining();
    let count = len / RANGE_SIZE;
    if len == 0 || !len.is_multiple_of(RANGE_SIZE) || count > MAX_RANGES {
        return Err(Status::IoErr);
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let mut bytes = [0; RANGE_SIZE];
        reader.read(&mut bytes);
        ranges.push(parse_range(bytes, limits, unmap_allowed)?);
    }
    Ok(ranges)
}

fn parse_range(
    bytes: [u8; RANGE_SIZE],
    limits: &Limits,
    unmap_allowed: bool,
) -> Result<Range, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let num_sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    let known = if unmap_allowed {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    } else {
        0
    };
    // virtio 1.3, 5.2.6.2: flags that are unknown, or unmap in a discard, are not supported.
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if num_sectors > MAX_RANGE_SECTORS {
        return Err(Status::IoErr);
    }
    let len = u64::from(num_sectors) * SECTOR_SIZE;
    let offset = byte_range(sector, len, limits).ok_or(Status::IoErr)?;
    Ok(Range {
        offset,
        len,
        unmap: flags != 0,
    })
}
