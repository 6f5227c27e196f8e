//! virtio 1.x devices over PCI.

pub mod device;
