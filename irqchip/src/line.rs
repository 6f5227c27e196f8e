//! A wired interrupt: one IOAPIC pin, raised by writing an eventfd.
//!
//! **Edge**: every write is one pulse. **Level**: a write asserts the pin, which stays asserted
//! until the guest ends the interrupt; KVM then deasserts it and signals the resample eventfd, on
//! which a device whose condition still holds raises again.
//!
//! ```text
//!  device: condition ─▶ raise() ─▶ pin high ─▶ guest handles, EOI ─▶ pin low ─▶ resample()
//!             ▲                                                                     │
//!             └──────────────────── still holds? ◀──────────────────────────────────┘
//! ```
//!
//! Several level lines may share a pin: each has its own eventfds and all of them are resampled.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::chip::{Chip, new_event};
use crate::{Error, IOAPIC_PINS};

/// How a pin is to be driven; the guest must programme its IOAPIC entry the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// ISA devices: a pulse for each event.
    Edge,
    /// PCI INTx and most ACPI devices: asserted as long as the device wants attention.
    Level,
}

/// One source on one IOAPIC pin. Detached from the pin when dropped.
#[derive(Debug)]
pub struct Line {
    chip: Arc<Chip>,
    pin: u32,
    event: EventFd,
    resample: Option<EventFd>,
}

impl Line {
    pub(crate) fn new(chip: &Arc<Chip>, pin: u32, trigger: Trigger) -> Result<Self, Error> {
        if pin >= IOAPIC_PINS {
            return Err(Error::NoPin { pin });
        }
        let event = new_event()?;
        let resample = match trigger {
            Trigger::Edge => None,
            Trigger::Level => Some(new_event()?),
        };
        let attached = match &resample {
            Some(resample) => chip
                .vm()
                .register_irqfd_with_resample(&event, resample, pin),
            None => chip.vm().register_irqfd(&event, pin),
        };
        attached.map_err(|source| Error::Attach { gsi: pin, source })?;
        chip.count_line_added();
        Ok(Self {
            chip: Arc::clone(chip),
            pin,
            event,
            resample,
        })
    }

    /// The pin, which is also its GSI in the guest's ACPI tables.
    pub fn pin(&self) -> u32 {
        self.pin
    }

    /// Raises the interrupt: one write of an eventfd, never blocks.
    pub fn raise(&self) -> io::Result<()> {
        self.event.write(1)?;
        self.chip.count_line_raised();
        Ok(())
    }

    /// The eventfd behind [`raise`](Self::raise), for whoever raises the interrupt instead.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Signalled whenever the guest ends an interrupt of this pin; a level-triggered line has one.
    /// To be read (it does not block) before the condition is looked at, or a change is missed.
    pub fn resample(&self) -> Option<&EventFd> {
        self.resample.as_ref()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.chip.count_line_removed();
        if let Err(error) = self.chip.vm().unregister_irqfd(&self.event, self.pin) {
            tracing::warn!(pin = self.pin, %error, "cannot detach an interrupt line");
        }
    }
}
