//! A driver of a virtio device in a few instructions (virtio 1.3, 3.1 and 2.7): one queue, one chain, no interrupts.
//!
//! The function's BAR is put into the 32-bit window first, with the window of the root port around it, as code
//! without paging reaches no other. Where the structures are in it is what the transport's capabilities say.

use super::Code;

/// Where the BAR goes, the queue, and what is free for buffers.
const BAR: u32 = 0xc800_0000;
const DESC: u32 = 0x30_0000;
const AVAIL: u32 = 0x30_1000;
const USED: u32 = 0x30_2000;
pub(crate) const BUFFER: u32 = 0x30_4000;
/// The structure of queues' doorbells in the BAR, and the step from one to the next.
const NOTIFY: u32 = 0x1_0000;
const NOTIFY_STEP: u32 = 4;

/// Where the device's own configuration is seen.
pub(crate) const CONFIG: u32 = BAR + 0x2000;

/// What the device does with a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Reads,
    Writes,
}

impl Code {
    /// Sets up that queue of the device behind `port`, and gives it a chain of buffers: address, length, access.
    pub(crate) fn virtio_submit(
        self,
        port: (u8, u8),
        device: (u8, u8),
        queue: u16,
        chain: &[(u32, u32, Access)],
    ) -> Self {
        let window = (BAR >> 16) as u16;
        let placed = self
            .pci_write(port, 0x20, window)
            .pci_write(port, 0x22, window)
            .pci_write(port, 4, 6)
            .pci_write(device, 0x10, 0)
            .pci_write(device, 0x12, window)
            .pci_write(device, 0x14, 0)
            .pci_write(device, 0x16, 0)
            .pci_write(device, 4, 6);
        placed
            .store8(BAR + 0x14, 0) // device_status
            .store8(BAR + 0x14, 1)
            .store8(BAR + 0x14, 3)
            .store32(BAR + 8, 0) // VERSION_1 is bit 0 of the second half
            .store32(BAR + 12, 0)
            .store32(BAR + 8, 1)
            .store32(BAR + 12, 1)
            .store8(BAR + 0x14, 0xb)
            .store16(BAR + 0x16, queue)
            .store16(BAR + 0x18, 8)
            .store32(BAR + 0x20, DESC)
            .store32(BAR + 0x24, 0)
            .store32(BAR + 0x28, AVAIL)
            .store32(BAR + 0x2c, 0)
            .store32(BAR + 0x30, USED)
            .store32(BAR + 0x34, 0)
            .store16(BAR + 0x1c, 1) // queue_enable
            .virtio_chain(chain)
            .store32(USED, 0)
            .store32(AVAIL + 4, 0)
            .store32(AVAIL, 1 << 16 | 1) // one buffer, no interrupts
            .store8(BAR + 0x14, 0xf) // DRIVER_OK
            .store16(BAR + NOTIFY + NOTIFY_STEP * u32::from(queue), queue)
    }

    /// Descriptors of the queue from the first on.
    fn virtio_chain(mut self, chain: &[(u32, u32, Access)]) -> Self {
        for ((desc, next), &(gpa, len, access)) in (DESC..).step_by(16).zip(1_u32..).zip(chain) {
            let write = if access == Access::Writes { 2 } else { 0 };
            let more = u32::from((next as usize) < chain.len());
            self = self
                .store32(desc, gpa)
                .store32(desc + 4, 0)
                .store32(desc + 8, len)
                .store32(desc + 12, (more * next) << 16 | write | more);
        }
        self
    }

    /// Resets the device, and waits until it has let go.
    pub(crate) fn virtio_reset(self) -> Self {
        // Status, generation, and the queue that is selected.
        self.store8(BAR + 0x14, 0).wait32(BAR + 0x14, 0)
    }

    /// Waits until the device has given the chain back.
    pub(crate) fn virtio_complete(self) -> Self {
        self.wait32(USED, 1 << 16)
    }

    /// Writes a byte to an address.
    fn store8(mut self, gpa: u32, value: u8) -> Self {
        self.0.extend([0xc6, 0x05]); // mov byte ptr [gpa], value
        self.0.extend(gpa.to_le_bytes());
        self.0.push(value);
        self
    }

    /// Writes 16 bits to an address.
    fn store16(mut self, gpa: u32, value: u16) -> Self {
        self.0.extend([0x66, 0xc7, 0x05]); // mov word ptr [gpa], value
        self.0.extend(gpa.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Reads 32 bits until they are `value`.
    pub(crate) fn wait32(mut self, gpa: u32, value: u32) -> Self {
        self.0.extend([0x81, 0x3d]); // cmp dword ptr [gpa], value
        self.0.extend(gpa.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x75, 0xf4]); // jne to it
        self
    }
}
