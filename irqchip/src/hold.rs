//! A chip to which nothing is delivered, so that what is saved of it is all there is.
//!
//! An event is in one of two places only while a chip is held: it has arrived in a controller, or it is in its
//! eventfd. What is on the way between them otherwise is in no state that KVM gives out:
//!
//! * KVM carries what its IOAPIC, or a message to several processors, is to get by a worker of irqfd's;
//! * so it does what was pending when a vector was unmasked;
//! * and a device in another process may write between one look and the next.
//!
//! Detaching an irqfd waits for that worker (`irqfd_shutdown` in KVM), and leaves the eventfd alone.

use crate::{Chip, Error, Msi};

/// From [`Chip::hold`] until it is dropped nothing that is written to a line or vector is delivered.
#[derive(Debug)]
#[must_use = "the chip goes on when this is dropped"]
pub struct Held<'a> {
    pub(crate) chip: &'a Chip,
    pub(crate) msis: &'a [&'a Msi],
}

impl Chip {
    /// Holds back all lines and these vectors, which should be all there are. To be called when no vCPU runs
    /// any more, before the first of them is saved; devices may go on. It takes KVM a few microseconds to a
    /// few milliseconds for each that is attached.
    ///
    /// # Errors
    /// If the chip is held already, or KVM refuses to attach or detach an irqfd; it then goes on as before.
    pub fn hold<'a>(&'a self, msis: &'a [&'a Msi]) -> Result<Held<'a>, Error> {
        if self.set_held(true) {
            return Err(Error::Held);
        }
        let held = Held { chip: self, msis };
        self.hold_vectors(msis)?;
        match self.pins() {
            Some(mut pins) => pins.set_held(self, true)?,
            None => self.wires().hold(self)?,
        }
        Ok(held)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let chip = self.chip;
        let lines = match chip.pins() {
            Some(mut pins) => pins.set_held(chip, false),
            None => chip.wires().release(chip),
        };
        if let Err(error) = lines.and(chip.release_vectors(self.msis)) {
            tracing::warn!(%error, "an interrupt that was held back is not attached again");
        }
        chip.set_held(false);
    }
}
