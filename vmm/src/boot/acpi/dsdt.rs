//! DSDT: the devices that nothing else announces, in AML (ACPI 6.5, 20).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::table;
use crate::cpu::topology::Topology;
use crate::memory::layout::{
    ECAM_LEN, ECAM_START, LAST_BUS, MMIO32_LEN, MMIO32_START, MMIO64_LEN, PM1A_EVT_PORT,
    S5_SLEEP_TYPE,
};

const REVISION: u8 = 2;
/// Bytes of ports from the PM1a event block to the end of the PM timer.
const PM_PORTS_LEN: u8 = 12;
/// PCI host bridge `_OSC` (PCI Firmware 3.3, 4.5.1).
const PCI_OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the guest may control: native hotplug, PME, AER, the PCIe capability, LTR. Not SHPC hotplug.
const OSC_GRANTED: u32 = 0b11_1101;
/// Status bits of `_OSC`: unknown UUID, unknown revision, not all granted.
const OSC_BAD_UUID: u32 = 1 << 2;
const OSC_BAD_REVISION: u32 = 1 << 3;
const OSC_MASKED: u32 = 1 << 4;

/// The table. `mmio64_start` depends on the guest's RAM.
pub(super) fn build(topology: Topology, serial: bool, mmio64_start: u64) -> Sdt {
    let mut body = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut body);
    let mut devices = Vec::new();
    motherboard(&mut devices);
    host_bridge(&mut devices, mmio64_start);
    clock(&mut devices);
    if serial {
        serial_port(&mut devices);
    }
    processors(&mut devices, topology);
    body.extend(Scope::raw("\\_SB_".into(), devices));
    table(*b"DSDT", REVISION, &body)
}

/// Ranges that belong to nobody else: configuration space and the power-management ports.
fn motherboard(aml: &mut dyn AmlSink) {
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ECAM_START as u32, ECAM_LEN as u32),
                    &IO::new(PM1A_EVT_PORT, PM1A_EVT_PORT, 1, PM_PORTS_LEN),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The PCIe host bridge: buses, windows, and what it leaves to the guest.
fn host_bridge(aml: &mut dyn AmlSink, mmio64_start: u64) {
    let uncached = AddressSpaceCacheable::NotCacheable;
    let windows = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0u16, u16::from(LAST_BUS)),
            // The ports of configuration space itself are between the two windows.
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::new_io(0u16, 0xcf7u16, None),
            &AddressSpace::new_io(0xd00u16, 0xffffu16, None),
            &AddressSpace::new_memory(
                uncached,
                true,
                MMIO32_START as u32,
                (MMIO32_START + MMIO32_LEN - 1) as u32,
                None,
            ),
            &AddressSpace::new_memory(
                uncached,
                true,
                mmio64_start,
                mmio64_start + MMIO64_LEN - 1,
                None,
            ),
        ]),
    );
    let fixed = [
        Name::new("_HID".into(), &EISAName::new("PNP0A08")),
        Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        Name::new("_SEG".into(), &ZERO),
        Name::new("_BBN".into(), &ZERO),
        Name::new("_UID".into(), &ZERO),
        Name::new("_CCA".into(), &1u8),
        windows,
    ];
    let mut children: Vec<&dyn Aml> = fixed.iter().map(|name| name as &dyn Aml).collect();
    children.push(&OscMethod);
    Device::new("PCI0".into(), children).to_aml_bytes(aml);
}

/// `_OSC(uuid, revision, count, capabilities)`: answers with what of the asked-for control the guest gets.
struct OscMethod;

impl Aml for OscMethod {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let [status, control]: [Path; 2] = ["CDW1".into(), "CDW3".into()];
        let (uuid, revision, capabilities, granted) = (Arg(0), Arg(1), Arg(3), Local(0));
        Method::new(
            "_OSC".into(),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &capabilities, &ZERO),
                &If::new(
                    &Equal::new(&uuid, &Uuid::new(PCI_OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&control, &capabilities, &8u8),
                        &Store::new(&granted, &control),
                        &And::new(&granted, &granted, &OSC_GRANTED),
                        &If::new(
                            &NotEqual::new(&revision, &1u8),
                            vec![&Or::new(&status, &status, &OSC_BAD_REVISION)],
                        ),
                        &If::new(
                            &NotEqual::new(&control, &granted),
                            vec![&Or::new(&status, &status, &OSC_MASKED)],
                        ),
                        &Store::new(&control, &granted),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &OSC_BAD_UUID)]),
                &Return::new(&capabilities),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The CMOS clock.
fn clock(aml: &mut dyn AmlSink) {
    Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(0x70, 0x70, 1, 2)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// A 16550 at COM1.
fn serial_port(aml: &mut dyn AmlSink) {
    const COM1: u16 = 0x3f8;
    const COM1_PIN: u32 = 4;
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(COM1, COM1, 1, 8),
                    &Interrupt::new(true, true, false, false, COM1_PIN),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// One device a vCPU; its id is the one in the MADT.
fn processors(aml: &mut dyn AmlSink, topology: Topology) {
    for vcpu in 0..topology.cores() {
        Device::new(
            format!("C{vcpu:03X}").as_str().into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &vcpu),
            ],
        )
        .to_aml_bytes(aml);
    }
}
