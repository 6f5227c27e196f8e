//! bzImage: the setup header, the compressed kernel inside, and the image's own 64-bit entry.
//!
//! Linux Documentation/arch/x86/boot.rst. All numbers are the file's word and are checked against its
//! length before use.

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::memory::layout::KERNEL_MIN_START;
use crate::memory::{self, GuestRam};

/// So many first bytes of the file hold the whole setup header.
pub const HEAD_LEN: usize = 0x2000;
/// Where the setup header starts, in the file as in the zero page.
pub const SETUP_HEADER: usize = 0x1f1;
/// Least boot protocol with a 64-bit entry (2.12).
const MIN_VERSION: u16 = 0x020c;
/// The 64-bit entry, from the start of the protected-mode kernel.
const ENTRY64_OFFSET: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;

/// Why a bzImage cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file ends too early.
    #[error("truncated: the bzImage needs {needed} bytes and has {got}")]
    Truncated {
        /// Bytes that its header speaks of.
        needed: u64,
        /// Length of the file.
        got: u64,
    },
    /// Too old, or a 32-bit kernel.
    #[error(
        "boot protocol {}.{:02} without a 64-bit entry; 2.12 and a 64-bit kernel are needed",
        .0 >> 8, .0 & 0xff
    )]
    No64BitEntry(u16),
    /// The header contradicts itself.
    #[error("broken setup header: {0}")]
    Header(String),
    /// It needs more memory than there is.
    #[error(
        "the bzImage unpacks itself in {start:#x}-{end:#x}, which does not fit into guest memory \
         ({low_mib} MiB from address 0)"
    )]
    DoesNotFit {
        /// Where it is loaded.
        start: u64,
        /// End of the memory it asks for.
        end: u64,
        /// RAM below the PCI hole, in MiB.
        low_mib: u64,
    },
    /// The kernel could not be read.
    #[error("cannot read the bzImage at offset {0:#x}")]
    Read(u64, #[source] std::io::Error),
    /// The kernel could not be copied to guest memory.
    #[error("cannot load the bzImage at {0:#x}")]
    Load(u64, #[source] vm_memory::GuestMemoryError),
    /// Guest memory could not be zeroed.
    #[error(transparent)]
    Zero(#[from] memory::Error),
}

/// What the VMM needs of the setup header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupHeader {
    /// The header as it is in the file, from [`SETUP_HEADER`] on: what the zero page starts from.
    pub raw: Vec<u8>,
    /// Highest address that an initramfs may take.
    pub initrd_addr_max: u64,
    /// Whether kernel and initramfs may be above 4 GiB.
    pub above_4_gib: bool,
    /// Longest command line, without the NUL.
    pub cmdline_max: usize,
    /// Offset in the file of the protected-mode kernel.
    kernel_offset: u64,
    /// Offset in the file and length of the compressed kernel.
    payload: (u64, u64),
    pref_address: u64,
    init_size: u64,
    alignment: u64,
}

/// Whether a file's first bytes are those of a bzImage.
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS")
}

impl SetupHeader {
    /// Reads the header from the file's first bytes ([`HEAD_LEN`] of them, or all).
    pub fn parse(head: &[u8], file_len: u64) -> Result<Self, Error> {
        let truncated = |needed| Error::Truncated {
            needed,
            got: file_len,
        };
        // The jump at 0x200 goes over the header: its offset is the header's length.
        let end = 0x202 + usize::from(*head.get(0x201).ok_or(truncated(0x202))?);
        let version = u16::from_le_bytes(field(head, 0x206).ok_or(truncated(0x208))?);
        if version < MIN_VERSION {
            return Err(Error::No64BitEntry(version));
        }
        let raw = head
            .get(SETUP_HEADER..end)
            .ok_or(truncated(end as u64))?
            .to_vec();
        if end < 0x264 {
            return Err(Error::Header(format!(
                "its {} bytes are fewer than protocol 2.12 has",
                raw.len()
            )));
        }
        let u32_at = |at| field(head, at).map_or(0, u32::from_le_bytes);
        let xloadflags = field(head, 0x236).map_or(0, u16::from_le_bytes);
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(Error::No64BitEntry(version));
        }
        let setup_sects = match head[SETUP_HEADER] {
            0 => 4,
            n => u64::from(n),
        };
        let kernel_offset = (setup_sects + 1) * 512;
        let payload: (u64, u64) = (
            kernel_offset + u64::from(u32_at(0x248)),
            u32_at(0x24c).into(),
        );
        let needed = (payload.0 + payload.1).max(kernel_offset + ENTRY64_OFFSET);
        if needed > file_len {
            return Err(truncated(needed));
        }
        Ok(Self {
            initrd_addr_max: u32_at(0x22c).into(),
            above_4_gib: xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0,
            cmdline_max: u32_at(0x238) as usize,
            kernel_offset,
            payload,
            pref_address: field(head, 0x258).map_or(0, u64::from_le_bytes),
            init_size: u32_at(0x260).into(),
            alignment: u32_at(0x230).into(),
            raw,
        })
    }

    /// Where the kernel wants to start, how much memory it needs from there, and its alignment.
    pub fn span(&self) -> (u64, u64, u64) {
        (self.pref_address, self.init_size, self.alignment)
    }

    /// A reader of the compressed kernel.
    pub fn payload<'a, F: Read + Seek>(
        &self,
        file: &'a mut F,
    ) -> Result<impl Read + use<'a, F>, Error> {
        let (offset, len) = self.payload;
        file.seek(SeekFrom::Start(offset))
            .map_err(|error| Error::Read(offset, error))?;
        Ok(file.take(len))
    }

    /// Loads the image at the address it prefers. Returns its 64-bit entry and the end of the memory in
    /// which it unpacks itself.
    pub fn load<F: Seek + ReadVolatile>(
        &self,
        ram: &GuestRam,
        file: &mut F,
        file_len: u64,
    ) -> Result<(GuestAddress, GuestAddress), Error> {
        let start = self.pref_address;
        let len = file_len - self.kernel_offset;
        let end = start.saturating_add(len.max(self.init_size));
        if start < KERNEL_MIN_START || end > ram.low_len() {
            return Err(Error::DoesNotFit {
                start,
                end,
                low_mib: ram.low_len() >> 20,
            });
        }
        ram.zero(start, end - start)?;
        file.seek(SeekFrom::Start(self.kernel_offset))
            .map_err(|error| Error::Read(self.kernel_offset, error))?;
        ram.memory()
            .read_exact_volatile_from(GuestAddress(start), file, len as usize)
            .map_err(|error| Error::Load(start, error))?;
        Ok((GuestAddress(start + ENTRY64_OFFSET), GuestAddress(end)))
    }
}

/// `N` bytes of the header.
fn field<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;
    use std::io::Cursor;

    #[test]
    fn the_payload_is_found() {
        let image = testing::bzimage(b"the payload", 0);
        let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
        let mut bytes = Vec::new();
        header
            .payload(&mut Cursor::new(&image))
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        assert_eq!(bytes, b"the payload");
        assert_eq!(header.cmdline_max, 2047);
    }

    #[test]
    fn truncation_at_every_offset_is_said_and_never_panics() {
        let image = testing::bzimage(b"the payload", 0);
        for len in 0..image.len() {
            let error = SetupHeader::parse(&image[..len], len as u64).unwrap_err();
            assert!(matches!(
                error,
                Error::Truncated { .. } | Error::No64BitEntry(_)
            ));
        }
    }

    #[test]
    fn any_byte_of_the_header_may_be_wrong() {
        let image = testing::bzimage(b"the payload", 0);
        for at in 0x1f0..0x270 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                let _ = SetupHeader::parse(&image, image.len() as u64);
            }
        }
    }

    #[test]
    fn old_and_32_bit_kernels_are_refused() {
        let mut image = testing::bzimage(b"", 0);
        image[0x236] = 0;
        let error = SetupHeader::parse(&image, image.len() as u64).unwrap_err();
        assert!(matches!(error, Error::No64BitEntry(0x20f)));
        image[0x206] = 4;
        let error = SetupHeader::parse(&image, image.len() as u64).unwrap_err();
        assert!(
            error.to_string().starts_with("boot protocol 2.04 "),
            "{error}"
        );
    }

    #[test]
    fn it_is_loaded_where_it_wants_to_be() {
        let image = testing::bzimage(b"the payload", 0x20_0000);
        let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
        let mut file = Cursor::new(&image);
        let ram = testing::ram(4 << 20);
        let (entry, end) = header.load(&ram, &mut file, image.len() as u64).unwrap();
        assert_eq!(entry, GuestAddress(0x10_0200));
        assert_eq!(end, GuestAddress(0x30_0000));
        let first: u8 = ram.memory().read_obj(GuestAddress(0x10_0000)).unwrap();
        assert_eq!(first, 0xcc);

        let small = testing::ram(2 << 20);
        let error = header
            .load(&small, &mut file, image.len() as u64)
            .unwrap_err();
        assert!(matches!(error, Error::DoesNotFit { end: 0x30_0000, .. }));
    }
}
