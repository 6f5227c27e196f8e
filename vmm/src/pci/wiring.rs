//! What a function needs from the interrupt chip: vectors and doorbells.
//!
//! Two implementations: [`Chip`] over KVM, and a fake that tests look into. All traits are called with
//! the function's lock held, on vCPU threads; no call blocks longer than an ioctl.

use std::sync::Arc;

use berth_irqchip::{Chip, DoorbellAddress, Msi, MsiMessage};
use vmm_sys_util::eventfd::EventFd;

/// Makes vectors and doorbells.
pub trait Wiring: Send + Sync {
    /// So many vectors, all masked.
    fn vectors(&self, count: u16) -> Result<Box<dyn Vectors>, WiringError>;
    /// A doorbell that is nowhere.
    fn doorbell(&self) -> Result<Box<dyn DoorbellAt>, WiringError>;
}

/// Where a vector's events go: address and data. Without one they stay pending (PCI 3.0, 6.8.2).
pub type Message = Option<(u64, u32)>;

/// The MSI-X vectors of one function, by their number in its table.
pub trait Vectors: Send + Sync {
    /// Whoever writes it raises the interrupt; `None` past the last vector.
    fn event(&self, vector: usize) -> Option<&EventFd>;
    /// Where events of these vectors, each named once, go from now on; one that is pending goes at once.
    /// All of it is at most one update of the chip's routes. If one cannot be, those of the others that are
    /// to have a message may have none.
    fn set(&self, settings: &[(usize, Message)]) -> Result<(), WiringError>;
    /// The pending bit.
    fn is_pending(&self, vector: usize) -> bool;
}

/// One doorbell: a write of any width at its address signals the event and does nothing else.
pub trait DoorbellAt: Send + Sync {
    /// Signalled by the guest.
    fn event(&self) -> &EventFd;
    /// Puts it at a guest physical address.
    fn place(&self, gpa: u64) -> Result<(), WiringError>;
    /// Takes it away.
    fn remove(&self) -> Result<(), WiringError>;
}

/// The chip refused.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct WiringError(#[from] Box<dyn std::error::Error + Send + Sync>);

impl From<berth_irqchip::Error> for WiringError {
    fn from(error: berth_irqchip::Error) -> Self {
        Self(Box::new(error))
    }
}

impl Wiring for Arc<Chip> {
    fn vectors(&self, count: u16) -> Result<Box<dyn Vectors>, WiringError> {
        let made: Result<Vec<_>, _> = (0..count).map(|_| self.msi()).collect();
        let vectors = ChipVectors {
            chip: Arc::clone(self),
            msis: made?,
        };
        let msis = &vectors.msis;
        self.batch(|batch| msis.iter().for_each(|msi| batch.mask(msi)))?;
        Ok(Box::new(vectors))
    }

    fn doorbell(&self) -> Result<Box<dyn DoorbellAt>, WiringError> {
        Ok(Box::new(Chip::doorbell(self)?))
    }
}

struct ChipVectors {
    chip: Arc<Chip>,
    msis: Vec<Msi>,
}

impl Vectors for ChipVectors {
    fn event(&self, vector: usize) -> Option<&EventFd> {
        Some(self.msis.get(vector)?.event())
    }

    fn set(&self, settings: &[(usize, Message)]) -> Result<(), WiringError> {
        let changed = self.chip.batch(|batch| {
            for (vector, message) in settings {
                let Some(msi) = self.msis.get(*vector) else {
                    continue;
                };
                match *message {
                    Some((address, data)) => {
                        batch.set_message(msi, MsiMessage { address, data });
                        batch.unmask(msi);
                    }
                    None => batch.mask(msi),
                }
            }
        });
        Ok(changed?)
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.msis.get(vector).is_some_and(Msi::is_pending)
    }
}

impl DoorbellAt for berth_irqchip::Doorbell {
    fn event(&self) -> &EventFd {
        self.event()
    }

    fn place(&self, gpa: u64) -> Result<(), WiringError> {
        Ok(self.place(DoorbellAddress::MmioAny { gpa })?)
    }

    fn remove(&self) -> Result<(), WiringError> {
        Ok(self.remove()?)
    }
}
