//! Devices emulated inside the VMM: only small and slow ones.

pub mod virtio;
