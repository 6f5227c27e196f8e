//! A chip that only remembers, for tests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::wiring::{DoorbellAt, Message, Vectors, Wiring, WiringError};

/// A vector, and its event.
type Events = BTreeMap<usize, EventFd>;

#[derive(Default)]
struct Shared {
    /// By number of the vector.
    vectors: Mutex<BTreeMap<usize, Message>>,
    /// Calls of [`Vectors::set`].
    updates: AtomicUsize,
    events: Mutex<Events>,
    /// By address: the doorbell's number.
    doorbells: Mutex<BTreeMap<u64, usize>>,
    next_vector: AtomicUsize,
    next_doorbell: AtomicUsize,
}

/// Vectors and doorbells are numbered in the order they are made.
#[derive(Default, Clone)]
pub(crate) struct FakeWiring(Arc<Shared>);

impl FakeWiring {
    /// The message of a vector that is not masked.
    pub(crate) fn message(&self, vector: usize) -> Option<(u64, u32)> {
        self.0.vectors.lock().unwrap()[&vector]
    }

    /// How often vectors were set, however many at a time.
    pub(crate) fn updates(&self) -> usize {
        self.0.updates.load(Ordering::Relaxed)
    }

    /// How often a vector was raised since this was last asked.
    pub(crate) fn raised(&self, vector: usize) -> u64 {
        self.0.events.lock().unwrap()[&vector].read().unwrap_or(0)
    }

    /// Where doorbells are, in the order of their addresses.
    pub(crate) fn doorbells(&self) -> Vec<(u64, usize)> {
        let placed = self.0.doorbells.lock().unwrap();
        placed.iter().map(|(&at, &number)| (at, number)).collect()
    }
}

impl Wiring for FakeWiring {
    fn vectors(&self, count: u16) -> Result<Box<dyn Vectors>, WiringError> {
        let count = usize::from(count);
        let first = self.0.next_vector.fetch_add(count, Ordering::Relaxed);
        let mut events = Vec::new();
        for number in first..first + count {
            self.0.vectors.lock().unwrap().insert(number, None);
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            let copy = event.try_clone().unwrap();
            self.0.events.lock().unwrap().insert(number, copy);
            events.push(event);
        }
        Ok(Box::new(FakeVectors {
            first,
            events,
            shared: Arc::clone(&self.0),
        }))
    }

    fn doorbell(&self) -> Result<Box<dyn DoorbellAt>, WiringError> {
        Ok(Box::new(FakeDoorbell {
            number: self.0.next_doorbell.fetch_add(1, Ordering::Relaxed),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            shared: Arc::clone(&self.0),
        }))
    }
}

struct FakeVectors {
    /// Number of vector 0.
    first: usize,
    events: Vec<EventFd>,
    shared: Arc<Shared>,
}

impl Vectors for FakeVectors {
    fn event(&self, vector: usize) -> Option<&EventFd> {
        self.events.get(vector)
    }

    /// As KVM does, refuses all if one address has bits that no local APIC's has.
    fn set(&self, settings: &[(usize, Message)]) -> Result<(), WiringError> {
        self.shared.updates.fetch_add(1, Ordering::Relaxed);
        let bad = |(_, message): &&(usize, Message)| message.is_some_and(|(at, _)| at >> 32 != 0);
        if let Some((vector, _)) = settings.iter().find(bad) {
            let why: Box<dyn std::error::Error + Send + Sync> = format!("vector {vector}").into();
            return Err(why.into());
        }
        let mut vectors = self.shared.vectors.lock().unwrap();
        for (vector, message) in settings {
            assert!(*vector < self.events.len(), "no vector {vector}");
            vectors.insert(self.first + vector, *message);
        }
        Ok(())
    }

    fn is_pending(&self, vector: usize) -> bool {
        let Some(event) = self.events.get(vector) else {
            return false;
        };
        let message = self.shared.vectors.lock().unwrap()[&(self.first + vector)];
        let count = event.read().unwrap_or(0);
        if count > 0 {
            event.write(count).unwrap();
        }
        message.is_none() && count > 0
    }
}

struct FakeDoorbell {
    number: usize,
    event: EventFd,
    shared: Arc<Shared>,
}

impl DoorbellAt for FakeDoorbell {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn place(&self, gpa: u64) -> Result<(), WiringError> {
        self.remove()?;
        let mut placed = self.shared.doorbells.lock().unwrap();
        let other = placed.insert(gpa, self.number);
        assert_eq!(other, None, "two doorbells at {gpa:#x}");
        Ok(())
    }

    fn remove(&self) -> Result<(), WiringError> {
        let mut placed = self.shared.doorbells.lock().unwrap();
        placed.retain(|_, &mut number| number != self.number);
        Ok(())
    }
}
