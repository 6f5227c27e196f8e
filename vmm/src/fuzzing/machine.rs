//! All devices on their two buses without KVM, and a guest that accesses anything anywhere.
#![expect(
    clippy::expect_used,
    reason = "a machine that cannot be made is the host's trouble, not a finding"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::Bus;
use crate::devices::power::{
    I8042_COMMAND_PORT, KeyboardController, PM_BLOCK_LEN, PowerBlock, ResetRegister,
};
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial::output::Output;
use crate::devices::serial::port::{Input, RaiseInterrupt, SerialPort};
use crate::devices::serial::{PORT, PORT_LEN};
use crate::devices::virtio::device::{
    ActivateError, Activation, ResetProgress, TransportNotify, VirtioDevice,
};
use crate::memory::layout::{ECAM_START, MMIO32_START, PM1A_EVT_PORT, RESET_PORT};
use crate::pci::wiring::{DoorbellAt, Message, Vectors, Wiring, WiringError};
use crate::pci::{Pci, PciContext, PciHost};
use crate::vm::GuestEvents;

/// Start of the 64-bit window.
const MMIO64: u64 = 16 << 30;
/// Bytes of one access in the input: what it is, which place, offset, value.
const ACCESS: usize = 12;

/// Where accesses that matter go; the input picks one and adds an offset.
const PLACES: [(Space, u64); 16] = [
    (Space::Ports, 0xcf8),
    (Space::Ports, PORT),
    (Space::Ports, rtc::PORT),
    (Space::Ports, PM1A_EVT_PORT as u64),
    (Space::Ports, RESET_PORT as u64),
    (Space::Ports, I8042_COMMAND_PORT),
    (Space::Ports, 0),
    (Space::Memory, ECAM_START),
    // Functions on bus 0, and below the first root ports.
    (Space::Memory, ECAM_START + (1 << 15)),
    (Space::Memory, ECAM_START + (2 << 15)),
    (Space::Memory, ECAM_START + (1 << 20)),
    (Space::Memory, ECAM_START + (2 << 20)),
    // BARs, where they are before a guest moves them.
    (Space::Memory, MMIO32_START),
    (Space::Memory, MMIO64),
    (Space::Memory, MMIO64 + 0x10_0000),
    (Space::Memory, 0xfec0_0000),
];

#[derive(Clone, Copy)]
enum Space {
    Ports,
    Memory,
}

/// Lets a guest make the accesses that `data` says.
pub fn guest_io(data: &[u8]) {
    let machine = Machine::new();
    let mut buffer = [0; 8];
    for access in data.chunks_exact(ACCESS) {
        let [what, place, o0, o1, v @ ..] = access else {
            continue;
        };
        let (space, base) = PLACES[usize::from(*place) % PLACES.len()];
        let offset = u64::from(u16::from_le_bytes([*o0, *o1]));
        // The upper bits of the place reach the rest of a BAR and the other functions.
        let address = base + offset + (u64::from(*place >> 4) << 16);
        let len = 1 << (what & 3);
        let bus = match space {
            Space::Ports => &machine.ports,
            Space::Memory => &machine.mmio,
        };
        let address = match space {
            Space::Ports => address & 0xffff,
            Space::Memory => address,
        };
        if what & 4 == 0 {
            bus.write(address, &v[..len]);
        } else {
            buffer.fill(0);
            bus.read(address, &mut buffer[..len]);
        }
    }
    // A guest may switch a slot off, and the device goes; none comes.
    let devices = machine.pci.devices().len();
    assert!(devices <= machine.found, "a device came from nowhere");
    machine.ports.clear();
    machine.mmio.clear();
}

struct Machine {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    pci: Pci,
    found: usize,
}

impl Machine {
    fn new() -> Self {
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let events = GuestEvents::new(|_| ());
        let power = PowerBlock::new(Box::new(|| Ok(())), events.clone());
        let input = Arc::new(Input::new().expect("an eventfd"));
        let raise = RaiseInterrupt(Box::new(|| Ok(())));
        let serial = SerialPort::new(raise, Output::unread(), input);
        let insert =
            |start: u64, len, device| ports.insert(start, len, device).expect("free ports");
        insert(PM1A_EVT_PORT.into(), PM_BLOCK_LEN, Arc::new(power));
        insert(
            RESET_PORT.into(),
            1,
            Arc::new(ResetRegister::new(events.clone())),
        );
        insert(
            I8042_COMMAND_PORT,
            1,
            Arc::new(KeyboardController::new(events)),
        );
        insert(rtc::PORT, 2, Arc::new(Rtc::new(64 << 20, 0)));
        insert(PORT, PORT_LEN, Arc::new(serial));
        let mut host = PciHost::new(PciContext {
            wiring: Arc::new(NoWiring),
            memory: GuestMemoryMmap::new(),
            mmio: Arc::clone(&mmio),
            ports: Arc::clone(&ports),
            mmio64_start: MMIO64,
        });
        host.add_builtin("_rng", Box::new(Quiet::default()))
            .expect("a slot");
        for name in ["_disk0", "_disk1"] {
            host.add_below_root_port(name, Box::new(Quiet::default()), 0x1b36)
                .expect("a root port");
        }
        host.add_empty_root_port(0x1b36).expect("a root port");
        let pci = host.finish().expect("windows for all");
        let found = pci.devices().len();
        Self {
            ports,
            mmio,
            pci,
            found,
        }
    }
}

/// Vectors and doorbells that lead nowhere.
struct NoWiring;

struct Nowhere(EventFd);

struct NowhereVectors(Vec<Nowhere>);

fn nowhere() -> Result<Nowhere, WiringError> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(|error| {
        let boxed: Box<dyn std::error::Error + Send + Sync> = Box::new(error);
        WiringError::from(boxed)
    })?;
    Ok(Nowhere(event))
}

impl Wiring for NoWiring {
    fn vectors(&self, count: u16) -> Result<Box<dyn Vectors>, WiringError> {
        let made: Result<_, _> = (0..count).map(|_| nowhere()).collect();
        Ok(Box::new(NowhereVectors(made?)))
    }

    fn doorbell(&self) -> Result<Box<dyn DoorbellAt>, WiringError> {
        Ok(Box::new(nowhere()?))
    }
}

impl Vectors for NowhereVectors {
    fn event(&self, vector: usize) -> Option<&EventFd> {
        Some(&self.0.get(vector)?.0)
    }

    fn set(&self, settings: &[(usize, Message)]) -> Result<(), WiringError> {
        let last = settings.iter().map(|(vector, _)| *vector).max();
        assert!(last.is_none_or(|last| last < self.0.len()), "no vector");
        Ok(())
    }

    fn is_pending(&self, _vector: usize) -> bool {
        false
    }
}

impl DoorbellAt for Nowhere {
    fn event(&self) -> &EventFd {
        &self.0
    }

    fn place(&self, _gpa: u64) -> Result<(), WiringError> {
        Ok(())
    }

    fn remove(&self) -> Result<(), WiringError> {
        Ok(())
    }
}

/// A device that takes everything; it holds the transport to the order of calls.
#[derive(Default)]
struct Quiet {
    running: bool,
    /// Reads of the status that a reset takes.
    busy: AtomicU64,
}

impl VirtioDevice for Quiet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << 6
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attach(&mut self, _notify: Arc<dyn TransportNotify>) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.running, "activated twice without a reset");
        assert_eq!(
            activation.features & !self.features(),
            0,
            "features that were not offered"
        );
        for queue in &activation.queues {
            let most = self.queue_sizes()[usize::from(queue.index)];
            assert!(queue.size <= most && queue.size.is_power_of_two());
        }
        self.running = true;
        Ok(())
    }

    fn set_call(&mut self, queue: u16, _call: EventFd) {
        assert!(usize::from(queue) < self.queue_sizes().len());
    }

    fn reset(&mut self) {
        self.running = false;
        self.busy.store(2, Ordering::Relaxed);
    }

    fn reset_progress(&mut self) -> ResetProgress {
        match self.busy.get_mut() {
            0 => ResetProgress::Done,
            left => {
                *left -= 1;
                ResetProgress::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_answer_at_their_places() {
        let machine = Machine::new();
        let mut data = [0; 4];
        assert!(machine.mmio.read(ECAM_START, &mut data));
        assert_ne!(data, [0xff; 4]);
        for (space, base) in &PLACES[..6] {
            assert!(matches!(space, Space::Ports));
            assert!(machine.ports.read(*base, &mut data[..1]), "{base:#x}");
        }
        assert_eq!(machine.found, 3);
    }

    #[test]
    fn random_accesses_stop_nothing() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        };
        for _ in 0..50 {
            let data: Vec<u8> = (0..1000 * ACCESS).map(|_| next()).collect();
            guest_io(&data);
        }
    }
}
