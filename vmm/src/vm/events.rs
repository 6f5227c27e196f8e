//! What the guest brings about, on its way from a vCPU thread to the driver.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

impl GuestEvent {
    /// Whether the machine that it comes from goes on after it.
    pub fn goes_on(&self) -> bool {
        matches!(self, Self::Ejected(_))
    }
}

/// Where vCPUs and devices of one machine put events; clones are the same place. Sending never blocks.
///
/// A machine ends once: of what ends it only the first event is handed over, so that a guest which writes its
/// reset register without end, while the driver is busy, piles up nothing. The others are as many as devices that
/// were to be removed.
#[derive(Clone)]
pub struct GuestEvents(Arc<Place>);

struct Place {
    sink: Box<dyn Fn(GuestEvent) + Send + Sync>,
    ended: AtomicBool,
}

impl GuestEvents {
    /// A place that calls `sink`, on the thread that sends.
    pub fn new(sink: impl Fn(GuestEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(Place {
            sink: Box::new(sink),
            ended: AtomicBool::new(false),
        }))
    }

    /// Hands over an event.
    pub fn send(&self, event: GuestEvent) {
        // The event itself is handed over by the sink; nothing else is ordered by this.
        if event.goes_on() || !self.0.ended.swap(true, Ordering::Relaxed) {
            (self.0.sink)(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_guest_that_resets_without_end_is_heard_once() {
        let (sender, received) = channel();
        let events = GuestEvents::new(move |event| sender.send(event).unwrap());
        let gone = GuestEvent::Ejected("_disk0".to_owned());
        for _ in 0..1000 {
            events.send(GuestEvent::Reset);
            events.clone().send(GuestEvent::PowerOff);
        }
        events.send(gone.clone());
        drop(events);
        let received: Vec<_> = received.iter().collect();
        assert_eq!(received, [GuestEvent::Reset, gone]);
    }
}
