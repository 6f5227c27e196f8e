//! virtio 1.x devices over PCI.
//!
//! [`transport_pci`] is the bus side, once for all; [`device::VirtioDevice`] is the seam; behind it are
//! small devices of this process ([`rng`], [`balloon`]) and [`crate::vhost_user`] ones in others.

pub mod balloon;
pub mod device;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
pub(crate) mod fake_driver;
pub mod rng;
pub mod transport_pci;
