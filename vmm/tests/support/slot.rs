//! The slot of a root port as a guest without other external devices sees it (PCI Express 3.0, 7.8.10 and 7.8.11).

/// The first empty root port, where nothing else is external, and what is below it.
pub(crate) const PORT: (u8, u8) = (0, 2);
pub(crate) const BELOW: (u8, u8) = (1, 0);
/// Slot control and status in the port's first capability.
pub(crate) const CONTROL: u8 = 0x58;
pub(crate) const STATUS: u8 = 0x5a;
pub(crate) const BUTTON: u16 = 1;
pub(crate) const PRESENT: u16 = 1 << 6;
pub(crate) const POWER_OFF: u16 = 1 << 10;
