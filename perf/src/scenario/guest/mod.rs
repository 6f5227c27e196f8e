//! What scenarios that start guests have in common. This is no scenario.

pub(crate) mod memory;
