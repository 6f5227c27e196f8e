//! The virtio PCI transport, modern only (virtio 1.3, 4.1).
//!
//! ```text
//!  BAR 0   0x00000  common configuration ─▶ common: features, status, queues
//!          0x01000  ISR status
//!          0x02000  device configuration ─▶ VirtioDevice
//!          0x04000  MSI-X pending bits   ─▶ pci::msix
//!          0x08000  MSI-X table          ─▶ pci::msix
//!          0x10000  notify, 4 bytes a queue: an ioeventfd each; KVM takes the writes
//! ```
//!
//! Neither a doorbell nor an interrupt of a queue comes by here: the device holds both eventfds. Writes
//! to the notify area are handled all the same, for software that uses the window capability.
//!
//! Threads: vCPU threads, one at a time under the lock of `Common`, which is held while the device is
//! called. A device notifies through `Notifier`, which takes no such lock.
//!
//! Invariants: a doorbell is where the BAR is, or nowhere. After the driver wrote 0 the status register
//! keeps its value until the device has let go of the rings.

mod common;
mod notifier;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_bindings::virtio_ids;
use vm_memory::GuestMemoryMmap;

use self::common::{COMMON_LEN, Common};
use self::notifier::Notifier;
use super::device::VirtioDevice;
use crate::bus::BusDevice;
use crate::pci::msix::{ENTRY_SIZE, MAX_VECTORS, Msix};
use crate::pci::{
    CAPABILITY_MSIX, Capability, DoorbellAt, Identity, PciFunction, Wiring, WiringError,
};
use crate::telemetry::LogLimit;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const PBA: u64 = 0x4000;
const TABLE: u64 = 0x8000;
const NOTIFY: u64 = 0x1_0000;
const BAR_SIZE: u64 = 0x2_0000;
const DEVICE_LEN: u64 = 0x1000;
const TABLE_LEN: u64 = MAX_VECTORS as u64 * ENTRY_SIZE as u64;
/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

static DOORBELLS: LogLimit = LogLimit::new(Duration::from_secs(10));

/// Capability id: vendor specific, as virtio's are.
const CAPABILITY_VENDOR: u8 = 0x09;
/// `cfg_type` values (virtio 1.3, 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: String,
    identity: Identity,
    vectors: u16,
    common: Mutex<Common>,
    notifier: Arc<Notifier>,
    msix: Arc<Msix>,
    doorbells: Vec<Arc<dyn DoorbellAt>>,
}

impl VirtioPci {
    /// Wraps a device: a doorbell and a vector for each of its queues, a vector for its configuration.
    pub fn new(
        name: &str,
        mut device: Box<dyn VirtioDevice>,
        wiring: &dyn Wiring,
        memory: GuestMemoryMmap,
    ) -> Result<Arc<Self>, WiringError> {
        let queues = device.queue_sizes().len();
        let vectors = u16::try_from(queues + 1).map_or(MAX_VECTORS, |n| n.min(MAX_VECTORS));
        let msix = Arc::new(Msix::new(name, wiring, vectors)?);
        let doorbells = (0..queues)
            .map(|_| Ok(Arc::from(wiring.doorbell()?)))
            .collect::<Result<Vec<_>, WiringError>>()?;
        let notifier = Arc::new(Notifier::new(Arc::clone(&msix)));
        device.attach(Arc::clone(&notifier) as _);
        let identity = identity(device.device_type());
        let common = Common::new(
            name,
            device,
            memory,
            Arc::clone(&notifier),
            doorbells.clone(),
        );
        Ok(Arc::new(Self {
            name: name.to_owned(),
            identity,
            vectors,
            common: Mutex::new(common),
            notifier,
            msix,
            doorbells,
        }))
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A doorbell rung by a write that did not go through KVM.
    fn ring(&self, offset: u64) {
        let queue = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).ok();
        if let Some(doorbell) = queue.and_then(|queue| self.doorbells.get(queue)) {
            // Full is as good as rung.
            let _ = doorbell.event().write(1);
        }
    }
}

impl Drop for VirtioPci {
    /// Takes its vectors off the chip, on the thread that drops it: a device's own thread may hold them a
    /// little longer, and is not permitted to.
    fn drop(&mut self) {
        self.msix.reset();
    }
}

/// Ids and class of a device type (virtio 1.3, 4.1.2.1; classes of the PCI code and id assignment
/// specification, so that software that goes by class finds disks and network cards).
fn identity(device_type: u32) -> Identity {
    let class = match device_type {
        virtio_ids::VIRTIO_ID_NET => 0x02_0000,
        virtio_ids::VIRTIO_ID_BLOCK => 0x01_0000,
        virtio_ids::VIRTIO_ID_CONSOLE => 0x07_8000,
        _ => 0xff_0000,
    };
    Identity {
        vendor: 0x1af4,
        device: 0x1040 + device_type as u16,
        revision: 1,
        class,
        subsystem: (0x1af4, 0x1100),
    }
}

impl BusDevice for VirtioPci {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => self.common().read(offset - COMMON, data),
            ISR..DEVICE => {
                data.fill(0);
                if let (ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.notifier.take_isr();
                }
            }
            DEVICE..PBA => self.common().device.read_config(offset - DEVICE, data),
            PBA..TABLE => self.msix.read_pba(offset - PBA, data),
            TABLE..NOTIFY => self.msix.read_table(offset - TABLE, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.common().write(offset - COMMON, data),
            DEVICE..PBA => self.common().device.write_config(offset - DEVICE, data),
            TABLE..NOTIFY => self.msix.write_table(offset - TABLE, data),
            NOTIFY..BAR_SIZE => self.ring(offset - NOTIFY),
            _ => {}
        }
    }
}

impl PciFunction for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn bar_size(&self) -> u64 {
        BAR_SIZE
    }

    fn capabilities(&self) -> Vec<Capability> {
        let notify_len = self.doorbells.len() as u64 * u64::from(NOTIFY_MULTIPLIER);
        let mut notify = structure(CFG_NOTIFY, NOTIFY, notify_len);
        notify.body[0] += 4;
        notify.body.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        let mut window = structure(CFG_PCI, 0, 0);
        window.body[0] += 4;
        window.body.extend([0; 4]);
        // BAR, offset, length and data; the id and the padding after the BAR are not written.
        window.writable = vec![0, 0, 0xff, 0, 0, 0];
        window.writable.extend([0xff; 12]);
        window.is_window = true;
        vec![
            structure(CFG_COMMON, COMMON, COMMON_LEN as u64),
            structure(CFG_ISR, ISR, 1),
            structure(CFG_DEVICE, DEVICE, DEVICE_LEN),
            notify,
            window,
            msix(self.vectors),
        ]
    }

    fn moved(&self, base: Option<u64>) {
        for doorbell in &self.doorbells {
            if let Err(error) = doorbell.remove()
                && let Some(suppressed) = DOORBELLS.pass()
            {
                let device = self.name();
                tracing::warn!(device, suppressed, %error, "cannot take a doorbell away");
            }
        }
        let Some(base) = base else { return };
        for (doorbell, queue) in self.doorbells.iter().zip(0..) {
            let gpa = base + NOTIFY + queue * u64::from(NOTIFY_MULTIPLIER);
            if let Err(error) = doorbell.place(gpa)
                && let Some(suppressed) = DOORBELLS.pass()
            {
                // Kicks still arrive, by an exit each.
                let device = self.name();
                tracing::warn!(device, queue, suppressed, %error, "cannot place a doorbell");
            }
        }
    }

    fn set_msix(&self, enabled: bool, masked: bool) {
        self.msix.set_control(enabled, masked);
    }

    fn reset(&self) {
        self.common().reset();
        self.msix.reset();
    }
}

/// `struct virtio_pci_cap` (virtio 1.3, 4.1.4): length, type, BAR, id, padding, offset, length.
fn structure(cfg_type: u8, offset: u64, len: u64) -> Capability {
    let mut body = vec![16, cfg_type, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    Capability {
        id: CAPABILITY_VENDOR,
        body,
        writable: Vec::new(),
        is_window: false,
    }
}

/// The MSI-X capability: size of the table, where it is, where the pending bits are.
fn msix(vectors: u16) -> Capability {
    const { assert!(TABLE + TABLE_LEN == NOTIFY) };
    let mut body = (vectors - 1).to_le_bytes().to_vec();
    body.extend((TABLE as u32).to_le_bytes());
    body.extend((PBA as u32).to_le_bytes());
    Capability {
        id: CAPABILITY_MSIX,
        body,
        writable: vec![0x00, 0xc0],
        is_window: false,
    }
}
