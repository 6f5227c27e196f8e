//! The disk storm's requests: choosing them, making them, and judging them when they come back.
//!
//! virtio 1.3, 5.2.6 (device operation of a block device).

use anyhow::{Context as _, Result};
use berth_tests_framework::driver::Piece;

use super::disk::Client;
use crate::blocks::{self, BLOCK};

/// Blocks of the longest request.
pub(super) const MOST: usize = 8;
/// Half of all requests go to the first of these, so that writes of one block follow each other closely.
const HOT: u64 = 256;
/// What a status byte holds before the device writes it.
const NO_STATUS: u8 = 0xff;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Read,
    Zero,
    Flush,
}

#[derive(Debug, Clone)]
pub(super) struct Request {
    kind: Kind,
    blocks: std::ops::Range<usize>,
    slot: usize,
}

/// Memory of one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) header: u64,
    pub(super) data: u64,
    pub(super) status: u64,
}

impl Client {
    /// What to ask next; nothing where the blocks tried are busy.
    pub(super) fn choose(&mut self) -> Option<(Kind, std::ops::Range<usize>)> {
        let kind = match self.random.below(20) {
            0 => return Some((Kind::Flush, 0..0)),
            1 | 2 => Kind::Zero,
            3..=7 => Kind::Read,
            _ => Kind::Write,
        };
        for _ in 0..16 {
            let count = 1 + usize::try_from(self.random.below(MOST as u64)).ok()?;
            let end = self.model.len() - count;
            let end = if self.random.below(2) == 0 {
                end.min(HOT as usize)
            } else {
                end
            };
            let first = usize::try_from(self.random.below(end as u64)).ok()?;
            let blocks = first..first + count;
            let may = match kind {
                Kind::Read => self.model.may_read(blocks.clone()),
                _ => self.model.may_write(blocks.clone()),
            };
            if may {
                return Some((kind, blocks));
            }
        }
        None
    }

    /// Makes a request; false where there is no room for it.
    pub(super) fn submit(
        &mut self,
        queue: usize,
        kind: Kind,
        blocks: std::ops::Range<usize>,
    ) -> Result<bool> {
        if self.rings[queue].room() < 4 {
            return Ok(false);
        }
        let Some(n) = self.free[queue].pop() else {
            return Ok(false);
        };
        let slot = self.slots[n];
        let sector = blocks.start as u64 * (BLOCK as u64 / 512);
        let length = u32::try_from(blocks.len() * BLOCK)?;
        let pieces = self.describe(kind, &slot, &blocks, sector)?;
        let code: u32 = match kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Flush => 4,
            Kind::Zero => 13,
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&code.to_le_bytes());
        if matches!(kind, Kind::Read | Kind::Write) {
            header[8..].copy_from_slice(&sector.to_le_bytes());
        }
        self.memory.write(slot.header, &header);
        self.memory.write(slot.status, &[NO_STATUS]);
        if kind == Kind::Read {
            // What was there before must not pass for what is read.
            self.memory.write(slot.data, &vec![0xa5; length as usize]);
        }
        let indirect = self.plan.ring_features && self.random.below(2) == 0;
        let ring = &mut self.rings[queue];
        let head = if indirect {
            ring.add_indirect(&pieces)
        } else {
            ring.add(&pieces)
        };
        let head = head.context("room was counted")?;
        self.requests[queue][usize::from(head)] = Some(Request {
            kind,
            blocks,
            slot: n,
        });
        Ok(true)
    }

    /// The buffers of a request, filled; the model knows of it from now on.
    fn describe(
        &mut self,
        kind: Kind,
        slot: &Slot,
        blocks: &std::ops::Range<usize>,
        sector: u64,
    ) -> Result<Vec<Piece>> {
        let piece = |gpa, length, writable| Piece {
            gpa,
            length,
            writable,
        };
        let length = u32::try_from(blocks.len() * BLOCK)?;
        let mut pieces = vec![piece(slot.header, 16, false)];
        match kind {
            Kind::Write => {
                let sequence = self.model.begin_write(blocks.clone());
                let mut bytes = vec![0; length as usize];
                for (block, part) in blocks.clone().zip(bytes.chunks_exact_mut(BLOCK)) {
                    blocks::fill(part, block as u64, sequence);
                }
                self.memory.write(slot.data, &bytes);
                // In two pieces, which end within a block or between two.
                let cut = u32::try_from(512 * (1 + self.random.below(7)))?;
                pieces.push(piece(slot.data, cut, false));
                pieces.push(piece(slot.data + u64::from(cut), length - cut, false));
            }
            Kind::Read => {
                self.model.begin_read(blocks.clone());
                pieces.push(piece(slot.data, length, true));
            }
            Kind::Zero => {
                self.model.begin_zero(blocks.clone());
                let mut range = [0; 16];
                range[..8].copy_from_slice(&sector.to_le_bytes());
                range[8..12].copy_from_slice(&(length / 512).to_le_bytes());
                // UNMAP, now and then.
                range[12] = u8::from(self.random.below(2) == 0);
                self.memory.write(slot.data, &range);
                pieces.push(piece(slot.data, 16, false));
            }
            Kind::Flush => {}
        }
        pieces.push(piece(slot.status, 1, true));
        Ok(pieces)
    }

    pub(super) fn check(&mut self, queue: usize, request: &Request, written: u32) {
        let slot = self.slots[request.slot];
        self.free[queue].push(request.slot);
        let mut status = [0];
        self.memory.read(slot.status, &mut status);
        let length = request.blocks.len() * BLOCK;
        let expected = if request.kind == Kind::Read {
            length + 1
        } else {
            1
        };
        if status != [0] || written as usize != expected {
            let what = if status == [NO_STATUS] {
                "no status"
            } else {
                "an error"
            };
            self.tally.errors.push(format!(
                "queue {queue}: {request:?} came back with {what} ({}), {written} bytes written",
                status[0]
            ));
        }
        match request.kind {
            Kind::Write | Kind::Zero => self.model.acknowledge(request.blocks.clone()),
            Kind::Flush => {}
            Kind::Read => {
                self.model.end_read(request.blocks.clone());
                let mut bytes = vec![0; length];
                self.memory.read(slot.data, &mut bytes);
                for (block, part) in request.blocks.clone().zip(bytes.chunks_exact(BLOCK)) {
                    if let Err(why) = self.model.check(block, part) {
                        self.tally.mismatches.push(why);
                    }
                }
            }
        }
    }
}
