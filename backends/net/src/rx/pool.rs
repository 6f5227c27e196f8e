//! Guest buffers that wait for frames, in the order in which the driver offered them.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use berth_queue_worker::Chain;

/// A guest buffer that waits for a frame.
struct Buffer {
    chain: Chain,
    pieces: usize,
}

/// Guest buffers in ring order, and used-up ones whose allocation is kept.
#[derive(Default)]
pub(super) struct Pool {
    buffers: VecDeque<Buffer>,
    spare: Vec<Chain>,
    bytes: usize,
    pieces: usize,
}

impl Pool {
    /// Adds a buffer at the end.
    pub(super) fn push(&mut self, chain: Chain, pieces: usize) {
        self.bytes += chain.writable_len();
        self.pieces += pieces;
        self.buffers.push_back(Buffer { chain, pieces });
    }

    /// Takes the first buffer.
    pub(super) fn pop(&mut self) -> Option<Chain> {
        let Buffer { chain, pieces } = self.buffers.pop_front()?;
        self.bytes -= chain.writable_len();
        self.pieces -= pieces;
        Some(chain)
    }

    /// A chain to pop into.
    pub(super) fn spare(&mut self) -> Chain {
        self.spare.pop().unwrap_or_default()
    }

    /// Keeps a chain for later.
    pub(super) fn keep(&mut self, chain: Chain) {
        self.spare.push(chain);
    }

    /// Number of buffers.
    pub(super) fn len(&self) -> usize {
        self.buffers.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Room in all buffers.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pieces of all buffers.
    pub(super) fn pieces(&self) -> usize {
        self.pieces
    }

    /// The buffers from the `first` one on.
    pub(super) fn chains_from(&self, first: usize) -> impl Iterator<Item = &Chain> {
        self.buffers.range(first..).map(|buffer| &buffer.chain)
    }

    /// How many buffers from the first one on have room for `bytes`, and how much; all of them if
    /// they do not.
    pub(super) fn covering(&self, bytes: usize) -> (usize, usize) {
        let (mut count, mut room) = (0, 0);
        for chain in self.chains_from(0) {
            if room >= bytes {
                break;
            }
            count += 1;
            room += chain.writable_len();
        }
        (count, room)
    }

    /// Copies bytes of the frame that begins in buffer `first`, from `offset` on; says how many
    /// there were in `count` buffers.
    pub(super) fn copy_out(
        &self,
        first: usize,
        count: usize,
        mut offset: usize,
        to: &mut [u8],
    ) -> usize {
        let mut done = 0;
        for chain in self.chains_from(first).take(count) {
            let mut cursor = chain.writer();
            offset -= cursor.skip(offset);
            done += cursor.read(&mut to[done..]);
            if done == to.len() {
                break;
            }
        }
        done
    }

    /// Copies a frame into the pool, from its beginning on.
    pub(super) fn copy_in(&self, from: &[u8]) {
        let mut done = 0;
        for chain in self.chains_from(0) {
            done += chain.writer().write(&from[done..]);
            if done == from.len() {
                break;
            }
        }
    }
}
