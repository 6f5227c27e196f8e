//! Randomising a kernel that the VMM unpacked, as its own unpacker would have done.
//!
//! A kernel's build with `CONFIG_RANDOMIZE_BASE` appends the relocations to the ELF image before it packs both:
//!
//! ```text
//!   ELF image │ 0 │ 64-bit places │ 0 │ inverse 32-bit places │ 0 │ 32-bit places
//! ```
//!
//! Each place is the low half of the virtual address, as linked, of a number to change. Moving the kernel by
//! `delta` adds it to the numbers at the 64-bit and 32-bit places and takes it from the inverse ones (offsets
//! from moving code to per-CPU data, which does not move); kernels since 6.15 have no inverse list. Where
//! the kernel lies in physical memory is another matter and does not change: its first code finds out.
//!
//! Linux arch/x86/boot/compressed/misc.c, handle_relocations; kaslr.c, find_random_virt_addr.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestRam;
use crate::memory::layout::KERNEL_MIN_START;

/// Where the kernel's text is mapped: `__START_KERNEL_map`, of which places have the low half.
const START_KERNEL_MAP: u32 = 0x8000_0000;
/// How much is mapped there with `CONFIG_RANDOMIZE_BASE`.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;

/// Why a kernel was not moved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A relocation outside the kernel.
    #[error("broken relocations: {place:#x} is not in the kernel, which ends at {end:#x}")]
    Outside {
        /// Low half of the virtual address.
        place: u32,
        /// End of the kernel, guest physical.
        end: u64,
    },
    /// Guest memory could not be changed.
    #[error("cannot relocate the kernel at {gpa:#x}")]
    Memory {
        /// Guest physical address.
        gpa: u64,
        /// What `vm-memory` said.
        source: GuestMemoryError,
    },
    /// No random numbers.
    #[error("cannot read /dev/urandom for the kernel's place")]
    Random(#[source] io::Error),
}

/// Whether the command line forbids to randomise.
pub fn is_forbidden(cmdline: &str) -> bool {
    cmdline.split_whitespace().any(|word| word == "nokaslr")
}

/// The places to change, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relocations {
    abs64: Vec<u32>,
    inverse32: Vec<u32>,
    abs32: Vec<u32>,
}

impl Relocations {
    /// Reads what is behind the ELF image; `None` where that is something else, or nothing.
    pub fn parse(tail: &[u8]) -> Option<Self> {
        if tail.is_empty() || !tail.len().is_multiple_of(4) {
            return None;
        }
        let words: Vec<u32> = tail
            .chunks_exact(4)
            .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]))
            .collect();
        let mut lists = words.split(|&word| word == 0).map(<[u32]>::to_vec);
        // Nothing is before the first terminator.
        if !lists.next()?.is_empty() {
            return None;
        }
        let lists: Vec<_> = lists.collect();
        match <[_; 3]>::try_from(lists) {
            Ok([abs64, inverse32, abs32]) => Some(Self {
                abs64,
                inverse32,
                abs32,
            }),
            Err(lists) => {
                let [abs64, abs32] = <[_; 2]>::try_from(lists).ok()?;
                Some(Self {
                    abs64,
                    inverse32: Vec::new(),
                    abs32,
                })
            }
        }
    }

    /// Moves the kernel, which is in guest memory `bias` above the addresses it was linked for and ends at `end`, by
    /// `delta` in virtual memory.
    pub fn apply(
        &self,
        ram: &GuestRam,
        bias: u64,
        end: GuestAddress,
        delta: u64,
    ) -> Result<(), Error> {
        let narrow = delta as u32;
        let image = Image { ram, bias, end };
        image.change(&self.abs64, |v: u64| v.wrapping_add(delta))?;
        image.change(&self.inverse32, |v: u32| v.wrapping_sub(narrow))?;
        image.change(&self.abs32, |v: u32| v.wrapping_add(narrow))
    }
}

/// A kernel in guest memory.
struct Image<'a> {
    ram: &'a GuestRam,
    bias: u64,
    end: GuestAddress,
}

impl Image<'_> {
    /// Changes the number at each place.
    fn change<T: ByteValued>(&self, places: &[u32], new: impl Fn(T) -> T) -> Result<(), Error> {
        let (memory, end) = (self.ram.memory(), self.end.0);
        let len = size_of::<T>() as u64;
        for &place in places {
            let gpa = place
                .checked_sub(START_KERNEL_MAP)
                .map(u64::from)
                .filter(|&gpa| gpa >= KERNEL_MIN_START)
                .map(|gpa| gpa + self.bias)
                .filter(|&gpa| gpa + len <= end)
                .ok_or(Error::Outside { place, end })?;
            let at = GuestAddress(gpa);
            memory
                .read_obj(at)
                .and_then(|value| memory.write_obj(new(value), at))
                .map_err(|source| Error::Memory { gpa, source })?;
        }
        Ok(())
    }
}

/// By how much a kernel is moved that is linked for `start`, needs `size` bytes from there and must keep
/// `alignment`: one of all distances that keep it in its mapping, picked by `random`.
pub fn delta(random: u64, start: u64, size: u64, alignment: u64) -> u64 {
    if alignment == 0 {
        return 0;
    }
    let room = KERNEL_IMAGE_SIZE.saturating_sub(start.saturating_add(size));
    random % (1 + room / alignment) * alignment
}

/// 64 random bits of the host's.
pub fn random() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(Error::Random)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;

    const END: GuestAddress = GuestAddress(0x20_0000);

    fn tail(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn three_lists_and_two_lists_are_read() {
        let old = Relocations::parse(&tail(&[0, 1, 2, 0, 3, 0, 4])).unwrap();
        assert_eq!(
            (old.abs64, old.inverse32, old.abs32),
            (vec![1, 2], vec![3], vec![4])
        );
        let new = Relocations::parse(&tail(&[0, 1, 0, 4])).unwrap();
        assert_eq!(
            (new.abs64, new.inverse32, new.abs32),
            (vec![1], vec![], vec![4])
        );
        let empty = Relocations::parse(&tail(&[0, 0, 0])).unwrap();
        assert!(empty.abs64.is_empty() && empty.abs32.is_empty());
    }

    #[test]
    fn anything_else_is_no_relocations() {
        for words in [
            &[][..],
            &[7],
            &[0],
            &[0, 1, 0, 2, 0, 3, 0, 4],
            &[1, 0, 2, 0, 3],
        ] {
            assert_eq!(Relocations::parse(&tail(words)), None, "{words:?}");
        }
        assert_eq!(Relocations::parse(b"\0\0\0\0\0\0\0\0\0"), None);
    }

    #[test]
    fn each_kind_of_place_is_changed_in_its_way() {
        let ram = testing::ram(2 << 20);
        let at = |gpa: u64| GuestAddress(gpa);
        ram.memory()
            .write_obj(0xffff_ffff_8100_0000u64, at(0x10_0000))
            .unwrap();
        ram.memory().write_obj(0x10u32, at(0x10_0010)).unwrap();
        ram.memory()
            .write_obj(0x8100_0000u32, at(0x10_0020))
            .unwrap();
        let relocations = Relocations {
            abs64: vec![0x8010_0000],
            inverse32: vec![0x8010_0010],
            abs32: vec![0x8010_0020],
        };
        relocations.apply(&ram, 0, END, 0x20_0000).unwrap();
        let wide: u64 = ram.memory().read_obj(at(0x10_0000)).unwrap();
        assert_eq!(wide, 0xffff_ffff_8120_0000);
        let inverse: u32 = ram.memory().read_obj(at(0x10_0010)).unwrap();
        assert_eq!(inverse, 0x10u32.wrapping_sub(0x20_0000));
        let narrow: u32 = ram.memory().read_obj(at(0x10_0020)).unwrap();
        assert_eq!(narrow, 0x8120_0000);
    }

    #[test]
    fn places_outside_the_kernel_are_refused() {
        let ram = testing::ram(4 << 20);
        for place in [0, 0x7fff_ffff, 0x8000_7000, 0x801f_fff9, u32::MAX] {
            let relocations = Relocations {
                abs64: vec![place],
                inverse32: vec![],
                abs32: vec![],
            };
            let error = relocations.apply(&ram, 0, END, 0x20_0000).unwrap_err();
            assert!(matches!(error, Error::Outside { .. }), "{place:#x}");
        }
    }

    #[test]
    fn the_kernel_stays_aligned_and_in_its_mapping() {
        let (start, size, alignment) = (16 << 20, 56 << 20, 2 << 20);
        let room = KERNEL_IMAGE_SIZE - start - size;
        let deltas: std::collections::BTreeSet<_> = (0..1000)
            .map(|random| delta(random, start, size, alignment))
            .collect();
        assert_eq!(deltas.first(), Some(&0));
        assert_eq!(deltas.last(), Some(&room));
        assert!(deltas.iter().all(|d| d.is_multiple_of(alignment)));
        assert_eq!(deltas.len() as u64, room / alignment + 1);
        assert_eq!(delta(u64::MAX, start, 2 << 30, alignment), 0);
        assert_eq!(delta(u64::MAX, start, size, 0), 0);
    }

    #[test]
    fn nokaslr_is_a_word_of_its_own() {
        assert!(is_forbidden("quiet nokaslr"));
        assert!(!is_forbidden("quiet nokaslr=1 xnokaslr"));
    }
}
