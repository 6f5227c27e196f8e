//! The kernel command line in guest memory.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestRam;
use crate::memory::layout::CMDLINE_START;

/// Longest command line of a kernel that does not say (COMMAND_LINE_SIZE on x86, less the NUL).
pub const DEFAULT_MAX: usize = 2047;

/// Why there is no command line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than the kernel reads.
    #[error("the kernel command line has {len} bytes; this kernel takes {max}")]
    TooLong {
        /// Its length.
        len: usize,
        /// Longest that this kernel takes.
        max: usize,
    },
    /// A NUL in the middle would end it.
    #[error("the kernel command line has a NUL at byte {0}")]
    Nul(usize),
    /// Guest memory could not be written.
    #[error("cannot write the kernel command line to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Writes the command line with its NUL. `max` is the kernel's own limit.
pub fn write(ram: &GuestRam, cmdline: &str, max: usize) -> Result<GuestAddress, Error> {
    let max = max.min(u16::MAX.into());
    let len = cmdline.len();
    if len > max {
        return Err(Error::TooLong { len, max });
    }
    if let Some(at) = cmdline.find('\0') {
        return Err(Error::Nul(at));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    let address = GuestAddress(CMDLINE_START);
    ram.memory()
        .write_slice(&bytes, address)
        .map_err(Error::Write)?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;

    #[test]
    fn the_command_line_ends_with_a_nul() {
        let ram = testing::ram(2 << 20);
        ram.memory()
            .write_slice(&[0xff; 16], GuestAddress(CMDLINE_START))
            .unwrap();
        let at = write(&ram, "quiet", 5).unwrap();
        let mut bytes = [0; 7];
        ram.memory().read_slice(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"quiet\0\xff");
    }

    #[test]
    fn too_long_and_nul_are_refused() {
        let ram = testing::ram(2 << 20);
        let error = write(&ram, "quieter", 5).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line has 7 bytes; this kernel takes 5"
        );
        assert!(matches!(write(&ram, "a\0b", 5), Err(Error::Nul(1))));
    }
}
