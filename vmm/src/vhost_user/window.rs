//! The DMA window: the part of guest memory that backends map, where that is not all of it.
//!
//! ```text
//!  guest physical   0 ──────────── W            4 GiB ─────────────
//!                   │ rings, bounce │            │ private, mergeable │
//!                   │ buffers       │            │ no backend has it  │
//!                   └──── memfd ────┘            └────────────────────┘
//! ```
//!
//! Linux limits the devices below a bridge of vendor 0x1106 to 32-bit addresses (arch/x86/kernel/pci-dma.c,
//! `via_no_dac`), and as there is no other RAM below 4 GiB their rings are in the window, and what they read and
//! write is copied through buffers there (swiotlb). It does so only for a device whose driver keeps to the
//! platform's rules of DMA: VIRTIO_F_ACCESS_PLATFORM. That bit is a matter between guest and VMM: to a backend it would
//! mean an IOTLB, so it is never passed on.
//!
//! A guest that does not do its part gets shadow queues ([`super::reach`]), or where these are not wanted it is refused:
//! without the bit no FEATURES_OK; with a ring outside, NEEDS_RESET. A buffer outside is found by the backend, which has
//! no such memory.
//!
//! virtio 1.3, 6 (VIRTIO_F_ACCESS_PLATFORM).

use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::kind::bits;
use crate::devices::virtio::device::QueueSetup;
use crate::telemetry::LogLimit;

const ACCESS_PLATFORM: u64 = bits(&[VIRTIO_F_ACCESS_PLATFORM]);
/// What is said of a guest that does not keep to the window.
const STRAYS: &str = "the guest does not keep to the DMA window (is iommu=usedac on its command line? only Linux keeps to it)";
/// And where there is no other way.
pub(super) const ADVICE: &str = "leave dma=window out, or use mergeable=off";
/// A driver can try as often as it likes.
static REFUSALS: LogLimit = LogLimit::new(Duration::from_secs(10));

/// The window, and what is asked of a driver for it.
#[derive(Debug, Clone)]
pub(super) struct Window {
    /// One region.
    memory: GuestMemoryMmap,
}

impl Window {
    pub(super) fn new(memory: GuestMemoryMmap) -> Self {
        Self { memory }
    }

    /// What a backend maps.
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Offered beside what the backend offers.
    pub(super) fn features(&self) -> u64 {
        ACCESS_PLATFORM
    }

    /// Whether a driver chose to keep to the platform's rules.
    pub(super) fn has_taken(&self, chosen: u64) -> bool {
        chosen & ACCESS_PLATFORM != 0
    }

    /// Whether a driver that chose these can be served in the window; says so where not.
    pub(super) fn accepts(&self, device: &str, chosen: u64) -> bool {
        let accepted = self.has_taken(chosen);
        if !accepted && let Some(suppressed) = REFUSALS.pass() {
            tracing::warn!(
                device,
                suppressed,
                "refused, as its driver does not take VIRTIO_F_ACCESS_PLATFORM: {STRAYS}: {ADVICE}"
            );
        }
        accepted
    }

    /// What a backend is to hear of these.
    pub(super) fn without_ours(chosen: u64) -> u64 {
        chosen & !ACCESS_PLATFORM
    }

    /// Whether rings are in the window, or why not.
    pub(super) fn check(&self, rings: &[QueueSetup]) -> Result<(), String> {
        let end = self.memory.iter().map(GuestMemoryRegion::len).sum::<u64>();
        for ring in rings {
            let size = u64::from(ring.size);
            let areas = [
                (ring.desc, 16 * size),
                (ring.avail, 6 + 2 * size),
                (ring.used, 6 + 8 * size),
            ];
            for (address, len) in areas {
                if address.checked_add(len).is_none_or(|last| last > end) {
                    return Err(format!(
                        "queue {}: a ring at {address:#x} is outside the first {} MiB: {STRAYS}",
                        ring.index,
                        end >> 20
                    ));
                }
            }
        }
        Ok(())
    }

    /// What to say beside a queue that a backend gave up.
    pub(super) fn suspicion(&self) -> &'static str {
        "; if a buffer is outside its memory, the guest does not keep to the DMA window: leave dma=window out, or use mergeable=off"
    }
}
