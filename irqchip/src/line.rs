//! A wired interrupt: one IOAPIC pin, raised by writing an eventfd.
//!
//! **Edge**: every write is one pulse. **Level**: a write asserts the pin, which stays asserted
//! until the guest ends the interrupt; then it is deasserted and the resample eventfd signalled, on
//! which a device whose condition still holds raises again. KVM does so itself, or, with the split
//! irqchip, [`Chip::end_of_interrupt`].
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
use crate::{Error, IOAPIC_PINS, Mode, sys};

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
    ends: Arc<Ends>,
}

/// Where a line begins and where it answers.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) pin: u32,
    pub(crate) trigger: Trigger,
    pub(crate) event: EventFd,
    /// A level line has one.
    pub(crate) resample: Option<EventFd>,
}

/// A line at its pin, and whether KVM listens to its eventfd.
#[derive(Debug)]
pub(crate) struct AttachedLine {
    pub(crate) ends: Arc<Ends>,
    attached: bool,
}

impl AttachedLine {
    pub(crate) fn new(ends: &Arc<Ends>) -> Self {
        Self {
            ends: Arc::clone(ends),
            attached: false,
        }
    }

    /// Raised while KVM was not listening.
    pub(crate) fn is_pending(&self) -> bool {
        !self.attached && sys::is_readable(&self.ends.event)
    }

    pub(crate) fn set_attached(&mut self, chip: &Chip, attached: bool) -> Result<(), Error> {
        if self.attached == attached {
            return Ok(());
        }
        let (event, gsi, vm) = (&self.ends.event, self.ends.pin, chip.vm());
        // With the split irqchip the end of an interrupt comes to us.
        let resample = self.ends.resample.as_ref();
        let resample = resample.filter(|_| chip.mode() == Mode::Kernel);
        match (attached, resample) {
            (true, Some(resample)) => vm
                .register_irqfd_with_resample(event, resample, gsi)
                .map_err(|source| Error::Attach { gsi, source })?,
            (true, None) => vm
                .register_irqfd(event, gsi)
                .map_err(|source| Error::Attach { gsi, source })?,
            (false, _) => vm
                .unregister_irqfd(event, gsi)
                .map_err(|source| Error::Detach { gsi, source })?,
        }
        self.attached = attached;
        Ok(())
    }
}

/// The first line on each of these pins. Who raises one raises its pin, and all of them are resampled.
pub(crate) fn first_lines(
    lines: &[AttachedLine],
    pins: u32,
) -> impl Iterator<Item = &AttachedLine> {
    let named = (0..IOAPIC_PINS).filter(move |pin| pins >> pin & 1 != 0);
    named.filter_map(|pin| lines.iter().find(|line| line.ends.pin == pin))
}

impl Ends {
    pub(crate) fn new(pin: u32, trigger: Trigger) -> Result<Arc<Self>, Error> {
        let resample = match trigger {
            Trigger::Edge => None,
            Trigger::Level => Some(new_event()?),
        };
        Ok(Arc::new(Self {
            pin,
            trigger,
            event: new_event()?,
            resample,
        }))
    }

    pub(crate) fn is_level(&self) -> bool {
        self.trigger == Trigger::Level
    }
}

impl Line {
    pub(crate) fn new(chip: &Arc<Chip>, pin: u32, trigger: Trigger) -> Result<Self, Error> {
        if pin >= IOAPIC_PINS {
            return Err(Error::NoPin { pin });
        }
        let ends = Ends::new(pin, trigger)?;
        chip.attach_line(&ends)?;
        Ok(Self {
            chip: Arc::clone(chip),
            ends,
        })
    }

    /// The pin, which is also its GSI in the guest's ACPI tables.
    pub fn pin(&self) -> u32 {
        self.ends.pin
    }

    /// Raises the interrupt: one write of an eventfd, never blocks.
    pub fn raise(&self) -> io::Result<()> {
        self.chip.raise_line(&self.ends)
    }

    /// The eventfd behind [`raise`](Self::raise), for whoever raises the interrupt instead. With the
    /// split irqchip a level interrupt that is raised so does not show in the guest's remote IRR: KVM takes the
    /// event without telling us, and the guest's registers are ours. It is delivered, ended and asked again
    /// all the same; written again before its end it is one interrupt more.
    pub fn event(&self) -> &EventFd {
        &self.ends.event
    }

    /// Signalled whenever the guest ends an interrupt of this pin; a level-triggered line has one.
    /// To be read (it does not block) before the condition is looked at, or a change is missed.
    pub fn resample(&self) -> Option<&EventFd> {
        self.ends.resample.as_ref()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Err(error) = self.chip.detach_line(&self.ends) {
            tracing::warn!(pin = self.ends.pin, %error, "cannot detach an interrupt line");
        }
    }
}
