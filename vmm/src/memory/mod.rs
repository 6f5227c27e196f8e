//! Guest RAM: one sealed memfd, mapped shared, on both sides of the PCI hole.

pub mod layout;
