//! What the guest brings about, on its way from a vCPU thread to the driver.

use std::sync::Arc;

/// Something that only the driver can act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest powered its machine off.
    PowerOff,
    /// The guest reset its machine.
    Reset,
    /// A test program ended the process with this exit code.
    Exit(u8),
    /// The guest let go of the device with this name, which was to be removed.
    Ejected(String),
    /// The guest can run no further: a triple fault or an error of KVM, and the vCPU's registers.
    Fatal(String),
}

/// Where vCPUs and devices put events; clones are the same place. Sending never blocks.
#[derive(Clone)]
pub struct GuestEvents(Arc<dyn Fn(GuestEvent) + Send + Sync>);

impl GuestEvents {
    /// A place that calls `sink`, on the thread that sends.
    pub fn new(sink: impl Fn(GuestEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Hands over an event.
    pub fn send(&self, event: GuestEvent) {
        (self.0)(event);
    }
}
