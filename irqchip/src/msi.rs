//! One MSI or MSI-X vector: a GSI of its own and the eventfd that raises it.
//!
//! The eventfd exists as long as the vector and never changes, so it may be handed to a backend
//! before the guest has set anything up. What changes is whether KVM listens to it:
//!
//! ```text
//!              set_message, not masked              write ─▶ interrupt
//!  ┌──────────┐ ──────────────────────▶ ┌──────────┐
//!  │ detached │                         │ attached │ ◀─┐ set_message: new route
//!  └──────────┘ ◀────────────────────── └──────────┘ ──┘
//!   write: stays in the eventfd,  mask
//!   is_pending(); delivered on attach
//! ```
//!
//! That is the MSI-X contract (PCI 3.0, 6.8.2.9): a masked vector remembers one event in its
//! pending bit and sends it when it is unmasked. KVM looks at the eventfd when it attaches it, so a
//! write made while masked is neither lost nor sent twice.
//!
//! A change of the table costs KVM an RCU grace period, whatever its size: a caller that sets up
//! many vectors does it in one [`Batch`].

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::chip::{Chip, new_event};
use crate::sys;
use crate::{Error, MsiMessage};

/// One vector. Its GSI is free for another vector once it is dropped.
#[derive(Debug)]
pub struct Msi {
    chip: Arc<Chip>,
    gsi: u32,
    event: EventFd,
}

impl Msi {
    pub(crate) fn new(chip: &Arc<Chip>) -> Result<Self, Error> {
        let event = new_event()?;
        let gsi = chip.allocate_vector()?;
        Ok(Self {
            chip: Arc::clone(chip),
            gsi,
            event,
        })
    }

    /// KVM's number for this interrupt, as its tracepoints print it.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Anyone who writes this raises the interrupt; it does not block. Send copies to backends.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Sets where events go, and attaches the vector unless it is masked. Atomic for writers of the
    /// eventfd: each write becomes the old message or the new one. KVM is told nothing if the
    /// message is the same, and nothing before [`unmask`](Self::unmask) if the vector is masked.
    ///
    /// # Errors
    /// The guest chooses the message, and KVM refuses some (an address with bits 32 to 39 set, if
    /// the VM uses x2APIC ids); the vector then keeps the message it had.
    pub fn set_message(&self, message: MsiMessage) -> Result<(), Error> {
        self.chip.batch(|batch| batch.set_message(self, message))
    }

    /// Detaches the vector: no write made after this returns becomes an interrupt before
    /// [`unmask`](Self::unmask). Does nothing if it is masked already.
    pub fn mask(&self) -> Result<(), Error> {
        self.chip.batch(|batch| batch.mask(self))
    }

    /// Attaches the vector again if it has a message; a write made in between is delivered at once,
    /// several as one. Does nothing if it is not masked.
    ///
    /// # Errors
    /// If KVM refuses the message the vector stays masked.
    pub fn unmask(&self) -> Result<(), Error> {
        self.chip.batch(|batch| batch.unmask(self))
    }

    /// The pending bit: somebody wrote the eventfd while KVM was not listening.
    pub fn is_pending(&self) -> bool {
        !self.chip.is_attached(self.gsi) && sys::is_readable(&self.event)
    }

    pub(crate) fn belongs_to(&self, chip: &Chip) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.chip), chip)
    }
}

impl Drop for Msi {
    fn drop(&mut self) {
        self.chip.release_vector(self.gsi, &self.event);
    }
}

/// Changes to several vectors that take effect together, with one update of KVM's table.
///
/// Filled in [`Chip::batch`]; no lock is held meanwhile. Vectors that end up masked are detached
/// first, then the table is replaced, then vectors that end up unmasked are attached. Of several
/// changes to one vector the last of each kind counts.
#[derive(Debug, Default)]
pub struct Batch<'a> {
    changes: Vec<(&'a Msi, Change)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Message(MsiMessage),
    Masked(bool),
}

impl<'a> Batch<'a> {
    /// See [`Msi::set_message`].
    pub fn set_message(&mut self, msi: &'a Msi, message: MsiMessage) {
        self.changes.push((msi, Change::Message(message)));
    }

    /// See [`Msi::mask`].
    pub fn mask(&mut self, msi: &'a Msi) {
        self.changes.push((msi, Change::Masked(true)));
    }

    /// See [`Msi::unmask`].
    pub fn unmask(&mut self, msi: &'a Msi) {
        self.changes.push((msi, Change::Masked(false)));
    }

    pub(crate) fn changes(&self) -> &[(&'a Msi, Change)] {
        &self.changes
    }
}
