//! The way from a device back to its driver that is not a queue's interrupt.
//!
//! All atomics: a device calls from its own thread while a vCPU thread may hold the transport's lock and
//! wait for that very thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::devices::virtio::device::TransportNotify;
use crate::pci::msix::Msix;

/// A vector that is none (virtio 1.3, 4.1.5.1.2.1).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 1 << 1;

/// Config generation, ISR status, NEEDS_RESET and the vector of configuration changes.
pub(super) struct Notifier {
    pub(super) msix: Arc<Msix>,
    generation: AtomicU8,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    vector: AtomicU16,
}

impl Notifier {
    pub(super) fn new(msix: Arc<Msix>) -> Self {
        Self {
            msix,
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            vector: AtomicU16::new(NO_VECTOR),
        }
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn vector(&self) -> u16 {
        self.vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_vector(&self, vector: u16) {
        self.vector.store(vector, Ordering::SeqCst);
    }

    pub(super) fn wants_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Reads the ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// Back to the state after reset; the generation goes on.
    pub(super) fn reset(&self) {
        self.set_vector(NO_VECTOR);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
    }

    fn interrupt(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.raise(self.vector());
    }
}

impl TransportNotify for Notifier {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.interrupt();
    }

    fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.interrupt();
        }
    }
}
