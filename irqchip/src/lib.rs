//! Everything between a device and a vCPU's interrupt, and between a guest's doorbell and an eventfd.
//!
//! KVM holds the interrupt controllers (local APICs, and perhaps IOAPIC, two 8259 PICs and the PIT).
//! This crate makes them, owns their routing table, and hands devices three things that are nothing but
//! eventfds with a place in that table:
//!
//! ```text
//!  device or backend process                        KVM                               vCPU
//!
//!  Line  event ─ irqfd ─▶ GSI 0..24 ─ route ─▶ IOAPIC pin, PIC pin ─▶ LAPIC ─▶ interrupt
//!        resample ◀───────────────────────────── end of interrupt ◀───────────── EOI
//!  Msi   event ─ irqfd ─▶ GSI 24..  ─ route ─▶ MSI address and data ─▶ LAPIC ─▶ interrupt
//!
//!  Doorbell event ◀─ ioeventfd ─ write to a guest address or port ◀───────────── mov, out
//! ```
//!
//! Once they are set up no interrupt and no doorbell passes through this process: whoever holds a
//! copy of the eventfd, a backend in another process most of all, talks to KVM directly.
//!
//! **Modes.** With [`Mode::Kernel`] KVM has all controllers. With [`Mode::Split`] it has the local
//! APICs; the IOAPIC is here (`ioapic.rs`), a pin's route is the message that its entry stands for,
//! and two things come out of KVM: accesses of the IOAPIC's page ([`Chip::ioapic_write`]) and ends
//! of level interrupts ([`Chip::end_of_interrupt`]).
//!
//! **State.** [`Chip::hold`] sees to it that no interrupt is between two places; [`VcpuState::save`] and
//! [`Held::save`] take all of it then, and another VM goes on from there.
//!
//! **Threads.** Everything takes `&self` and may be called from any thread. One mutex in [`Chip`]
//! protects the routing table and what each vector wants of it, one the split mode's pins or what leads to
//! those of KVM; a [`Doorbell`] has one of its own. The pins' is taken before the table's; no other is taken while
//! one is held. On the way of an interrupt none is taken, but by [`Line::raise`] in split mode.
//!
//! **Invariants.** A vector's irqfd is attached exactly if it has a message and is neither masked nor held, and
//! then KVM routes it to that message; of a vector that is masked or gone KVM may have an old route,
//! to which nothing leads. The same goes for the lines of a pin in split mode. A message that KVM
//! refuses is never in the table when another vector changes. A failed call leaves the routes as
//! they were.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use berth_irqchip::{Chip, DoorbellAddress, Mode, MsiMessage};
//!
//! let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
//! let chip = Chip::new(vm.into(), Mode::Kernel)?;
//! let (call, kick) = (chip.msi()?, chip.doorbell()?);
//! // Both may go to a backend now; the guest says where they lead to later.
//! let (for_backend, from_guest) = (call.event().try_clone()?, kick.event().try_clone()?);
//! call.set_message(MsiMessage { address: 0xfee0_0000, data: 0x41 })?;
//! kick.place(DoorbellAddress::MmioAny { gpa: 0xe000_3000 })?;
//! for_backend.write(1)?; // vector 0x41 on vCPU 0
//! # Ok(())
//! # }
//! ```
//!
//! Reference: KVM api.rst, `KVM_CREATE_IRQCHIP`, `KVM_CREATE_PIT2`, `KVM_CAP_SPLIT_IRQCHIP`, `KVM_SET_GSI_ROUTING`,
//! `KVM_IRQFD`, `KVM_IOEVENTFD`. PCI 3.0, 6.8.2 (MSI-X mask and pending bits).

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod chip;
mod doorbell;
mod error;
mod hold;
mod ioapic;
mod line;
mod msi;
mod pic;
mod pins;
mod pit;
mod routing;
mod save;
mod state;
mod sys;
mod vectors;
mod wires;

pub use chip::{Chip, Counters, Mode};
pub use doorbell::{Doorbell, DoorbellAddress};
pub use error::Error;
pub use hold::Held;
pub use ioapic::IOAPIC_LEN;
pub use line::{Line, Trigger};
pub use msi::{Batch, Msi};
pub use routing::{IOAPIC_PINS, MsiMessage};
pub use state::{ChipState, STATE_VERSION, StateError, VcpuState};
