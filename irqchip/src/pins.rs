//! The split irqchip's pins: our IOAPIC's registers, and the lines that lead to it.
//!
//! A line's eventfd is an irqfd all the same. What an in-kernel IOAPIC does at each interrupt is done
//! here when the guest programmes an entry: the pin's GSI is routed to the message that the entry
//! stands for, and the irqfds of its lines are attached while it is not masked.
//!
//! ```text
//!  guest writes an entry ─▶ Ioapic ─▶ route of GSI = pin ─▶ attach or detach the lines' irqfds
//!
//!  level:  raise() ─▶ remote IRR set, irqfd ─▶ LAPIC ─▶ handler ─▶ EOI ─▶ KVM_EXIT_IOAPIC_EOI
//!             ▲                                                              │ remote IRR cleared
//!             └──────────── still holds? ◀──── resample() of each line ◀─────┘
//! ```
//!
//! * A masked pin ignores edges (82093AA, 3.2.4, bit 16): what an edge line's eventfd has gathered is
//!   thrown away when the pin is unmasked. A level line's is its level, and is delivered then.
//! * A level line that is raised while remote IRR is set adds nothing: it is asked again at the end
//!   of the interrupt. Whoever writes its eventfd instead of calling `raise` passes remote IRR
//!   by: at worst one interrupt too many, for a driver that then finds nothing to do.
//! * A masked pin keeps its route, so that the end of an interrupt still on its way is told to us.
//!
//! **Locks.** The pins' lock is taken before the routing table's, never after.

use std::sync::Arc;

use crate::chip::Chip;
use crate::ioapic::{Effect, Entry, Ioapic};
use crate::line::{AttachedLine, Ends, first_lines};
use crate::{Error, Trigger, VcpuState};

/// IOAPIC and lines; one lock around both.
#[derive(Debug)]
pub(crate) struct Pins {
    pub(crate) ioapic: Ioapic,
    lines: Vec<AttachedLine>,
    /// Pins that [`Chip::drive`] holds high.
    driven: u32,
    /// KVM listens to none of the lines, whatever their pins want.
    held: bool,
}

impl Pins {
    pub(crate) fn new() -> Self {
        Self {
            ioapic: Ioapic::new(),
            lines: Vec::new(),
            driven: 0,
            held: false,
        }
    }

    /// Adds a line to its pin.
    pub(crate) fn add(&mut self, chip: &Chip, ends: &Arc<Ends>) -> Result<(), Error> {
        let mut line = AttachedLine::new(ends);
        line.set_attached(chip, self.listens(ends.pin))?;
        self.lines.push(line);
        Ok(())
    }

    /// Whether KVM is to listen to a pin's lines.
    fn listens(&self, pin: u32) -> bool {
        !self.held && !self.ioapic.entry(pin).is_masked()
    }

    /// Detaches all lines, or attaches them again as their pins want; the first error, after all were tried.
    pub(crate) fn set_held(&mut self, chip: &Chip, held: bool) -> Result<(), Error> {
        self.held = held;
        let mut done = Ok(());
        for pin in 0..crate::IOAPIC_PINS {
            done = done.and(self.settle_attached(chip, pin));
        }
        done
    }

    /// Takes a line off its pin.
    pub(crate) fn remove(&mut self, chip: &Chip, ends: &Arc<Ends>) -> Result<(), Error> {
        let mut detached = Ok(());
        self.lines.retain_mut(|line| {
            let stays = !Arc::ptr_eq(&line.ends, ends);
            if !stays {
                detached = line.set_attached(chip, false);
            }
            stays
        });
        detached
    }

    /// What a line's `raise` comes to.
    pub(crate) fn raise(&mut self, ends: &Ends) -> std::io::Result<()> {
        let entry = self.ioapic.entry(ends.pin);
        if entry.is_masked() {
            return match ends.trigger {
                Trigger::Edge => Ok(()),
                Trigger::Level => ends.event.write(1),
            };
        }
        if entry.is_level() {
            if entry.remote_irr() {
                return Ok(());
            }
            self.ioapic.set_remote_irr(ends.pin);
        }
        ends.event.write(1)
    }

    /// The guest wrote the registers.
    pub(crate) fn write(&mut self, chip: &Chip, offset: u64, data: &[u8]) -> Result<(), Error> {
        match self.ioapic.write(offset, data) {
            Effect::None => Ok(()),
            Effect::EndOfInterrupt(vector) => {
                self.end_of_interrupt(chip, vector);
                Ok(())
            }
            Effect::Entry { pin, before } => self.update(chip, pin, before).inspect_err(|_| {
                // What KVM would not take the guest has not written: masked, it does no harm.
                self.ioapic.set_entry(pin, before);
            }),
        }
    }

    /// All level interrupts with this vector have ended: their devices are asked again.
    pub(crate) fn end_of_interrupt(&mut self, chip: &Chip, vector: u8) {
        let ended = self.ioapic.end_of_interrupt(vector);
        self.ask_again(chip, ended);
    }

    /// Level pins of which no local APIC has the interrupt. KVM may have taken the end of one and be about to
    /// tell us, as the vCPU's next exit, which it then never does: nothing that can be saved says so.
    pub(crate) fn ended(&self, vcpus: &[VcpuState]) -> u32 {
        let directed = vcpus.iter().all(VcpuState::directs_ends);
        let ended = |pin: &u32| {
            let entry = self.ioapic.entry(*pin);
            let has = |vcpu: &VcpuState| vcpu.has_interrupt(entry.vector());
            entry.is_level() && !directed && !vcpus.iter().any(has)
        };
        let pins = (0..crate::IOAPIC_PINS).filter(ended);
        pins.fold(0, |pins, pin| pins | 1 << pin)
    }

    /// Ends the interrupts of these pins, on a chip that was restored. A device whose interrupt had no end to
    /// wait for is asked once more than it need be.
    pub(crate) fn end(&mut self, chip: &Chip, pins: u32) {
        let ended = (0..crate::IOAPIC_PINS).filter(|pin| pins >> pin & 1 != 0);
        let ended = ended.filter(|pin| self.ioapic.end_of_pin(*pin)).collect();
        self.ask_again(chip, ended);
    }

    fn ask_again(&mut self, chip: &Chip, pins: Vec<u32>) {
        for pin in pins {
            if let Err(error) = self.deliver_driven(chip, pin) {
                tracing::debug!(pin, %error, "a driven pin is not delivered again");
            }
            for line in self.lines.iter().filter(|line| line.ends.pin == pin) {
                let Some(resample) = &line.ends.resample else {
                    continue;
                };
                // Full only if nobody has read it four billion times; then it is signalled anyway.
                let _ = resample.write(1);
            }
        }
    }

    /// Pins that are driven high.
    pub(crate) fn driven(&self) -> u32 {
        self.driven
    }

    /// Takes over registers and driven pins, and makes KVM's side that of all entries. Nothing is delivered:
    /// the level of a driven pin either was, and then remote IRR says so, or waits for its pin to be unmasked.
    pub(crate) fn restore(
        &mut self,
        chip: &Chip,
        ioapic: Ioapic,
        driven: u32,
    ) -> Result<(), Error> {
        (self.ioapic, self.driven) = (ioapic, driven);
        for pin in 0..crate::IOAPIC_PINS {
            let entry = self.ioapic.entry(pin);
            if !entry.is_masked() || entry.remote_irr() {
                chip.set_pin_route(pin, entry.message())?;
            }
            self.settle_attached(chip, pin)?;
        }
        Ok(())
    }

    /// Pins of which a line was raised that KVM was not listening to. An edge at a masked pin is none.
    pub(crate) fn pending(&self) -> u32 {
        let waits = |line: &&AttachedLine| {
            let masked = self.ioapic.entry(line.ends.pin).is_masked();
            line.is_pending() && (line.ends.is_level() || !masked)
        };
        let pins = self.lines.iter().filter(waits).map(|line| line.ends.pin);
        pins.fold(0, |pins, pin| pins | 1 << pin)
    }

    /// Raises a line on each of these pins, past remote IRR: that was set by who raised it before.
    pub(crate) fn set_pending(&mut self, pins: u32) -> std::io::Result<()> {
        for line in first_lines(&self.lines, pins) {
            let entry = self.ioapic.entry(line.ends.pin);
            if entry.is_level() && !entry.is_masked() {
                self.ioapic.set_remote_irr(line.ends.pin);
            }
            line.ends.event.write(1)?;
        }
        Ok(())
    }

    /// Drives a pin high or low, as a wire does: an edge counts once, a level until it is low.
    pub(crate) fn drive(
        &mut self,
        chip: &Chip,
        pin: u32,
        high: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        let before = self.driven;
        self.driven = before & !(1 << pin) | u32::from(high) << pin;
        let entry = self.ioapic.entry(pin);
        if entry.is_level() {
            self.deliver_driven(chip, pin)
        } else if self.driven & !before != 0 && !entry.is_masked() {
            chip.send(entry.message())
        } else {
            Ok(())
        }
    }

    /// Delivers the level of a pin that is driven high, unless it is masked or waits for an end.
    fn deliver_driven(&mut self, chip: &Chip, pin: u32) -> Result<(), kvm_ioctls::Error> {
        let entry = self.ioapic.entry(pin);
        let high = self.driven >> pin & 1 != 0;
        if !high || !entry.is_level() || entry.is_masked() || entry.remote_irr() {
            return Ok(());
        }
        self.ioapic.set_remote_irr(pin);
        chip.send(entry.message())
    }

    fn update(&mut self, chip: &Chip, pin: u32, before: Entry) -> Result<(), Error> {
        let entry = self.ioapic.entry(pin);
        if entry.is_masked() {
            return self.settle_attached(chip, pin);
        }
        chip.set_pin_route(pin, entry.message())?;
        if before.is_masked() {
            self.settle_before_unmask(pin);
            self.settle_attached(chip, pin)?;
        }
        self.deliver_driven(chip, pin)
            .map_err(|source| Error::Drive { pin, source })
    }

    /// Decides what was written to the eventfds of a masked pin: see the module's header.
    fn settle_before_unmask(&mut self, pin: u32) {
        let entry = self.ioapic.entry(pin);
        let lines = self.lines.iter().filter(|line| line.ends.pin == pin);
        for line in lines {
            let asked_again = entry.is_level() && entry.remote_irr();
            if !line.ends.is_level() || asked_again {
                // Nothing there is as good.
                let _ = line.ends.event.read();
            }
        }
        let mut lines = self.lines.iter().filter(|line| line.ends.pin == pin);
        if entry.is_level() && lines.any(AttachedLine::is_pending) {
            self.ioapic.set_remote_irr(pin);
        }
    }

    /// Has KVM listen to a pin's lines or not, as it should.
    fn settle_attached(&mut self, chip: &Chip, pin: u32) -> Result<(), Error> {
        let listens = self.listens(pin);
        let mut done = Ok(());
        for line in self.lines.iter_mut().filter(|line| line.ends.pin == pin) {
            done = done.and(line.set_attached(chip, listens));
        }
        done
    }
}
