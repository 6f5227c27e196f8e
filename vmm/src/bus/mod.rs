//! Port and memory-mapped I/O dispatch: which device answers at an address.
//!
//! A [`Bus`] is one address space (there are two: ports and MMIO). Devices use interior mutability and
//! may change the bus from inside an access, as a PCI function does when its BAR moves: the lookup
//! clones the device's `Arc` and drops the lock before the device is called.
//!
//! Invariants: ranges never overlap; an access that no device claims reads all ones and writes nothing,
//! as on a PC; an access that starts in a range belongs to that range's device, whole.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A device that answers accesses of vCPU threads. Called concurrently from several of them; must not
/// block on anything but short locks of its own. `offset` and `data` are the guest's: trust neither.
pub trait BusDevice: Send + Sync {
    /// Answers a read of `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes from the range's start.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a write of `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes from the range's start.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be claimed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is empty, wraps around or meets one that is taken.
    #[error("bus range {start:#x}+{len:#x} is empty, wraps around or overlaps {other:#x}")]
    Overlap {
        /// First address asked for.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// Start of the range it meets, or `start` itself.
        other: u64,
    },
}

struct Claim {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space.
#[derive(Default)]
pub struct Bus {
    /// By start address. Held only for the lookup.
    claims: RwLock<BTreeMap<u64, Claim>>,
}

impl Bus {
    /// An address space in which nobody answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Claims `[start, start + len)` for a device.
    pub fn insert(&self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let overlap = |other| Error::Overlap { start, len, other };
        let end = match start.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(overlap(start)),
        };
        let mut claims = self.claims.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, claim)) = claims.range(..end).next_back()
            && other.saturating_add(claim.len) > start
        {
            return Err(overlap(other));
        }
        claims.insert(start, Claim { len, device });
        Ok(())
    }

    /// Gives up the range that starts at `start`; returns whether there was one.
    pub fn remove(&self, start: u64) -> bool {
        self.claims
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&start)
            .is_some()
    }

    /// Gives up all ranges: devices that hold the bus are let go with it.
    pub fn clear(&self) {
        let mut claims = self.claims.write().unwrap_or_else(PoisonError::into_inner);
        let all = std::mem::take(&mut *claims);
        // A device may use the bus while it is dropped.
        drop(claims);
        drop(all);
    }

    /// Reads at `address`; returns whether a device answered. `data` is all ones where none did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((device, offset)) = self.find(address) else {
            data.fill(0xff);
            return false;
        };
        device.read(offset, data);
        true
    }

    /// Writes at `address`; returns whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(address) else {
            return false;
        };
        device.write(offset, data);
        true
    }

    fn find(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64)> {
        let claims = self.claims.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, claim) = claims.range(..=address).next_back()?;
        let offset = address - start;
        (offset < claim.len).then(|| (Arc::clone(&claim.device), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);

    impl BusDevice for Constant {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    fn bus() -> Bus {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, Arc::new(Constant(1))).unwrap();
        bus
    }

    #[test]
    fn the_owner_of_a_range_answers_with_the_offset() {
        let mut data = [0; 2];
        assert!(bus().read(0x10f, &mut data));
        assert_eq!(data, [16, 16]);
    }

    #[test]
    fn nobody_there_reads_all_ones() {
        let mut data = [0; 4];
        assert!(!bus().read(0x110, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus().write(0xff, &data));
    }

    #[test]
    fn ranges_that_overlap_wrap_or_are_empty_are_refused() {
        let bus = bus();
        for (start, len) in [
            (0x10f, 1),
            (0xf0, 0x11),
            (0x80, 0x1000),
            (u64::MAX, 2),
            (0x200, 0),
        ] {
            assert!(
                bus.insert(start, len, Arc::new(Constant(0))).is_err(),
                "{start:#x}+{len:#x}"
            );
        }
        assert_eq!(bus.insert(0x110, 0x10, Arc::new(Constant(0))), Ok(()));
    }

    #[test]
    fn a_removed_range_can_be_taken_again() {
        let bus = bus();
        assert!(bus.remove(0x100));
        assert!(!bus.remove(0x100));
        assert_eq!(bus.insert(0x108, 0x10, Arc::new(Constant(0))), Ok(()));
    }
}
