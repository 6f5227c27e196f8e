//! The seam between the virtio PCI transport and a device.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// A virtqueue as the driver set it up (virtio 1.3, 2.6 and 4.1.4.3). All of it is the guest's word.
#[derive(Debug)]
pub struct QueueSetup {
    /// Index of the queue in the device.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// Descriptor table, guest physical.
    pub desc: u64,
    /// Driver (avail) area, guest physical.
    pub avail: u64,
    /// Device (used) area, guest physical.
    pub used: u64,
    /// Written by KVM when the driver rings the doorbell.
    pub kick: EventFd,
    /// Written by the device to interrupt the driver (an irqfd; harmless where the driver gave the
    /// queue no vector).
    pub call: EventFd,
}

/// All that a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// Feature bits that both sides agreed on.
    pub features: u64,
    /// The enabled queues.
    pub queues: Vec<QueueSetup>,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
}

/// How a device tells the transport about itself from its own thread: a configuration change, or that
/// it needs a reset (virtio 1.3, 2.1.2). Takes no lock that is held while a device is called.
pub trait TransportNotify: Send + Sync {
    /// The configuration space changed: bumps the generation and raises the config interrupt. To be
    /// called under the lock that guards the bytes, so that no driver sees new ones with the old
    /// generation.
    fn config_changed(&self);
    /// Sets DEVICE_NEEDS_RESET and raises the config interrupt.
    fn needs_reset(&self);
}

/// State of a reset that the driver asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetProgress {
    /// Over: the status register reads 0.
    Done,
    /// Under way: the status register keeps its old value until the device has let go of the rings.
    Pending,
}

/// A virtio device below the PCI transport.
///
/// The transport calls it from vCPU threads, one call at a time (it holds the device's lock), in the
/// order of virtio 1.3, 3.1.1: features, config, `activate`, then `reset`. No call may block: a device
/// whose work is elsewhere hands it over and returns.
pub trait VirtioDevice: Send {
    /// virtio device id (1.3, 5), such as `VIRTIO_ID_BLOCK`.
    fn device_type(&self) -> u32;
    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Feature bits offered, VIRTIO_F_VERSION_1 among them.
    fn features(&self) -> u64;
    /// Whether FEATURES_OK may be set with these bits; the transport has checked that all were offered.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }
    /// Reads configuration space; bytes past its end read 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Hands over the way back to the transport, once, before the guest starts.
    fn attach(&mut self, notify: Arc<dyn TransportNotify>);
    /// DRIVER_OK. On an error the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// The driver gave a queue another vector while the device runs: interrupts go there from now on.
    fn set_call(&mut self, queue: u16, call: EventFd);
    /// The driver wrote 0 to the status register, or reset the bus. Also called when the device never
    /// ran.
    fn reset(&mut self);
    /// Asked on each read of the status register after `reset`, until it says `Done`. From then on the
    /// device neither touches guest memory nor notifies, until it is activated again.
    fn reset_progress(&mut self) -> ResetProgress {
        ResetProgress::Done
    }
}

/// Why a device could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {reason}")]
pub struct ActivateError {
    /// The device's name.
    pub device: String,
    /// What was wrong, with its value.
    pub reason: String,
}
