//! The common configuration structure: features, device status and queues (virtio 1.3, 4.1.4.3).
//!
//! ```text
//!  0 ─ACKNOWLEDGE, DRIVER─▶ ─FEATURES_OK (refused: stays clear)─▶ ─DRIVER_OK─▶ device activated
//!  ▲                                                                              │ NEEDS_RESET
//!  └── device has let go ◀── resetting: status keeps its value ◀── 0 written ◀────┘
//! ```
//!
//! Reads take any width: they are cut out of a snapshot. Writes take the field's own width, and 64-bit
//! fields also their halves.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::notifier::{NO_VECTOR, Notifier};
use crate::devices::virtio::device::{
    Activation, QueueSetup, ResetProgress, TransportNotify, VirtioDevice,
};
use crate::pci::DoorbellAt;
use crate::telemetry::LogLimit;

/// Bytes of the structure.
pub(super) const COMMON_LEN: usize = 0x38;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// What a driver can cause to be logged.
static DRIVER_LINES: LogLimit = LogLimit::new(Duration::from_secs(1));
static FAILURES: LogLimit = LogLimit::new(Duration::from_secs(10));

/// A queue's registers.
struct Queue {
    max_size: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    /// Descriptor table, avail ring, used ring.
    addresses: [u64; 3],
}

impl Queue {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            addresses: [0; 3],
        }
    }

    /// Alignment and length of the three areas of a split ring (virtio 1.3, 2.7).
    fn areas(&self) -> [(u64, u64, usize); 3] {
        let size = usize::from(self.size);
        let [desc, avail, used] = self.addresses;
        [
            (desc, 16, 16 * size),
            (avail, 2, 6 + 2 * size),
            (used, 4, 6 + 8 * size),
        ]
    }
}

/// The structure, and the device behind it.
pub(super) struct Common {
    name: String,
    pub(super) device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    notifier: Arc<Notifier>,
    doorbells: Vec<Arc<dyn DoorbellAt>>,
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    status: u8,
    resetting: bool,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Common {
    pub(super) fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        notifier: Arc<Notifier>,
        doorbells: Vec<Arc<dyn DoorbellAt>>,
    ) -> Self {
        let queues = device.queue_sizes().iter().copied().map(Queue::new);
        Self {
            name: name.to_owned(),
            queues: queues.collect(),
            device,
            memory,
            notifier,
            doorbells,
            device_select: 0,
            driver_select: 0,
            driver_features: 0,
            status: 0,
            resetting: false,
            queue_select: 0,
        }
    }

    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bytes = self.snapshot();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).map_or(usize::MAX, |o| o.saturating_add(i));
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// The structure as a read finds it; asks a device that is being reset whether it is done.
    fn snapshot(&mut self) -> [u8; COMMON_LEN] {
        let status = self.read_status();
        let mut bytes = [0; COMMON_LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0x00, &self.device_select.to_le_bytes());
        let offered = self.device.features();
        put(0x04, &half(offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        let chosen = half(self.driver_features, self.driver_select);
        put(0x0c, &chosen.to_le_bytes());
        put(0x10, &self.notifier.vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[status, self.notifier.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(queue.addresses) {
                put(at, &address.to_le_bytes());
            }
        }
        bytes
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        if data.len() > bytes.len() {
            return;
        }
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_select = value as u32,
            (0x08, 4) => self.driver_select = value as u32,
            (0x0c, 4) => self.write_features(value as u32),
            (0x10, 2) => self.notifier.set_vector(self.usable_vector(value as u16)),
            (0x14, 1) => self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => self.write_queue_vector(value as u16),
            _ => self.write_queue(offset, data.len(), value),
        }
    }

    /// Fields that may change only before the queue is enabled.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let started = self.status & DRIVER_OK != 0 || self.resetting;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled || started {
            return;
        }
        match (offset, len) {
            (0x18, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20..0x38, 4) if offset.is_multiple_of(4) => {
                let address = &mut queue.addresses[(offset as usize - 0x20) / 8];
                let shift = 8 * (offset % 8);
                *address = *address & !(0xffff_ffff << shift) | value << shift;
            }
            (0x20..0x38, 8) if offset.is_multiple_of(8) => {
                queue.addresses[(offset as usize - 0x20) / 8] = value;
            }
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 || self.driver_select > 1 {
            return;
        }
        let shift = 32 * self.driver_select;
        self.driver_features =
            self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn write_queue_vector(&mut self, value: u16) {
        let vector = self.usable_vector(value);
        let running = self.status & DRIVER_OK != 0 && !self.resetting;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        queue.vector = vector;
        if queue.enabled && running {
            match self.call(vector) {
                Ok(call) => self.device.set_call(self.queue_select, call),
                Err(error) => self.fail(&error.to_string()),
            }
        }
    }

    /// What a vector register reads back: NO_VECTOR says that there is no such vector.
    fn usable_vector(&self, vector: u16) -> u16 {
        self.notifier
            .msix
            .event(vector)
            .map_or(NO_VECTOR, |_| vector)
    }

    fn read_status(&mut self) -> u8 {
        self.end_reset();
        let needs_reset = self.status != 0 && self.notifier.wants_reset();
        self.status | if needs_reset { NEEDS_RESET } else { 0 }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        if self.resetting {
            return;
        }
        let new = value & !self.status;
        self.status |= new & !(FEATURES_OK | DRIVER_OK | NEEDS_RESET);
        if new & FAILED != 0
            && let Some(suppressed) = DRIVER_LINES.pass()
        {
            let device = self.name.as_str();
            tracing::info!(
                device,
                suppressed,
                "the guest's driver gave up on the device"
            );
        }
        if new & FEATURES_OK != 0 && self.features_ok() {
            self.status |= FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
            self.activate();
        }
    }

    fn features_ok(&self) -> bool {
        let (chosen, offered) = (self.driver_features, self.device.features());
        let ok = chosen & !offered == 0
            && chosen >> VIRTIO_F_VERSION_1 & 1 == 1
            && self.device.accepts(chosen);
        if !ok && let Some(suppressed) = DRIVER_LINES.pass() {
            tracing::info!(
                device = %self.name,
                suppressed,
                chosen = format_args!("{chosen:#x}"),
                offered = format_args!("{offered:#x}"),
                "features refused"
            );
        }
        ok
    }

    fn activate(&mut self) {
        let activated = self.queue_setups().and_then(|queues| {
            let activation = Activation {
                features: self.driver_features,
                queues,
                memory: self.memory.clone(),
            };
            self.device.activate(activation).map_err(|e| e.to_string())
        });
        if let Err(reason) = activated {
            self.fail(&reason);
        }
    }

    fn queue_setups(&self) -> Result<Vec<QueueSetup>, String> {
        let mut setups = Vec::new();
        for ((queue, doorbell), index) in self.queues.iter().zip(&self.doorbells).zip(0..) {
            if !queue.enabled {
                continue;
            }
            for (address, align, len) in queue.areas() {
                let inside =
                    self.memory
                        .check_range(GuestAddress(address), len, Permissions::ReadWrite);
                if !address.is_multiple_of(align) || !inside {
                    return Err(format!(
                        "queue {index}: no ring of {} descriptors fits at {address:#x}",
                        queue.size
                    ));
                }
            }
            let eventfd = |error| format!("queue {index}: cannot duplicate an eventfd: {error}");
            let [desc, avail, used] = queue.addresses;
            setups.push(QueueSetup {
                index,
                size: queue.size,
                desc,
                avail,
                used,
                kick: doorbell.event().try_clone().map_err(eventfd)?,
                call: self.call(queue.vector).map_err(eventfd)?,
            });
        }
        Ok(setups)
    }

    /// The event of a vector; one that leads nowhere for none.
    fn call(&self, vector: u16) -> std::io::Result<EventFd> {
        match self.notifier.msix.event(vector) {
            Some(event) => event.try_clone(),
            None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC),
        }
    }

    fn fail(&self, reason: &str) {
        if let Some(suppressed) = FAILURES.pass() {
            tracing::warn!(device = %self.name, suppressed, reason, "the device needs a reset");
        }
        self.notifier.needs_reset();
    }

    /// Begins a reset, which ends when the device has let go.
    pub(super) fn reset(&mut self) {
        if self.resetting {
            return;
        }
        self.device.reset();
        self.resetting = true;
        self.end_reset();
    }

    /// Ends a reset that the device is done with.
    fn end_reset(&mut self) {
        if self.resetting && self.device.reset_progress() == ResetProgress::Done {
            self.notifier.reset();
            self.resetting = false;
            self.status = 0;
            self.driver_features = 0;
            (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
            for queue in &mut self.queues {
                *queue = Queue::new(queue.max_size);
            }
        }
    }
}

/// One of the 32-bit halves of the feature bits; there are no more than two.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
