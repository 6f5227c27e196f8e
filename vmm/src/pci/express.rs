//! The PCI Express and MSI capabilities that functions here carry.
//!
//! The link is what a virtual one can be: up, 2.5 GT/s, one lane, no power management, no hot-plug.
//!
//! Reference: PCI Express 3.0, 7.8; PCI Local Bus 3.0, 6.8.1.

use super::config_space::ConfigSpace;

/// Id of the PCI Express capability.
const CAPABILITY_EXPRESS: u8 = 0x10;
/// Id of the MSI capability.
const CAPABILITY_MSI: u8 = 0x05;
/// Bytes of the PCI Express capability, version 2, without id and next pointer.
const BODY_LEN: usize = 0x3a;

/// What kind of function it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PortType {
    /// A device below a root port.
    Endpoint,
    /// A device on bus 0.
    IntegratedEndpoint,
    /// A root port whose slot, with this number, holds a device.
    RootPort {
        /// Physical slot number.
        slot: u8,
    },
}

/// Adds the PCI Express capability. Offsets below are those of the specification.
pub(super) fn add_express(space: &mut ConfigSpace, port: PortType) {
    let mut body = [0; BODY_LEN];
    let mut writable = [0; BODY_LEN];
    let (kind, link) = match port {
        PortType::Endpoint => (0x0, true),
        PortType::IntegratedEndpoint => (0x9, false),
        PortType::RootPort { .. } => (0x4, true),
    };
    let slot_implemented = u16::from(matches!(port, PortType::RootPort { .. })) << 8;
    put16(&mut body, 0x02, 2 | kind << 4 | slot_implemented);
    // Device: role-based error reporting; no-snoop, relaxed ordering, reads of 512 bytes.
    put32(&mut body, 0x04, 1 << 15);
    put16(&mut body, 0x08, 0x2810);
    put16(&mut writable, 0x08, 0x7fff);
    if link {
        put32(&mut body, 0x0c, 0x11);
        put16(&mut body, 0x12, 0x11);
        put16(&mut writable, 0x10, 0x00c8);
        put32(&mut body, 0x2c, 1 << 1);
        put16(&mut body, 0x30, 1);
    }
    if let PortType::RootPort { slot } = port {
        // Link: its state is reported, and is active. Slot: its number, and that it is occupied.
        put32(&mut body, 0x0c, 0x11 | 1 << 20 | u32::from(slot) << 24);
        put16(&mut body, 0x12, 0x11 | 1 << 13);
        put32(&mut body, 0x14, u32::from(slot) << 19);
        put16(&mut body, 0x1a, 1 << 6);
        put16(&mut writable, 0x1c, 0x1f);
    }
    space.add_capability(CAPABILITY_EXPRESS, &body, &writable);
}

/// Adds an MSI capability of one 64-bit vector. A root port has it for its driver's sake, which wants an
/// interrupt for power-management events; there are none.
pub(super) fn add_msi(space: &mut ConfigSpace) {
    let mut body = [0; 12];
    let mut writable = [0; 12];
    put16(&mut body, 0x02, 1 << 7);
    put16(&mut writable, 0x02, 1);
    put32(&mut writable, 0x04, 0xffff_fffc);
    put32(&mut writable, 0x08, 0xffff_ffff);
    put16(&mut writable, 0x0c, 0xffff);
    space.add_capability(CAPABILITY_MSI, &body, &writable);
}

/// Puts a register at its offset from the capability's start, which is two bytes before the body's.
fn put16(body: &mut [u8], offset: usize, value: u16) {
    body[offset - 2..offset].copy_from_slice(&value.to_le_bytes());
}

fn put32(body: &mut [u8], offset: usize, value: u32) {
    body[offset - 2..offset + 2].copy_from_slice(&value.to_le_bytes());
}
