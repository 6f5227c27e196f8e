//! The PCI Express and MSI capabilities that functions here carry.
//!
//! The link is what a virtual one can be: 2.5 GT/s, one lane, no power management. A root port's slot is
//! [`super::slot`]'s.
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
    /// A root port with a slot.
    RootPort,
}

/// Adds the PCI Express capability; returns its offset. Offsets below are those of the specification.
pub(super) fn add_express(space: &mut ConfigSpace, port: PortType) -> usize {
    let mut body = [0; BODY_LEN];
    let mut writable = [0; BODY_LEN];
    let (kind, link) = match port {
        PortType::Endpoint => (0x0, true),
        PortType::IntegratedEndpoint => (0x9, false),
        PortType::RootPort => (0x4, true),
    };
    let slot_implemented = u16::from(port == PortType::RootPort) << 8;
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
    if port == PortType::RootPort {
        // Link: whether it is active is reported. Root control: what its driver sets and nothing reads.
        put32(&mut body, 0x0c, 0x11 | 1 << 20);
        put16(&mut writable, 0x1c, 0x1f);
    }
    space.add_capability(CAPABILITY_EXPRESS, &body, &writable)
}

/// Offsets in the MSI capability.
const MSI_CONTROL: usize = 0x02;
const MSI_ADDRESS: usize = 0x04;
const MSI_DATA: usize = 0x0c;
const MSI_LEN: usize = 0x0e;

/// Adds an MSI capability of one 64-bit vector; returns its offset.
pub(super) fn add_msi(space: &mut ConfigSpace) -> usize {
    let mut body = [0; MSI_LEN - 2];
    let mut writable = [0; MSI_LEN - 2];
    put16(&mut body, MSI_CONTROL, 1 << 7);
    put16(&mut writable, MSI_CONTROL, 1);
    put32(&mut writable, MSI_ADDRESS, 0xffff_fffc);
    put32(&mut writable, MSI_ADDRESS + 4, 0xffff_ffff);
    put16(&mut writable, MSI_DATA, 0xffff);
    space.add_capability(CAPABILITY_MSI, &body, &writable)
}

/// The message of the MSI capability at `at`, while it is enabled: address and data.
pub(super) fn msi_message(space: &ConfigSpace, at: usize) -> Option<(u64, u32)> {
    let enabled = space.u16(at + MSI_CONTROL) & 1 != 0;
    let [low, high] = [0, 4].map(|i| u64::from(space.u32(at + MSI_ADDRESS + i)));
    enabled.then(|| (low | high << 32, space.u16(at + MSI_DATA).into()))
}

/// Whether an access meets the MSI capability at `at`.
pub(super) fn touches_msi(at: usize, offset: usize, len: usize) -> bool {
    offset < at + MSI_LEN && at < offset + len
}

/// Puts a register at its offset from the capability's start, which is two bytes before the body's.
fn put16(body: &mut [u8], offset: usize, value: u16) {
    body[offset - 2..offset].copy_from_slice(&value.to_le_bytes());
}

fn put32(body: &mut [u8], offset: usize, value: u32) {
    body[offset - 2..offset + 2].copy_from_slice(&value.to_le_bytes());
}
