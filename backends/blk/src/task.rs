//! The two kinds of request that may take several operations: transfers and lists of ranges.
//!
//! ```text
//!   Transfer: prepare ─▶ iovecs (guest buffers, or a bounce buffer) ─▶ io … finish_part ─┐
//!                ▲────────────────────── not all done ──────────────────────────────────┘
//!   Ranges:   next_io ─▶ fallocate of a range, zeros, or the final sync … finish_part ───┐
//!                ▲────────────────────── next range ────────────────────────────────────┘
//! ```
//!
//! State only: which operation comes next and what its result means. The worker starts them.
//! Invariant: between `prepare`/`next_io` and `finish_part` nobody touches the buffers.
#![forbid(unsafe_code)]

use berth_queue_worker::{Chain, Cursor, GuestSlice};

use crate::engine::Io;
use crate::image::{Direct, Disk};
use crate::request::{HEADER_SIZE, Range, Status};

/// IOV_MAX: longer lists are continued like short transfers.
const MAX_IOVECS: usize = 1024;
/// Most bytes copied through a bounce buffer at a time. A guest that misaligns every buffer makes
/// each slot have one.
const BOUNCE_SIZE: usize = 128 << 10;

/// A page of a bounce buffer, aligned for any direct I/O.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; 4096]);

/// A read or write under way.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) write: bool,
    offset: u64,
    pub(crate) len: usize,
    done: usize,
    /// The operation in flight uses the bounce buffer, from `skip` bytes in.
    bounced: Option<usize>,
}

/// A discard or write-zeroes under way, one range after the other.
#[derive(Debug)]
pub(crate) struct Ranges {
    ranges: Vec<Range>,
    at: usize,
    discard: bool,
    /// Bytes of the current range written with zeros, where fallocate could not do it.
    zeroed: Option<u64>,
    /// The final fdatasync is under way.
    syncing: bool,
}

/// The status that a result (bytes, or -errno) means.
pub(crate) fn status_of(result: i32) -> Status {
    match -result {
        libc::EOPNOTSUPP => Status::Unsupported,
        1.. => Status::IoErr,
        _ => Status::Ok,
    }
}

impl Transfer {
    pub(crate) fn new(write: bool, offset: u64, len: usize) -> Transfer {
        Transfer {
            write,
            offset,
            len,
            done: 0,
            bounced: None,
        }
    }

    /// Whether everything has been transferred.
    pub(crate) fn is_done(&self) -> bool {
        self.done == self.len
    }

    /// Fills `iovecs` with the next part; the file offset it goes to, or none where it cannot be
    /// done (a write that is no whole number of direct I/O's blocks).
    pub(crate) fn prepare(
        &mut self,
        chain: &Chain,
        direct: Option<Direct>,
        iovecs: &mut Vec<libc::iovec>,
        bounce: &mut Vec<Page>,
    ) -> Option<u64> {
        let at = self.offset + self.done as u64;
        let left = self.len - self.done;
        iovecs.clear();
        self.bounced = None;
        let mut cursor = self.cursor(chain);
        let mut covered = 0;
        let mut aligned = true;
        while iovecs.len() < MAX_IOVECS
            && let Some(piece) = cursor.next_piece(left - covered)
        {
            aligned &= direct.is_none_or(|d| is_aligned(&piece, d));
            covered += piece.len();
            iovecs.push(piece.as_iovec());
        }
        let Some(direct) = direct else {
            return Some(at);
        };
        let block = direct.offset_align;
        if aligned && at.is_multiple_of(block) && (covered as u64).is_multiple_of(block) {
            return Some(at);
        }
        self.prepare_bounce(chain, block, iovecs, bounce)
    }

    /// The same through a bounce buffer that covers whole blocks around the next part.
    fn prepare_bounce(
        &mut self,
        chain: &Chain,
        block: u64,
        iovecs: &mut Vec<libc::iovec>,
        bounce: &mut Vec<Page>,
    ) -> Option<u64> {
        let at = self.offset + self.done as u64;
        let start = at - at % block;
        // Less than a block, which is at most a page or a few.
        let skip = (at - start) as usize;
        let len = (self.len - self.done).min(BOUNCE_SIZE);
        let span = (skip + len).next_multiple_of(block as usize);
        if self.write && (skip != 0 || span != len) {
            return None;
        }
        bounce.resize(span.div_ceil(size_of::<Page>()), Page([0; 4096]));
        if self.write {
            copy_pages(bounce, |bytes, at| {
                let end = len.saturating_sub(at).min(bytes.len());
                let mut cursor = self.cursor(chain);
                cursor.skip(at);
                cursor.read(&mut bytes[..end]);
            });
        }
        iovecs.clear();
        iovecs.push(libc::iovec {
            iov_base: bounce.as_mut_ptr().cast(),
            iov_len: span,
        });
        self.bounced = Some(skip);
        Some(start)
    }

    /// The guest's bytes from where this transfer stands.
    fn cursor<'c>(&self, chain: &'c Chain) -> Cursor<'c> {
        let (mut cursor, before) = if self.write {
            (chain.reader(), HEADER_SIZE)
        } else {
            (chain.writer(), 0)
        };
        cursor.skip(before + self.done);
        cursor
    }

    pub(crate) fn io<'a>(&self, offset: u64, iovecs: &'a [libc::iovec], durable: bool) -> Io<'a> {
        if self.write {
            Io::Write {
                offset,
                iovecs,
                durable,
            }
        } else {
            Io::Read { offset, iovecs }
        }
    }

    /// A part has completed. `Ok` means: go on until all is done.
    pub(crate) fn finish_part(&mut self, result: i32, chain: &Chain, bounce: &[Page]) -> Status {
        let Ok(bytes) = usize::try_from(result) else {
            return status_of(result);
        };
        let left = self.len - self.done;
        let useful = match self.bounced.take() {
            None => bytes.min(left),
            Some(skip) => {
                let useful = bytes.saturating_sub(skip).min(left);
                if !self.write {
                    let mut cursor = self.cursor(chain);
                    for (n, page) in bounce.iter().enumerate() {
                        let first = n * size_of::<Page>();
                        let within = |at: usize| at.clamp(first, first + page.0.len()) - first;
                        cursor.write(&page.0[within(skip)..within(skip + useful)]);
                    }
                }
                useful
            }
        };
        if useful == 0 && left > 0 {
            // The end of the file, though the disk goes on: it was truncated under us.
            return Status::IoErr;
        }
        self.done += useful;
        Status::Ok
    }
}

fn is_aligned(piece: &GuestSlice, direct: Direct) -> bool {
    (piece.host_addr() as u64).is_multiple_of(direct.mem_align)
        && (piece.len() as u64).is_multiple_of(direct.offset_align)
}

/// Calls `fill` with the bytes of each page and their offset.
fn copy_pages(pages: &mut [Page], mut fill: impl FnMut(&mut [u8], usize)) {
    for (n, page) in pages.iter_mut().enumerate() {
        fill(&mut page.0, n * size_of::<Page>());
    }
}

impl Ranges {
    pub(crate) fn new(ranges: Vec<Range>, discard: bool) -> Ranges {
        Ranges {
            ranges,
            at: 0,
            discard,
            zeroed: None,
            syncing: false,
        }
    }

    /// The next operation, none where all is done.
    pub(crate) fn next_io<'a>(
        &mut self,
        durable: bool,
        iovecs: &'a mut Vec<libc::iovec>,
        zeros: &mut Vec<Page>,
    ) -> Option<Io<'a>> {
        while self.ranges.get(self.at).is_some_and(|range| range.len == 0) {
            self.at += 1;
        }
        let Some(range) = self.ranges.get(self.at) else {
            let sync = durable && !self.syncing;
            self.syncing = true;
            return sync.then_some(Io::Sync);
        };
        let Some(zeroed) = self.zeroed else {
            let hole = self.discard || range.unmap;
            let mode = if hole {
                libc::FALLOC_FL_PUNCH_HOLE
            } else {
                libc::FALLOC_FL_ZERO_RANGE
            };
            return Some(Io::Allocate {
                mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                offset: range.offset,
                len: range.len,
            });
        };
        let len = (range.len - zeroed).min(BOUNCE_SIZE as u64) as usize;
        zeros.clear();
        zeros.resize(len.div_ceil(size_of::<Page>()), Page([0; 4096]));
        iovecs.clear();
        iovecs.push(libc::iovec {
            iov_base: zeros.as_mut_ptr().cast(),
            iov_len: len,
        });
        Some(Io::Write {
            offset: range.offset + zeroed,
            iovecs,
            durable: false,
        })
    }

    /// An operation has completed. `Ok` means: go on.
    pub(crate) fn finish_part(&mut self, result: i32, disk: &Disk) -> Status {
        let Some(range) = self.ranges.get(self.at) else {
            return status_of(result);
        };
        match (&mut self.zeroed, result) {
            (None, 0..) => self.at += 1,
            (None, _) if -result == libc::EOPNOTSUPP => return self.fall_back(disk),
            // The end of the file, though the disk goes on.
            (Some(_), 0) => return Status::IoErr,
            (Some(zeroed), 1..) => {
                *zeroed += u64::from(result.unsigned_abs());
                if *zeroed >= range.len {
                    self.at += 1;
                    self.zeroed = None;
                }
            }
            (_, error) => return status_of(error),
        }
        Status::Ok
    }

    /// The file system or device does not know this fallocate mode.
    fn fall_back(&mut self, disk: &Disk) -> Status {
        let range = &self.ranges[self.at];
        if !self.discard {
            self.zeroed = Some(0);
            return Status::Ok;
        }
        if !disk.is_block_device() {
            return Status::Unsupported;
        }
        match disk.discard_blocks(range.offset, range.len) {
            Ok(()) => {
                self.at += 1;
                Status::Ok
            }
            Err(error) => status_of(-error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}
