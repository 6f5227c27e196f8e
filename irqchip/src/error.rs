//! What can fail here: KVM refuses, or the caller names a pin or an address that does not exist.

use crate::{DoorbellAddress, IOAPIC_PINS};

/// Why an interrupt or a doorbell could not be set up, changed or taken down.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM has no in-kernel irqchip, or the VM has vCPUs or an irqchip already.
    #[error("cannot create the in-kernel irqchip")]
    CreateIrqchip(#[source] kvm_ioctls::Error),
    /// KVM cannot do without its own IOAPIC, or the VM has vCPUs or an irqchip already.
    #[error("cannot create the split irqchip (KVM_CAP_SPLIT_IRQCHIP)")]
    SplitIrqchip(#[source] kvm_ioctls::Error),
    /// KVM refused to create the PIT.
    #[error("cannot create the in-kernel PIT")]
    CreatePit(#[source] kvm_ioctls::Error),
    /// KVM gave or took no state of the PICs: it has none, perhaps.
    #[error("cannot initialise the in-kernel PICs")]
    InitialisePic(#[source] kvm_ioctls::Error),
    /// An eventfd could not be made, most likely because the process has no file descriptor left.
    #[error("cannot create an eventfd")]
    EventFd(#[source] std::io::Error),
    /// The IOAPIC has no such pin.
    #[error("there is no IOAPIC pin {pin}, the last one is {}", IOAPIC_PINS - 1)]
    NoPin {
        /// The pin that was asked for.
        pin: u32,
    },
    /// Every GSI that KVM can route is in use.
    #[error("no free GSI for an MSI vector: all {vectors} that KVM can route are in use")]
    NoGsi {
        /// How many MSI vectors there are already.
        vectors: usize,
    },
    /// KVM refused a routing table; the one before it is still in force.
    #[error("KVM refused {routes} interrupt routes, changed ones: GSI {changed:?}")]
    SetRoutes {
        /// Length of the table.
        routes: usize,
        /// GSIs whose message this call wanted to change.
        changed: Vec<u32>,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM refused to drive a pin.
    #[error("cannot drive IOAPIC pin {pin}")]
    Drive {
        /// The pin.
        pin: u32,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM refused to attach an irqfd.
    #[error("cannot attach an irqfd to GSI {gsi}")]
    Attach {
        /// The interrupt it was meant for.
        gsi: u32,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM refused to detach an irqfd.
    #[error("cannot detach the irqfd of GSI {gsi}")]
    Detach {
        /// The interrupt it belongs to.
        gsi: u32,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The width of a doorbell is none that a guest can write, or its value does not fit into it.
    #[error("no doorbell at {at}: it must be 1, 2, 4 or 8 bytes wide and its value fit")]
    DoorbellShape {
        /// Where it was to be.
        at: DoorbellAddress,
    },
    /// KVM refused a doorbell, most likely because another one is there (EEXIST).
    #[error("cannot place a doorbell at {at}")]
    PlaceDoorbell {
        /// Where it was to be.
        at: DoorbellAddress,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM refused to take a doorbell away.
    #[error("cannot remove the doorbell at {at}")]
    RemoveDoorbell {
        /// Where it is.
        at: DoorbellAddress,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Somebody is saving the chip.
    #[error("the interrupt controllers are held already")]
    Held,
    /// KVM gave or took no state.
    #[error("cannot save or restore the {what}")]
    State {
        /// Of what.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Saved state that cannot be, or that is not of such a machine.
    #[error(transparent)]
    BadState(#[from] crate::StateError),
}
