//! Devices emulated inside the VMM: only small and slow ones.

pub mod ioapic;
pub mod pm_timer;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod test_device;
pub mod virtio;
