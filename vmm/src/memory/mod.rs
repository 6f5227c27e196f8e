//! Guest RAM: how it is made ([`Mode`]), its pieces ([`GuestRam`]) and KVM's slots on them.
//!
//! A vhost-user backend gets the memfd of what is shared and maps it too, so the file must never shrink under anybody:
//! it is sealed before anyone else sees it. What is private is anonymous memory, which KSM can merge.
//!
//! Threads: [`GuestRam`] is made by the thread `boot`; vCPUs, devices and backends reach the bytes through it at any
//! time. Guest memory is never a Rust reference: access goes through `vm-memory`, which copies or reads volatile.

mod error;
pub mod layout;
mod mapping;
mod mode;
mod ram;
mod slots;

pub use error::Error;
pub use mapping::Advice;
pub use mode::{Mode, ModeError};
pub use ram::{GuestRam, HostRange, Kind, bounce};
pub use slots::RamSlots;
