//! MADT: the interrupt controllers (ACPI 6.5, 5.2.12).
//!
//! ISA interrupts are the IOAPIC pin of their number, interrupt 0 too: the GSI table of `berth-irqchip`
//! leads the PIT to pin 0, so there is no override to pin 2 as on most boards. With the split irqchip there is
//! neither PIT nor PIC, and PCAT_COMPAT is clear: the guest looks for neither.
//!
//! A vCPU whose APIC id does not fit a local APIC's entry, from 255 up, has an x2APIC one (5.2.12.12).

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;

use super::table;
use crate::cpu::topology::{Topology, apic_id};
use crate::memory::layout::{IOAPIC_START, LAPIC_START, SCI_PIN};

const REVISION: u8 = 5;
/// The board has a PIC pair too.
const PCAT_COMPAT: u32 = 1;
const IOAPIC_ID: u8 = 0;
/// The APIC id of eight bits that is everybody's.
const BROADCAST: u8 = 0xff;
/// MPS INTI flags: active high, level triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// Local APICs of all vCPUs, one IOAPIC, the SCI, and NMI on LINT1 of every processor.
pub(super) fn build(topology: Topology, pic: bool) -> Sdt {
    let mut body = Vec::new();
    body.extend((LAPIC_START as u32).to_le_bytes());
    let flags = if pic { PCAT_COMPAT } else { 0 };
    body.extend(flags.to_le_bytes());
    for vcpu in 0..topology.cores() {
        match (u8::try_from(vcpu), u8::try_from(apic_id(vcpu))) {
            (Ok(uid), Ok(id)) if id != BROADCAST => {
                ProcessorLocalApic::new(uid, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => body.extend(local_x2apic(vcpu)),
        }
    }
    IoApic::new(IOAPIC_ID, IOAPIC_START as u32, 0).to_aml_bytes(&mut body);
    body.extend(sci_override());
    body.extend(local_nmi());
    if topology.cores() > u16::from(BROADCAST) {
        body.extend(local_x2apic_nmi());
    }
    table(*b"APIC", REVISION, &body)
}

/// Interrupt source override: type 2, bus ISA, source and GSI the SCI's pin.
fn sci_override() -> [u8; 10] {
    let [g0, g1, g2, g3] = SCI_PIN.to_le_bytes();
    let [f0, f1] = ACTIVE_HIGH_LEVEL.to_le_bytes();
    [2, 10, 0, g0, g0, g1, g2, g3, f0, f1]
}

/// Local APIC NMI: type 4, all processors, flags as the bus has them, LINT1.
fn local_nmi() -> [u8; 6] {
    [4, 6, 0xff, 0, 0, 1]
}

/// Processor local x2APIC: type 9, enabled.
fn local_x2apic(vcpu: u16) -> Vec<u8> {
    let words = [u32::from(apic_id(vcpu)), 1, vcpu.into()];
    let mut entry = vec![9, 16, 0, 0];
    entry.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    entry
}

/// Local x2APIC NMI: type 10, flags as the bus has them, all processors, LINT1.
fn local_x2apic_nmi() -> [u8; 12] {
    [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]
}
