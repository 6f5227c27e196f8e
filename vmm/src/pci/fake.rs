//! A chip that only remembers, for tests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::wiring::{DoorbellAt, Vector, Wiring, WiringError};

/// Whether a vector is masked, and its message.
type VectorState = (bool, Option<(u64, u32)>);
/// A vector, and its event.
type Events = BTreeMap<usize, EventFd>;

#[derive(Default)]
struct Shared {
    /// By number of the vector.
    vectors: Mutex<BTreeMap<usize, VectorState>>,
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
        match self.0.vectors.lock().unwrap()[&vector] {
            (false, message) => message,
            (true, _) => None,
        }
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
    fn vector(&self) -> Result<Box<dyn Vector>, WiringError> {
        let number = self.0.next_vector.fetch_add(1, Ordering::Relaxed);
        self.0.vectors.lock().unwrap().insert(number, (true, None));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let copy = event.try_clone().unwrap();
        self.0.events.lock().unwrap().insert(number, copy);
        Ok(Box::new(FakeVector {
            number,
            event,
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

struct FakeVector {
    number: usize,
    event: EventFd,
    shared: Arc<Shared>,
}

impl FakeVector {
    fn change(&self, change: impl FnOnce(&mut VectorState)) {
        change(
            self.shared
                .vectors
                .lock()
                .unwrap()
                .get_mut(&self.number)
                .unwrap(),
        );
    }
}

impl Vector for FakeVector {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn set_message(&self, address: u64, data: u32) -> Result<(), WiringError> {
        self.change(|vector| vector.1 = Some((address, data)));
        Ok(())
    }

    fn mask(&self) -> Result<(), WiringError> {
        self.change(|vector| vector.0 = true);
        Ok(())
    }

    fn unmask(&self) -> Result<(), WiringError> {
        self.change(|vector| vector.0 = false);
        Ok(())
    }

    fn is_pending(&self) -> bool {
        let masked = self.shared.vectors.lock().unwrap()[&self.number].0;
        let count = self.event.read().unwrap_or(0);
        if count > 0 {
            self.event.write(count).unwrap();
        }
        masked && count > 0
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
