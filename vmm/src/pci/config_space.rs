//! The register file of one function: 256 bytes, each with the bits that software may write.
//!
//! Above it stand the type 0 header ([`super::endpoint`]) and the type 1 header ([`super::root_port`]).
//! Registers at 0x100 and up are not here: no function has an extended capability, and they read 0.
//!
//! Reference: PCI Local Bus 3.0, 6.1 and 6.2; PCI Express 3.0, 7.5.

/// Offset of the command register.
pub(super) const COMMAND: usize = 0x04;
/// Offset of the first BAR.
pub(super) const BAR0: usize = 0x10;
/// Command: memory decode.
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: bus master.
pub(super) const COMMAND_MASTER: u16 = 1 << 2;
/// Command bits that software may write: I/O, memory, master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Status: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Offset of the first capability's pointer.
const CAPABILITIES: usize = 0x34;
/// Where the first capability goes.
const FIRST_CAPABILITY: usize = 0x40;
/// Bytes of configuration space that a function has.
pub(super) const SIZE: usize = 256;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class and programming interface, as in 0x010000.
    pub class: u32,
    /// Subsystem vendor id and subsystem id; a bridge has none.
    pub subsystem: (u16, u16),
}

/// The registers of one function.
#[derive(Debug, Clone)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A header of this type (0 or 1) with nothing in it but the identity and the command register.
    pub(super) fn new(identity: &Identity, header_type: u8) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
        };
        space.set_u16(0x00, identity.vendor);
        space.set_u16(0x02, identity.device);
        space.set_u32(0x08, identity.class << 8 | u32::from(identity.revision));
        space.bytes[0x0e] = header_type;
        if header_type == 0 {
            space.set_u16(0x2c, identity.subsystem.0);
            space.set_u16(0x2e, identity.subsystem.1);
        }
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and interrupt line: scratch registers of the firmware.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Adds a capability: `body` follows the id and the next pointer; `writable` are its writable bits,
    /// from the body's start. Returns its offset.
    ///
    /// # Panics
    /// If the capabilities do not fit: the list is ours, not the guest's.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        assert!(end <= SIZE, "the capability list ends at {end:#x}");
        self.bytes[self.last_pointer] = u8::try_from(at).expect("below 256");
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.allow(at + 2, writable);
        let status = self.u16(0x06) | STATUS_CAPABILITIES;
        self.set_u16(0x06, status);
        self.last_pointer = at + 1;
        self.next_capability = end;
        at
    }

    /// Lets software write these bits.
    pub(super) fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Reads bytes; those past the end are 0.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    /// Writes bytes as software does: only writable bits change.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, &value) in data.iter().enumerate() {
            if let Some(byte) = self.bytes.get_mut(offset + i) {
                let mask = self.writable[offset + i];
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    pub(super) fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    pub(super) fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Sets a register whatever its writable bits are.
    pub(super) fn set_u8(&mut self, offset: usize, value: u8) {
        self.bytes[offset] = value;
    }

    /// Sets a register whatever its writable bits are.
    pub(super) fn set_u16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets a register whatever its writable bits are.
    pub(super) fn set_u32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Whether all of these command bits are set.
    pub(super) fn command_has(&self, bits: u16) -> bool {
        self.u16(COMMAND) & bits == bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_0000,
            subsystem: (0x1af4, 0x1100),
        };
        ConfigSpace::new(&identity, 0)
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = space();
        space.write(0, &[0; 8]);
        assert_eq!(space.u32(0), 0x1042_1af4);
        space.write(COMMAND, &[0xff; 4]);
        assert_eq!(space.u16(COMMAND), COMMAND_WRITABLE);
        assert_eq!(space.u16(0x06), 0);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[1; 10], &[]);
        let second = space.add_capability(0x09, &[2; 13], &[]);
        assert_eq!((first, second), (0x40, 0x4c));
        let mut bytes = [0; 2];
        space.read(0x34, &mut bytes[..1]);
        assert_eq!(bytes[0], 0x40);
        space.read(0x40, &mut bytes);
        assert_eq!(bytes, [0x11, 0x4c]);
        space.read(0x4c, &mut bytes);
        assert_eq!(bytes, [0x09, 0]);
        assert_eq!(space.u16(0x06) & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
    }

    #[test]
    fn reads_past_the_end_are_zero_and_writes_there_are_lost() {
        let mut space = space();
        let mut data = [0xaa; 4];
        space.write(0xfe, &[0xff; 4]);
        space.read(0xfe, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
