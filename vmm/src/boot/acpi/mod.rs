//! ACPI tables: what the guest's firmware would say about the board.
//!
//! ```text
//!   RSDP ─▶ XSDT ─┬─▶ FADT ─┬─▶ FACS
//!                 │         └─▶ DSDT   host bridge, serial port, clock, processors
//!                 ├─▶ MADT             local APICs, IOAPIC, SCI
//!                 └─▶ MCFG             PCIe configuration space
//! ```
//!
//! They lie in the BIOS read-only area ([`layout::ACPI_START`]), reserved in the memory map, RSDP first: a
//! kernel is told its address, and one that scans finds it. The machine has ACPI's fixed hardware (power
//! management registers, power button) and no SMM: it is in ACPI mode from the start. ACPI 6.5.

mod dsdt;
mod fadt;
mod madt;
mod mcfg;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::config::CpusConfig;
use crate::cpu::topology::Topology;
use crate::memory::GuestRam;
use crate::memory::layout;

const OEM_ID: [u8; 6] = *b"BERTH ";
const OEM_TABLE_ID: [u8; 8] = *b"BERTHVMM";
const OEM_REVISION: u32 = 1;
/// The FACS must be so aligned; the others do not mind.
const ALIGNMENT: u64 = 64;

/// What the tables depend on, besides the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcpiInput {
    /// vCPUs.
    pub vcpus: u16,
    /// Whether there is a serial port at COM1.
    pub serial: bool,
    /// Whether there is a PIC pair.
    pub pic: bool,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too many tables for the area.
    #[error(
        "ACPI tables of {len} bytes do not fit into the {room} bytes at {:#x}",
        layout::ACPI_START
    )]
    TooBig {
        /// Bytes needed.
        len: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write ACPI tables to guest memory at {gpa:#x}")]
    Write {
        /// Guest physical address.
        gpa: u64,
        /// What `vm-memory` said.
        source: GuestMemoryError,
    },
}

/// Writes the tables; returns the RSDP's address.
pub fn build(ram: &GuestRam, input: &AcpiInput) -> Result<GuestAddress, Error> {
    let mmio64_start = layout::mmio64_start(ram.high_len());
    let topology = Topology::new(&CpusConfig::of(input.vcpus));
    // The RSDP comes first but is made last, when the XSDT's address is known.
    let mut area = Area::new(layout::ACPI_START + Rsdp::len() as u64);
    let facs = area.add(&FACS::new());
    let dsdt = area.add(&dsdt::build(topology, input.serial, mmio64_start));
    let fadt = area.add(&fadt::build(facs, dsdt));
    let madt = area.add(&madt::build(topology, input.pic));
    let mcfg = area.add(&mcfg::build());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);

    area.write(ram)?;
    let gpa = layout::ACPI_START;
    ram.memory()
        .write_slice(&rsdp, GuestAddress(gpa))
        .map_err(|source| Error::Write { gpa, source })?;
    Ok(GuestAddress(gpa))
}

/// Tables as they will lie in guest memory.
struct Area {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Area {
    fn new(start: u64) -> Self {
        Self {
            next: start.next_multiple_of(ALIGNMENT),
            tables: Vec::new(),
        }
    }

    /// Gives a table its place; returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let gpa = self.next;
        self.next = (gpa + bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.tables.push((gpa, bytes));
        gpa
    }

    /// Puts all tables into guest memory.
    fn write(&self, ram: &GuestRam) -> Result<(), Error> {
        if self.next > layout::ACPI_END {
            return Err(Error::TooBig {
                len: self.next - layout::ACPI_START,
                room: layout::ACPI_END - layout::ACPI_START,
            });
        }
        for (gpa, bytes) in &self.tables {
            ram.memory()
                .write_slice(bytes, GuestAddress(*gpa))
                .map_err(|source| Error::Write { gpa: *gpa, source })?;
        }
        Ok(())
    }
}

/// A table with the standard header and `body`.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    const HEADER_LEN: u32 = 36;
    let mut table = Sdt::new(
        signature,
        HEADER_LEN,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;

    fn read(ram: &GuestRam, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.memory()
            .read_slice(&mut bytes, GuestAddress(gpa))
            .unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table_at(ram: &GuestRam, gpa: u64) -> Vec<u8> {
        let len = u32_at(&read(ram, gpa, 8), 4) as usize;
        let table = read(ram, gpa, len);
        if !table.starts_with(b"FACS") {
            let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
        }
        table
    }

    /// All tables by signature, reached from the RSDP as a kernel does.
    fn walk(ram: &GuestRam, rsdp: GuestAddress) -> Vec<(String, Vec<u8>)> {
        let root = read(ram, rsdp.0, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        for len in [20, 36] {
            assert_eq!(root[..len].iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        }
        let xsdt = table_at(ram, u64_at(&root, 24));
        let mut tables: Vec<Vec<u8>> = xsdt[36..]
            .chunks(8)
            .map(|gpa| table_at(ram, u64_at(gpa, 0)))
            .collect();
        let fadt = tables[0].clone();
        tables.push(table_at(ram, u32_at(&fadt, 40).into()));
        tables.push(table_at(ram, u32_at(&fadt, 36).into()));
        tables.push(xsdt);
        tables
            .into_iter()
            .map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table))
            .collect()
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_with_a_good_checksum() {
        let ram = testing::ram(512 << 20);
        for vcpus in [1, 64, 255, 1024] {
            let input = AcpiInput {
                vcpus,
                serial: true,
                pic: true,
            };
            let rsdp = build(&ram, &input).unwrap();
            assert!(rsdp.0.is_multiple_of(16), "a kernel may scan for it");
            let names: Vec<_> = walk(&ram, rsdp).into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT", "FACS", "XSDT"]);
        }
    }

    #[test]
    fn the_madt_has_every_vcpu_once() {
        let ram = testing::ram(512 << 20);
        let input = AcpiInput {
            vcpus: 5,
            serial: true,
            pic: true,
        };
        let rsdp = build(&ram, &input).unwrap();
        let tables = walk(&ram, rsdp);
        let mut entries = &tables[1].1[44..];
        let mut apics = Vec::new();
        while let [kind, len, ..] = *entries {
            if kind == 0 {
                apics.push((entries[2], entries[3], entries[4]));
            }
            entries = &entries[len.into()..];
        }
        assert_eq!(apics, (0..5).map(|i| (i, i, 1)).collect::<Vec<_>>());
    }

    /// Id 255 is everybody's in the old kind of entry.
    #[test]
    fn vcpus_from_255_up_are_x2apic_entries_of_the_madt() {
        let ram = testing::ram(512 << 20);
        let input = AcpiInput {
            vcpus: 300,
            serial: true,
            pic: false,
        };
        let rsdp = build(&ram, &input).unwrap();
        let tables = walk(&ram, rsdp);
        let (mut entries, mut ids, mut kinds) = (&tables[1].1[44..], Vec::new(), Vec::new());
        while let [kind, len, ..] = *entries {
            match kind {
                0 => ids.push((u32::from(entries[3]), u32::from(entries[2]))),
                9 => {
                    assert_eq!((len, u32_at(entries, 8)), (16, 1), "enabled");
                    ids.push((u32_at(entries, 4), u32_at(entries, 12)));
                }
                _ => kinds.push(kind),
            }
            entries = &entries[len.into()..];
        }
        assert_eq!(ids, (0..300).map(|id| (id, id)).collect::<Vec<_>>());
        assert_eq!(kinds, [1, 2, 4, 10], "and NMI for both kinds");
        let small = AcpiInput {
            vcpus: 255,
            ..input
        };
        let rsdp = build(&ram, &small).unwrap();
        let madt = &walk(&ram, rsdp)[1].1;
        assert_eq!(
            madt.len(),
            44 + 255 * 8 + 12 + 10 + 6,
            "none of the new kind"
        );
    }

    #[test]
    fn a_pic_is_promised_where_there_is_one() {
        let ram = testing::ram(512 << 20);
        for pic in [false, true] {
            let input = AcpiInput {
                vcpus: 1,
                serial: true,
                pic,
            };
            let rsdp = build(&ram, &input).unwrap();
            let flags = u32_at(&walk(&ram, rsdp)[1].1, 40);
            assert_eq!(flags, u32::from(pic), "PCAT_COMPAT alone");
        }
    }

    /// Intel's disassembler finds nothing to complain about. Skipped where it is not installed.
    #[test]
    fn iasl_takes_the_tables_apart() {
        use std::process::{Command, Stdio};
        let has_iasl = Command::new("iasl")
            .arg("-v")
            .stdout(Stdio::null())
            .status()
            .is_ok();
        if !has_iasl {
            eprintln!("skipped: no iasl");
            return;
        }
        let ram = testing::ram(5 << 30);
        let input = AcpiInput {
            vcpus: 300,
            serial: true,
            pic: true,
        };
        let rsdp = build(&ram, &input).unwrap();
        let dir = testing::TempDir::new();
        for (name, table) in walk(&ram, rsdp) {
            std::fs::write(dir.path().join(format!("{name}.dat")), table).unwrap();
            let run = |args: &[&str]| {
                let output = Command::new("iasl")
                    .args(args)
                    .current_dir(dir.path())
                    .output()
                    .unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned()
                    + &String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "iasl {args:?}: {text}");
                text
            };
            let text = run(&["-d", &format!("{name}.dat")]);
            assert!(!text.contains("rror") && !text.contains("arning"), "{text}");
            if name == "DSDT" {
                let text = run(&["-ve", "DSDT.dsl"]);
                assert!(text.contains("0 Errors"), "{text}");
            }
        }
    }
}
