//! The GSI table, as data: which GSI leads to which pin or message. No ioctl is made here.
//!
//! A GSI (global system interrupt) is KVM's name for an interrupt before it is routed. We number
//! them as a guest's ACPI tables do: GSI `n` below 24 is pin `n` of the IOAPIC, and of the PIC pair
//! for the first 16. The PIT thus arrives at IOAPIC pin 0, and a MADT must not redirect ISA
//! interrupt 0 to pin 2. GSIs from 24 up are MSI vectors, lowest free number first, so that KVM's
//! table, an array as long as the largest GSI, stays short.
//!
//! KVM takes the table as a whole and a pin of both controllers costs two entries, so 16 of the
//! routes KVM allows (`KVM_CAP_IRQ_ROUTING`, 4096) do not become vectors. With the split irqchip there
//! are no controllers in KVM: a pin's route is the message that our IOAPIC's entry stands for.

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};

use crate::Mode;

/// Pins of KVM's IOAPIC; also the first GSI that is an MSI vector.
pub const IOAPIC_PINS: u32 = 24;
/// Pins of the two 8259 PICs together.
const PIC_PINS: u32 = 16;
/// Pins of one 8259.
const PINS_PER_PIC: u32 = 8;

/// What an MSI-capable function writes, and where: the content of one MSI-X table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address of the write, usually `0xfee` and the target APIC.
    pub address: u64,
    /// Data of the write: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// One MSI vector as the table knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vector {
    /// Where events are to go; `None` until the guest has said so.
    pub(crate) message: Option<MsiMessage>,
    /// Whether the holder has masked it.
    pub(crate) masked: bool,
    /// Whether its irqfd is attached right now.
    pub(crate) attached: bool,
    /// Whether it is kept detached while the machine is saved.
    pub(crate) held: bool,
    /// The message that KVM has. It lags behind while the vector is masked: what a guest writes
    /// into its table until it unmasks costs nothing, and a message that KVM would refuse does not
    /// get in the way of other vectors.
    routed: Option<MsiMessage>,
}

impl Vector {
    /// Whether its irqfd should be attached.
    pub(crate) fn wants_irqfd(&self) -> bool {
        self.message.is_some() && !self.masked
    }

    /// The message that KVM should have.
    fn route(&self) -> Option<MsiMessage> {
        if self.wants_irqfd() {
            self.message
        } else {
            self.routed
        }
    }
}

/// Where the pins lead.
#[derive(Debug)]
enum PinRoutes {
    /// To KVM's controllers, always.
    Controllers,
    /// To these messages; a pin that was never unmasked leads nowhere.
    Messages(Box<[Option<MsiMessage>; IOAPIC_PINS as usize]>),
}

/// The pins and the MSI vectors, which come and go.
#[derive(Debug)]
pub(crate) struct Table {
    pins: PinRoutes,
    /// Whether bits 11 to 5 of a message's address are bits 14 to 8 of its destination.
    extended_destinations: bool,
    vectors: BTreeMap<u32, Vector>,
    /// GSIs below `next` that are free again.
    free: BTreeSet<u32>,
    /// Lowest GSI that was never used.
    next: u32,
    /// First GSI that does not exist.
    end: u32,
}

impl Table {
    /// A table without vectors, for a KVM that takes `max_routes` entries.
    pub(crate) fn new(max_routes: u32, mode: Mode) -> Self {
        Self {
            pins: match mode {
                Mode::Kernel => PinRoutes::Controllers,
                Mode::Split => PinRoutes::Messages(Box::new([None; IOAPIC_PINS as usize])),
            },
            extended_destinations: false,
            vectors: BTreeMap::new(),
            free: BTreeSet::new(),
            next: IOAPIC_PINS,
            end: max_routes.saturating_sub(PIC_PINS).max(IOAPIC_PINS),
        }
    }

    /// From now on the guest may name destinations above 255.
    pub(crate) fn extend_destinations(&mut self) {
        self.extended_destinations = true;
    }

    pub(crate) fn has_extended_destinations(&self) -> bool {
        self.extended_destinations
    }

    /// Leads a pin of the split irqchip to a message, or nowhere; returns where it led.
    pub(crate) fn set_pin(&mut self, pin: u32, message: Option<MsiMessage>) -> Option<MsiMessage> {
        match &mut self.pins {
            PinRoutes::Controllers => None,
            PinRoutes::Messages(messages) => {
                std::mem::replace(&mut messages[pin as usize], message)
            }
        }
    }

    /// Adds a vector without a message; `None` if every GSI is taken.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let gsi = match self.free.pop_first() {
            Some(gsi) => gsi,
            None if self.next < self.end => {
                self.next += 1;
                self.next - 1
            }
            None => return None,
        };
        self.vectors.insert(gsi, Vector::default());
        Some(gsi)
    }

    /// Forgets a vector; its GSI may be given to the next one.
    pub(crate) fn release(&mut self, gsi: u32) {
        if self.vectors.remove(&gsi).is_some() {
            self.free.insert(gsi);
        }
    }

    pub(crate) fn vector(&self, gsi: u32) -> Option<&Vector> {
        self.vectors.get(&gsi)
    }

    pub(crate) fn vector_mut(&mut self, gsi: u32) -> Option<&mut Vector> {
        self.vectors.get_mut(&gsi)
    }

    pub(crate) fn vectors(&self) -> impl ExactSizeIterator<Item = &Vector> {
        self.vectors.values()
    }

    /// GSIs whose route in KVM is not what it should be.
    pub(crate) fn stale(&self) -> Vec<u32> {
        let stale = self
            .vectors
            .iter()
            .filter(|(_, vector)| vector.route() != vector.routed);
        stale.map(|(gsi, _)| *gsi).collect()
    }

    /// KVM has taken [`entries`](Self::entries).
    pub(crate) fn set_routed(&mut self) {
        for vector in self.vectors.values_mut() {
            vector.routed = vector.route();
        }
    }

    /// The table as KVM takes it: every pin, then every vector that has a route.
    pub(crate) fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let msi = |gsi, message| msi_entry(gsi, self.destination(message));
        let mut entries = match &self.pins {
            PinRoutes::Controllers => controller_entries(),
            PinRoutes::Messages(messages) => {
                let pins = (0..).zip(messages.iter());
                let routed = pins.filter_map(|(pin, message)| Some(msi(pin, (*message)?)));
                routed.collect()
            }
        };
        let vectors = self.vectors.iter();
        entries.extend(vectors.filter_map(|(gsi, vector)| Some(msi(*gsi, vector.route()?))));
        entries
    }

    /// A guest's message with its destination where KVM looks for it (`KVM_CAP_X2APIC_API`): bits 31 to
    /// 8 of it in the upper half of the address.
    pub(crate) fn destination(&self, message: MsiMessage) -> MsiMessage {
        const EXTENDED: u64 = 0xfe0;
        const REMAPPABLE: u64 = 1 << 4;
        let MsiMessage { address, data } = message;
        if !self.extended_destinations || address & REMAPPABLE != 0 || address >> 32 != 0 {
            return message;
        }
        let address = (address & !EXTENDED) | (address & EXTENDED) << 35;
        MsiMessage { address, data }
    }
}

/// Routes of the pins of KVM's own controllers.
fn controller_entries() -> Vec<kvm_irq_routing_entry> {
    let pins = (0..IOAPIC_PINS).flat_map(|gsi| {
        let pic = (gsi < PIC_PINS).then(|| pic_entry(gsi));
        pic.into_iter()
            .chain([pin_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)])
    });
    pins.collect()
}

fn pic_entry(gsi: u32) -> kvm_irq_routing_entry {
    let chip = if gsi < PINS_PER_PIC {
        KVM_IRQCHIP_PIC_MASTER
    } else {
        KVM_IRQCHIP_PIC_SLAVE
    };
    pin_entry(gsi, chip, gsi % PINS_PER_PIC)
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

#[cfg(test)]
#[path = "routing_tests.rs"]
mod tests;
