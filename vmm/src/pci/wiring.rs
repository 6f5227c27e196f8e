//! What a function needs from the interrupt chip: vectors and doorbells.
//!
//! Two implementations: [`Chip`] over KVM, and a fake that tests look into. Both traits are called with
//! the function's lock held, on vCPU threads; no call blocks longer than an ioctl.

use std::sync::Arc;

use berth_irqchip::{Chip, DoorbellAddress, Msi, MsiMessage};
use vmm_sys_util::eventfd::EventFd;

/// Makes vectors and doorbells.
pub trait Wiring: Send + Sync {
    /// A vector that is masked and has no message.
    fn vector(&self) -> Result<Box<dyn Vector>, WiringError>;
    /// A doorbell that is nowhere.
    fn doorbell(&self) -> Result<Box<dyn DoorbellAt>, WiringError>;
}

/// One MSI-X vector (PCI 3.0, 6.8.2).
pub trait Vector: Send + Sync {
    /// Whoever writes it raises the interrupt.
    fn event(&self) -> &EventFd;
    /// Where an event goes from now on.
    fn set_message(&self, address: u64, data: u32) -> Result<(), WiringError>;
    /// Events stay pending from now on.
    fn mask(&self) -> Result<(), WiringError>;
    /// Events are delivered again, one that is pending at once.
    fn unmask(&self) -> Result<(), WiringError>;
    /// The pending bit.
    fn is_pending(&self) -> bool;
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
    fn vector(&self) -> Result<Box<dyn Vector>, WiringError> {
        let msi = self.msi()?;
        msi.mask()?;
        Ok(Box::new(msi))
    }

    fn doorbell(&self) -> Result<Box<dyn DoorbellAt>, WiringError> {
        Ok(Box::new(Chip::doorbell(self)?))
    }
}

impl Vector for Msi {
    fn event(&self) -> &EventFd {
        self.event()
    }

    fn set_message(&self, address: u64, data: u32) -> Result<(), WiringError> {
        Ok(self.set_message(MsiMessage { address, data })?)
    }

    fn mask(&self) -> Result<(), WiringError> {
        Ok(self.mask()?)
    }

    fn unmask(&self) -> Result<(), WiringError> {
        Ok(self.unmask()?)
    }

    fn is_pending(&self) -> bool {
        self.is_pending()
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
