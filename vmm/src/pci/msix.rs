//! MSI-X: the vector table and the pending bits of one function (PCI 3.0, 6.8.2).
//!
//! A vector is wired to the chip while MSI-X is enabled and neither the function nor the entry is
//! masked. Otherwise its event stays pending in the eventfd, which is what the pending bit reads.
//!
//! What one write of the guest changes is one update of the chip's routes, however many vectors it concerns:
//! an update costs a grace period of the host's kernel, and enabling MSI-X concerns them all.
//!
//! Threads: vCPU threads write the table; any thread may [`raise`](Msix::raise). One lock, a leaf: held
//! for the ioctls that rewire, never while a device is called.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::wiring::{Message, Vectors, Wiring, WiringError};

/// Bytes of a table entry: address, data, control.
pub(crate) const ENTRY_SIZE: usize = 16;
/// Control word: masked.
const ENTRY_MASKED: u8 = 1;
/// Most vectors of a function.
pub(crate) const MAX_VECTORS: u16 = 2048;

/// The vectors of one function.
pub(crate) struct Msix {
    name: String,
    state: Mutex<State>,
    vectors: Box<dyn Vectors>,
}

struct State {
    enabled: bool,
    masked: bool,
    table: Vec<[u8; ENTRY_SIZE]>,
    warned: bool,
}

impl State {
    /// Where a vector's events are to go; `None` if there is no such vector.
    fn wanted(&self, vector: usize) -> Option<Message> {
        let entry = self.table.get(vector)?;
        let live = self.enabled && !self.masked && entry[12] & ENTRY_MASKED == 0;
        let word = |at: usize| {
            let bytes = entry[at..at + 4].try_into();
            u32::from_le_bytes(bytes.expect("four bytes of sixteen"))
        };
        let address = u64::from(word(4)) << 32 | u64::from(word(0));
        Some(live.then_some((address, word(8))))
    }
}

/// A table as it is after a reset: every vector masked.
fn reset_table(vectors: usize) -> Vec<[u8; ENTRY_SIZE]> {
    let mut entry = [0; ENTRY_SIZE];
    entry[12] = ENTRY_MASKED;
    vec![entry; vectors]
}

impl Msix {
    pub(crate) fn new(name: &str, wiring: &dyn Wiring, vectors: u16) -> Result<Self, WiringError> {
        let count = vectors.min(MAX_VECTORS);
        Ok(Self {
            name: name.to_owned(),
            state: Mutex::new(State {
                enabled: false,
                masked: false,
                table: reset_table(count.into()),
                warned: false,
            }),
            vectors: wiring.vectors(count)?,
        })
    }

    /// The event that raises a vector, if there is such a vector.
    pub(crate) fn event(&self, vector: u16) -> Option<&EventFd> {
        self.vectors.event(vector.into())
    }

    /// Raises a vector; does nothing for NO_VECTOR and others that do not exist.
    pub(crate) fn raise(&self, vector: u16) {
        if let Some(event) = self.event(vector)
            && let Err(error) = event.write(1)
            && error.kind() != std::io::ErrorKind::WouldBlock
        {
            tracing::warn!(device = %self.name, vector, %error, "cannot raise an interrupt");
        }
    }

    /// Takes the two bits of the message control register that software writes.
    pub(crate) fn set_control(&self, enabled: bool, masked: bool) {
        let mut state = self.state();
        if (state.enabled, state.masked) != (enabled, masked) {
            (state.enabled, state.masked) = (enabled, masked);
            self.rewire_all(&mut state);
        }
    }

    /// All vectors masked and without a message.
    pub(crate) fn reset(&self) {
        let mut state = self.state();
        (state.enabled, state.masked) = (false, false);
        state.table = reset_table(state.table.len());
        self.rewire_all(&mut state);
        for event in (0..state.table.len()).filter_map(|vector| self.vectors.event(vector)) {
            // What was pending belongs to the life before; nobody there is nothing to drain.
            let _ = event.read();
        }
    }

    /// Reads the table, any width; past its end 0.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = place(offset, i)
                .and_then(|(entry, at)| Some(state.table.get(entry)?[at]))
                .unwrap_or(0);
        }
    }

    /// Writes the table, any width; past its end nothing.
    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let mut touched = Vec::with_capacity(2);
        for (i, &value) in data.iter().enumerate() {
            let Some((entry, at)) = place(offset, i) else {
                break;
            };
            let Some(bytes) = state.table.get_mut(entry) else {
                break;
            };
            bytes[at] = match at {
                0 => value & !3,
                12 => value & ENTRY_MASKED,
                13.. => 0,
                _ => value,
            };
            if touched.last() != Some(&entry) {
                touched.push(entry);
            }
        }
        self.rewire(&mut state, touched);
    }

    /// Reads the pending bits, any width.
    pub(crate) fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = usize::try_from(offset).map_or(usize::MAX, |o| o.saturating_add(i));
            *byte = (0..8).fold(0, |bits, bit| {
                let index = first.saturating_mul(8).saturating_add(bit);
                let pending = self.vectors.is_pending(index);
                bits | u8::from(pending) << bit
            });
        }
    }

    fn rewire_all(&self, state: &mut State) {
        self.rewire(state, 0..state.table.len());
    }

    /// Makes these vectors what the registers say. If the chip refuses, as it does for a message that no
    /// local APIC could take, each is tried alone: the fault of one is not another's.
    fn rewire(&self, state: &mut State, vectors: impl IntoIterator<Item = usize>) {
        let wanted = |vector| Some((vector, state.wanted(vector)?));
        let settings: Vec<_> = vectors.into_iter().filter_map(wanted).collect();
        if settings.is_empty() || self.vectors.set(&settings).is_ok() {
            return;
        }
        for setting in settings {
            if let Err(error) = self.vectors.set(&[setting])
                && !std::mem::replace(&mut state.warned, true)
            {
                let vector = setting.0;
                tracing::warn!(device = %self.name, vector, %error, "cannot wire an interrupt");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Entry and byte in it, of the `i`th byte from `offset`.
fn place(offset: u64, i: usize) -> Option<(usize, usize)> {
    let at = usize::try_from(offset).ok()?.checked_add(i)?;
    Some((at / ENTRY_SIZE, at % ENTRY_SIZE))
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeWiring;
    use super::*;

    fn msix(wiring: &FakeWiring) -> Msix {
        Msix::new("test", wiring, 3).unwrap()
    }

    /// Entry 1: address 0xfee0_1000, data 0x41, not masked.
    fn set_up(msix: &Msix) {
        msix.write_table(16, &0xfee0_1000_u32.to_le_bytes());
        msix.write_table(20, &0_u32.to_le_bytes());
        msix.write_table(24, &0x41_u32.to_le_bytes());
        msix.write_table(28, &0_u32.to_le_bytes());
    }

    #[test]
    fn a_vector_is_live_when_enabled_and_not_masked_at_either_level() {
        let wiring = FakeWiring::default();
        let msix = msix(&wiring);
        set_up(&msix);
        assert_eq!(wiring.message(1), None);
        msix.set_control(true, true);
        assert_eq!(wiring.message(1), None);
        msix.set_control(true, false);
        assert_eq!(wiring.message(1), Some((0xfee0_1000, 0x41)));
        assert_eq!(wiring.message(0), None, "its entry is masked from reset on");
        msix.write_table(28, &1_u32.to_le_bytes());
        assert_eq!(wiring.message(1), None);
    }

    #[test]
    fn what_one_write_changes_is_one_update_of_the_chip() {
        let wiring = FakeWiring::default();
        let msix = Msix::new("test", &wiring, 64).unwrap();
        for entry in 0..64_u8 {
            let mut bytes = [0; ENTRY_SIZE];
            bytes[..4].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
            bytes[8] = 0x30 + entry;
            msix.write_table(u64::from(entry) * 16, &bytes);
        }
        let mut updates = wiring.updates();
        let mut cost = || wiring.updates() - std::mem::replace(&mut updates, wiring.updates());
        msix.set_control(true, false);
        assert_eq!(cost(), 1, "enabled");
        assert_eq!(wiring.message(63), Some((0xfee0_0000, 0x6f)));
        msix.set_control(true, true);
        assert_eq!(cost(), 1, "function mask");
        msix.set_control(true, false);
        assert_eq!(cost(), 1, "no function mask");
        msix.write_table(28, &[1, 0, 0, 0, 0, 0x10, 0xe0, 0xfe]);
        assert_eq!(
            cost(),
            1,
            "the end of one entry and the beginning of the next"
        );
        assert_eq!(wiring.message(1), None);
        assert_eq!(wiring.message(2), Some((0xfee0_1000, 0x32)));
        msix.reset();
        assert_eq!(cost(), 1, "reset");
    }

    #[test]
    fn a_message_that_the_chip_refuses_is_that_vectors_fault_alone() {
        let wiring = FakeWiring::default();
        let msix = msix(&wiring);
        set_up(&msix);
        msix.write_table(0, &[0xff; 8]);
        msix.write_table(12, &0_u32.to_le_bytes());
        msix.set_control(true, false);
        assert_eq!(wiring.message(0), None);
        assert_eq!(wiring.message(1), Some((0xfee0_1000, 0x41)));
    }

    #[test]
    fn a_masked_vector_shows_its_event_as_pending() {
        let wiring = FakeWiring::default();
        let msix = msix(&wiring);
        msix.set_control(true, false);
        msix.raise(1);
        let mut bits = [0; 8];
        msix.read_pba(0, &mut bits);
        assert_eq!(bits, [2, 0, 0, 0, 0, 0, 0, 0]);
        set_up(&msix);
        msix.read_pba(0, &mut bits);
        assert_eq!(bits, [0; 8]);
    }

    #[test]
    fn the_table_reads_back_at_any_width_and_ends() {
        let wiring = FakeWiring::default();
        let msix = msix(&wiring);
        set_up(&msix);
        let mut eight = [0; 8];
        msix.read_table(24, &mut eight);
        assert_eq!(eight, [0x41, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(48, &[0xff; 8]);
        msix.write_table(u64::MAX, &[0xff; 8]);
        msix.read_table(48, &mut eight);
        assert_eq!(eight, [0; 8]);
        msix.read_pba(u64::MAX, &mut eight);
        assert_eq!(eight, [0; 8]);
        msix.raise(0xffff);
    }

    #[test]
    fn reset_masks_everything() {
        let wiring = FakeWiring::default();
        let msix = msix(&wiring);
        set_up(&msix);
        msix.set_control(true, false);
        msix.reset();
        assert_eq!(wiring.message(1), None);
        let mut control = [0; 4];
        msix.read_table(28, &mut control);
        assert_eq!(control, [1, 0, 0, 0]);
    }
}
