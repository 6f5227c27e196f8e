//! The two ways to configuration space: memory-mapped (ECAM) and by the ports 0xcf8 and 0xcfc.
//!
//! Accesses may have any width and alignment. Port 0xcf9, in between, is the reset register and not
//! ours: 0xcf8 is claimed as one byte, which is enough for the dword writes that begin there.
//!
//! Reference: PCI Express 3.0, 7.2.2; PCI Local Bus 3.0, 3.2.2.3.2.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::tree::{Bdf, Tree};
use crate::bus::BusDevice;

/// First port of the address register.
pub(super) const ADDRESS_PORT: u64 = 0xcf8;
/// First port of the data register.
pub(super) const DATA_PORT: u64 = 0xcfc;
/// Address register: accesses to the data register reach configuration space.
const ENABLE: u32 = 1 << 31;

/// Configuration space in memory, 4 KiB a function.
pub(super) struct Ecam(pub(super) Arc<Mutex<Tree>>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read(Bdf((offset >> 12) as u16), offset as usize & 0xfff, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let at = Bdf((offset >> 12) as u16);
        // A device that was taken out ends after the lock, which the statement holds.
        let ejected = lock(&self.0).write(at, offset as usize & 0xfff, data);
        drop(ejected);
    }
}

/// The address register.
#[derive(Default)]
pub(super) struct AddressPort(AtomicU32);

impl BusDevice for AddressPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        match data.len() {
            4 => data.copy_from_slice(&self.0.load(Ordering::Relaxed).to_le_bytes()),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Ok(bytes) = data.try_into() {
            self.0
                .store(u32::from_le_bytes(bytes) & 0x80ff_fffc, Ordering::Relaxed);
        }
    }
}

/// The data register: four ports, the first 256 bytes of each function.
pub(super) struct DataPort {
    pub(super) address: Arc<AddressPort>,
    pub(super) tree: Arc<Mutex<Tree>>,
}

impl DataPort {
    /// The function and the register, of an access of `len` bytes; `None` where nothing is enabled.
    fn target(&self, offset: u64, len: usize) -> Option<(Bdf, usize, usize)> {
        let address = self.address.0.load(Ordering::Relaxed);
        let offset = usize::try_from(offset).ok().filter(|&offset| offset < 4)?;
        let register = (address & 0xfc) as usize + offset;
        (address & ENABLE != 0).then(|| (Bdf((address >> 8) as u16), register, len.min(4 - offset)))
    }
}

impl BusDevice for DataPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((bdf, register, len)) = self.target(offset, data.len()) {
            lock(&self.tree).read(bdf, register, &mut data[..len]);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register, len)) = self.target(offset, data.len()) {
            let ejected = lock(&self.tree).write(bdf, register, &data[..len]);
            drop(ejected);
        }
    }
}

/// Locks the topology. A panic while it was held left at worst one register half written.
pub(super) fn lock(tree: &Mutex<Tree>) -> std::sync::MutexGuard<'_, Tree> {
    tree.lock().unwrap_or_else(PoisonError::into_inner)
}
