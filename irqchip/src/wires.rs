//! What leads to the pins of KVM's own IOAPIC and PICs: lines, and pins that are driven.
//!
//! KVM does everything with them but two things. It does not say who holds a pin high, which a saved state
//! needs; and it carries a line's event to its IOAPIC by a worker of its own, a moment after the write:
//!
//! ```text
//!  write(event) ─▶ irqfd ─▶ kernel worker ─▶ IOAPIC and PIC
//!                     ╰─ detached: KVM waits for the worker; what is written from now on stays in the eventfd
//! ```
//!
//! So lines are detached while the machine is saved. With the last level line of a pin KVM takes the pin low:
//! it must not, so each such pin has a keeper meanwhile, a line to which nobody writes.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::chip::Chip;
use crate::line::{AttachedLine, Ends, first_lines};
use crate::{Error, Trigger};

/// Lines and driven pins; one lock around both.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    lines: Vec<AttachedLine>,
    /// Pins that [`Chip::drive`] holds high.
    driven: u32,
    /// While the lines are detached, one for each pin that has a level line.
    keepers: Option<Vec<AttachedLine>>,
}

impl Wires {
    /// Adds a line to its pin.
    pub(crate) fn add(&mut self, chip: &Chip, ends: &Arc<Ends>) -> Result<(), Error> {
        let mut line = AttachedLine::new(ends);
        line.set_attached(chip, self.keepers.is_none())?;
        self.lines.push(line);
        Ok(())
    }

    /// Takes a line off its pin.
    pub(crate) fn remove(&mut self, chip: &Chip, ends: &Arc<Ends>) -> Result<(), Error> {
        let at = |line: &AttachedLine| Arc::ptr_eq(&line.ends, ends);
        match self.lines.iter().position(at) {
            Some(at) => self.lines.remove(at).set_attached(chip, false),
            None => Ok(()),
        }
    }

    /// Drives a pin high or low.
    pub(crate) fn drive(
        &mut self,
        chip: &Chip,
        pin: u32,
        high: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        chip.vm().set_irq_line(pin, high)?;
        self.driven = self.driven & !(1 << pin) | u32::from(high) << pin;
        Ok(())
    }

    /// Pins that are driven high.
    pub(crate) fn driven(&self) -> u32 {
        self.driven
    }

    /// Detaches all lines: what was written before is in KVM's controllers when this returns.
    pub(crate) fn hold(&mut self, chip: &Chip) -> Result<(), Error> {
        let level = self.lines.iter().filter(|line| line.ends.is_level());
        let level: BTreeSet<u32> = level.map(|line| line.ends.pin).collect();
        let keepers = self.keepers.get_or_insert_default();
        for pin in level {
            let mut keeper = AttachedLine::new(&Ends::new(pin, Trigger::Level)?);
            keeper.set_attached(chip, true)?;
            keepers.push(keeper);
        }
        let mut lines = self.lines.iter_mut();
        lines.try_for_each(|line| line.set_attached(chip, false))
    }

    /// Attaches them again; the first error, after all were tried.
    pub(crate) fn release(&mut self, chip: &Chip) -> Result<(), Error> {
        let keepers = self.keepers.take().unwrap_or_default();
        let mut done = Ok(());
        for line in &mut self.lines {
            done = done.and(line.set_attached(chip, true));
        }
        // After the lines, so that no pin is without one.
        for mut keeper in keepers {
            done = done.and(keeper.set_attached(chip, false));
        }
        done
    }

    /// Pins of which a line was raised while it was detached.
    pub(crate) fn pending(&self) -> u32 {
        let pending = self.lines.iter().filter(|line| line.is_pending());
        pending.fold(0, |pins, line| pins | 1 << line.ends.pin)
    }

    /// Raises a line on each of these pins.
    pub(crate) fn set_pending(&self, pins: u32) -> std::io::Result<()> {
        first_lines(&self.lines, pins).try_for_each(|line| line.ends.event.write(1))
    }
}
