//! Blocks that say what they are: place, sequence number and checksum; and what a disk of them may hold.
//!
//! A disk is right when each of its blocks holds the last acknowledged write, or a later one that was never
//! acknowledged. At most one write of a block is in flight at a time, so "later" is never in doubt.

/// Bytes of a block.
pub const BLOCK: usize = 4096;

const MAGIC: u64 = 0x6b63_6f6c_6274_7262;
/// Magic, block, sequence, checksum.
const HEADER: usize = 32;

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeroes: never written, or zeroed.
    Zero,
    /// The write of this sequence number.
    Write(u64),
}

/// Why a block's content is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Neither zeroes nor one of our blocks.
    #[error("not a block of ours")]
    Foreign,
    /// A block that belongs elsewhere.
    #[error("it is block {0}")]
    Misplaced(u64),
    /// Parts of two writes, or changed since.
    #[error("its checksum is wrong: parts of two writes")]
    Torn,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Covers everything but the checksum itself; each bit of each word moves it.
fn checksum(bytes: &[u8]) -> u64 {
    let words = (0..24).step_by(8).chain((HEADER..bytes.len()).step_by(8));
    words.fold(0xcbf2_9ce4_8422_2325, |sum, at| {
        (sum ^ word(bytes, at))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    })
}

/// Writes the content of write `sequence` of `block`: random bytes, the same each time.
pub fn fill(bytes: &mut [u8], block: u64, sequence: u64) {
    let mut random = Random::new(block << 32 ^ sequence);
    for part in bytes[HEADER..].chunks_exact_mut(8) {
        part.copy_from_slice(&random.draw().to_le_bytes());
    }
    for (at, value) in [(0, MAGIC), (8, block), (16, sequence)] {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let sum = checksum(bytes);
    bytes[24..32].copy_from_slice(&sum.to_le_bytes());
}

/// What the bytes at `block` are.
///
/// # Errors
/// Nothing that was ever written there.
pub fn content(bytes: &[u8], block: u64) -> Result<Content, Damage> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(Content::Zero);
    }
    if word(bytes, 0) != MAGIC {
        return Err(Damage::Foreign);
    }
    if word(bytes, 24) != checksum(bytes) {
        return Err(Damage::Torn);
    }
    if word(bytes, 8) != block {
        return Err(Damage::Misplaced(word(bytes, 8)));
    }
    Ok(Content::Write(word(bytes, 16)))
}

/// Random numbers, the same for the same seed (xorshift64*): not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        // Near seeds begin alike.
        random.draw();
        random.draw();
        random
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One of `0..end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.draw() >> 16) % end.max(1)
    }
}

#[derive(Debug, Clone, Copy)]
struct State {
    acknowledged: Content,
    pending: Option<Content>,
    readers: u32,
}

/// What each block of a disk may hold, by what was asked and answered.
#[derive(Debug)]
pub struct Model {
    first: u64,
    blocks: Vec<State>,
    sequence: u64,
}

impl Model {
    /// A disk of zeroes, whose blocks are numbered from `first` on.
    #[must_use]
    pub fn new(first: u64, blocks: usize) -> Self {
        let state = State {
            acknowledged: Content::Zero,
            pending: None,
            readers: 0,
        };
        Self {
            first,
            blocks: vec![state; blocks],
            sequence: 0,
        }
    }

    /// The number that a block has in its content.
    #[must_use]
    pub fn id(&self, block: usize) -> u64 {
        self.first + block as u64
    }

    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether `blocks` may be written now: nobody writes or reads them.
    #[must_use]
    pub fn may_write(&self, blocks: std::ops::Range<usize>) -> bool {
        self.blocks[blocks]
            .iter()
            .all(|state| state.pending.is_none() && state.readers == 0)
    }

    /// Whether `blocks` may be read now: nobody writes them.
    #[must_use]
    pub fn may_read(&self, blocks: std::ops::Range<usize>) -> bool {
        self.blocks[blocks]
            .iter()
            .all(|state| state.pending.is_none())
    }

    /// A write of `blocks` begins; its sequence number.
    pub fn begin_write(&mut self, blocks: std::ops::Range<usize>) -> u64 {
        self.sequence += 1;
        let content = Content::Write(self.sequence);
        self.begin(blocks, content);
        self.sequence
    }

    /// `blocks` are about to be zeroed.
    pub fn begin_zero(&mut self, blocks: std::ops::Range<usize>) {
        self.begin(blocks, Content::Zero);
    }

    fn begin(&mut self, blocks: std::ops::Range<usize>, content: Content) {
        for state in &mut self.blocks[blocks] {
            state.pending = Some(content);
        }
    }

    /// The write or zeroing of `blocks` was acknowledged.
    pub fn acknowledge(&mut self, blocks: std::ops::Range<usize>) {
        for state in &mut self.blocks[blocks] {
            if let Some(content) = state.pending.take() {
                state.acknowledged = content;
            }
        }
    }

    /// A read of `blocks` begins.
    pub fn begin_read(&mut self, blocks: std::ops::Range<usize>) {
        for state in &mut self.blocks[blocks] {
            state.readers += 1;
        }
    }

    /// A read of `blocks` ended, whatever it found.
    pub fn end_read(&mut self, blocks: std::ops::Range<usize>) {
        for state in &mut self.blocks[blocks] {
            state.readers = state.readers.saturating_sub(1);
        }
    }

    /// Whether `block` may hold these bytes.
    ///
    /// # Errors
    /// It may not; says why.
    pub fn check(&self, block: usize, bytes: &[u8]) -> Result<(), String> {
        let state = &self.blocks[block];
        let found =
            content(bytes, self.id(block)).map_err(|damage| format!("block {block}: {damage}"))?;
        if found == state.acknowledged || Some(found) == state.pending {
            return Ok(());
        }
        Err(format!(
            "block {block} holds {found:?}, acknowledged is {:?}, pending {:?}",
            state.acknowledged, state.pending
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(at: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        fill(&mut bytes, at, sequence);
        bytes
    }

    #[test]
    fn a_block_is_told_from_zeroes_other_places_torn_and_foreign_ones() {
        assert_eq!(content(&block(7, 3), 7), Ok(Content::Write(3)));
        assert_eq!(content(&[0; BLOCK], 7), Ok(Content::Zero));
        assert_eq!(content(&block(7, 3), 8), Err(Damage::Misplaced(7)));
        assert_eq!(content(&[5; BLOCK], 7), Err(Damage::Foreign));
        let mut torn = block(7, 3);
        torn[512..].copy_from_slice(&block(7, 4)[512..]);
        assert_eq!(content(&torn, 7), Err(Damage::Torn));
        for at in [9, 17, 40, BLOCK - 1] {
            let mut flipped = block(7, 3);
            flipped[at] ^= 0x10;
            assert_eq!(content(&flipped, 7), Err(Damage::Torn), "byte {at}");
        }
    }

    #[test]
    fn only_the_last_acknowledged_write_or_a_later_one_is_right() {
        let mut model = Model::new(0, 4);
        let old = model.begin_write(1..3);
        model.acknowledge(1..3);
        let new = model.begin_write(1..2);
        assert!(!model.may_read(0..2) && model.may_read(2..4));
        for sequence in [old, new] {
            assert_eq!(model.check(1, &block(1, sequence)), Ok(()));
        }
        model.acknowledge(1..2);
        assert_eq!(model.check(1, &block(1, new)), Ok(()));
        let stale = model
            .check(1, &block(1, old))
            .expect_err("acknowledged is newer");
        assert!(stale.contains("Write(1)"), "{stale}");
        assert!(model.check(1, &[0; BLOCK]).is_err(), "lost");
        assert!(model.check(3, &block(3, new)).is_err(), "never written");
        model.begin_zero(1..2);
        model.acknowledge(1..2);
        assert!(model.check(1, &block(1, new)).is_err(), "zeroed since");
    }

    #[test]
    fn a_block_that_is_read_is_not_written() {
        let mut model = Model::new(0, 2);
        model.begin_read(0..1);
        model.begin_read(0..1);
        model.end_read(0..1);
        assert!(!model.may_write(0..1) && model.may_write(1..2));
        model.end_read(0..1);
        assert!(model.may_write(0..1));
    }
}
