//! The legacy LZ4 frame, which `lz4 -l` and the kernel's build write: a magic number, then blocks of at
//! most 8 MiB, each behind its packed length in 32 bits. There is no end mark: the kernel's build puts
//! the unpacked length, 32 bits, after the last block, so the last four bytes are no block.
//!
//! LZ4 frame format description, "Legacy frame".

use std::io::{self, Read};

const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Unpacked length of a block, at most.
const BLOCK_LEN: usize = 8 << 20;
/// A block that does not compress grows by 1/255 and a little.
const MAX_PACKED: usize = BLOCK_LEN + BLOCK_LEN / 255 + 16;

/// Reads what a legacy frame holds; keeps one block.
pub struct LegacyLz4<R> {
    packed: R,
    input: Vec<u8>,
    block: Vec<u8>,
    taken: usize,
    valid: usize,
    finished: bool,
}

impl<R: Read> LegacyLz4<R> {
    /// Checks the magic number.
    pub fn new(mut packed: R) -> io::Result<Self> {
        let mut magic = [0; 4];
        packed.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(invalid("no legacy lz4 frame"));
        }
        Ok(Self {
            packed,
            input: Vec::new(),
            block: vec![0; BLOCK_LEN],
            taken: 0,
            valid: 0,
            finished: false,
        })
    }

    /// Unpacks the next block; `false` at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut len = [0; 4];
        self.packed.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        self.input.clear();
        self.packed
            .by_ref()
            .take(len.min(MAX_PACKED) as u64)
            .read_to_end(&mut self.input)?;
        // Nothing behind these four bytes: they were the appended length of all that came before.
        if self.input.is_empty() {
            self.finished = true;
            return Ok(false);
        }
        if len > MAX_PACKED || self.input.len() < len {
            return Err(invalid(
                "lz4 block is longer than the file or the format allows",
            ));
        }
        self.valid = lz4_flex::block::decompress_into(&self.input, &mut self.block)
            .map_err(|error| invalid(&format!("lz4 block: {error}")))?;
        self.taken = 0;
        Ok(true)
    }
}

impl<R: Read> Read for LegacyLz4<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.valid {
            if buf.is_empty() || self.finished || !self.next_block()? {
                return Ok(0);
            }
        }
        let len = buf.len().min(self.valid - self.taken);
        buf[..len].copy_from_slice(&self.block[self.taken..self.taken + len]);
        self.taken += len;
        Ok(len)
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(blocks: &[&[u8]]) -> Vec<u8> {
        let mut frame = MAGIC.to_vec();
        for block in blocks {
            let packed = lz4_flex::block::compress(block);
            frame.extend((packed.len() as u32).to_le_bytes());
            frame.extend(packed);
        }
        let plain_len: usize = blocks.iter().map(|block| block.len()).sum();
        frame.extend((plain_len as u32).to_le_bytes());
        frame
    }

    fn unpack(frame: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        LegacyLz4::new(frame)?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    #[test]
    fn blocks_follow_each_other_up_to_the_appended_length() {
        let plain = unpack(&frame(&[b"one", &[7; 5000], b"three"])).unwrap();
        assert_eq!(plain, [&b"one"[..], &[7; 5000], b"three"].concat());
        assert_eq!(unpack(&frame(&[])).unwrap(), b"");
    }

    #[test]
    fn a_block_longer_than_the_format_allows_is_refused() {
        let mut long = MAGIC.to_vec();
        long.extend(u32::MAX.to_le_bytes());
        long.extend([0; 64]);
        assert!(unpack(&long).is_err());
        assert!(unpack(b"\x04\x22\x4d\x18 a frame of the newer kind").is_err());
    }
}
