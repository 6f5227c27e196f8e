//! Guest RAM: one sealed memfd, mapped shared, on both sides of the PCI hole.
//!
//! A vhost-user backend gets the memfd and maps it too, so the mapping must be shared and the file must
//! never shrink under anybody: it is sealed against both before anyone else sees it.
//!
//! Threads: [`GuestRam`] is made by the main thread and is read-only from then on; vCPUs, devices and
//! backends reach the bytes through it at any time. Guest memory is never a Rust reference: access goes
//! through `vm-memory`, which copies or reads volatile.

pub mod layout;
mod mapping;

pub use mapping::{Error, GuestRam, RamSlots};
