//! The kernel inside a bzImage: which compressor made it, and a stream of what it holds.
//!
//! The kernel's build appends four bytes, the unpacked length, after every format but gzip; the
//! decoders stop before them. Memory is bounded: the largest window that the kernel's build uses is
//! 128 MiB (zstd -22 --ultra, and xz of newer kernels).

use std::io::{self, BufReader, Read};

use super::lz4::LegacyLz4;

/// Largest zstd window.
const MAX_WINDOW: u64 = 128 << 20;
/// Most memory for the xz decoder: a dictionary of 128 MiB and what it needs besides.
const MAX_XZ_KIB: u32 = 160 << 10;
/// Unit in which the file is read.
const READ_SIZE: usize = 256 << 10;

/// A compressor that the kernel's build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `CONFIG_KERNEL_GZIP`.
    Gzip,
    /// `CONFIG_KERNEL_XZ`: LZMA2 behind the x86 branch filter.
    Xz,
    /// `CONFIG_KERNEL_ZSTD`.
    Zstd,
    /// `CONFIG_KERNEL_LZ4`: the legacy frame.
    Lz4,
    /// `CONFIG_KERNEL_UNCOMPRESSED`.
    None,
    /// `CONFIG_KERNEL_BZIP2`: recognised, not unpacked here.
    Bzip2,
    /// `CONFIG_KERNEL_LZMA`: recognised, not unpacked here.
    Lzma,
    /// `CONFIG_KERNEL_LZO`: recognised, not unpacked here.
    Lzo,
}

impl Compression {
    /// Tells the format by the payload's first bytes.
    pub fn detect(magic: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 8] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"\x7fELF", Compression::None),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\0\0", Compression::Lzma),
            (b"\x89LZO\0\r\n", Compression::Lzo),
        ];
        MAGICS
            .iter()
            .find(|(bytes, _)| magic.starts_with(bytes))
            .map(|&(_, format)| format)
    }

    /// The name people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::None => "no compression",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
        }
    }

    /// Whether [`Self::reader`] can unpack it.
    pub fn is_supported(self) -> bool {
        !matches!(self, Self::Bzip2 | Self::Lzma | Self::Lzo)
    }

    /// A stream of the unpacked bytes. Fails where the format is none of ours or its header is broken.
    pub fn reader<'a>(self, packed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        let packed = BufReader::with_capacity(READ_SIZE, packed);
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::GzDecoder::new(packed)),
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                packed, false, MAX_XZ_KIB,
            )),
            Self::Zstd => Box::new(
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, MAX_WINDOW)
                    .map_err(io::Error::other)?,
            ),
            Self::Lz4 => Box::new(LegacyLz4::new(packed)?),
            Self::None => Box::new(packed),
            Self::Bzip2 | Self::Lzma | Self::Lzo => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, self.name()));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;

    fn unpack(format: Compression, packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        format.reader(packed)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn every_supported_format_gives_back_what_was_packed() {
        let plain = testing::x86_like_bytes(300 << 10);
        for format in testing::FORMATS {
            let packed = testing::pack(format, &plain);
            assert_eq!(Compression::detect(&packed), Some(format));
            let unpacked = unpack(format, &packed).unwrap();
            assert!(unpacked == plain, "{}", format.name());
        }
    }

    #[test]
    fn a_stream_cut_anywhere_is_an_error_and_no_panic() {
        let plain = testing::x86_like_bytes(4 << 10);
        for format in testing::FORMATS {
            let packed = testing::pack(format, &plain);
            // The appended length is the last thing, and is not the decoder's.
            let end = packed.len() - if format == Compression::Gzip { 0 } else { 4 };
            for cut in 0..end {
                let unpacked = unpack(format, &packed[..cut]);
                assert!(
                    unpacked.is_err() || unpacked.is_ok_and(|bytes| bytes.len() < plain.len()),
                    "{} cut at {cut} of {end}",
                    format.name()
                );
            }
        }
    }

    #[test]
    fn formats_that_are_not_unpacked_are_named() {
        for (magic, name) in [
            (&b"BZh91AY"[..], "bzip2"),
            (b"\x5d\0\0\x80", "lzma"),
            (b"\x89LZO\0\r\n\x1a", "lzo"),
        ] {
            let format = Compression::detect(magic).unwrap();
            assert!(!format.is_supported());
            assert_eq!(format.name(), name);
            assert!(format.reader(magic).is_err());
        }
        assert_eq!(Compression::detect(b"\x89PNG\r\n"), None);
        assert_eq!(Compression::detect(b""), None);
    }
}
