//! A vCPU's first register state, and its state in words when the guest has failed.
//!
//! Only the boot processor is given an entry. The others stay as KVM makes them, waiting for INIT and
//! SIPI, which the in-kernel LAPIC handles; nothing here touches them.
//!
//! The 64-bit entry needs paging on: page tables and GDT lie in low RAM (see
//! [`crate::memory::layout`]), one to one for the first 5 GiB, as a kernel may lie above a guest's DMA window. PVH
//! boot ABI; Linux Documentation/arch/x86/boot.rst, "64-bit boot protocol".

use std::fmt::Write;

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::{Entry, multiboot};
use crate::memory::GuestRam;
use crate::memory::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK};

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of the flags that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PTE_PRESENT_WRITE: u64 = 0b11;
const PDE_HUGE: u64 = 1 << 7;
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// How much is mapped one to one.
const MAPPED_GIB: u64 = 5;

/// Selectors that the 64-bit boot protocol asks for.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// LAPIC register offsets (Intel SDM volume 3, 11.4.1) and delivery modes (11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;

/// Why registers were not set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error("KVM refused to {what} of the boot processor")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Page tables or GDT could not be written.
    #[error("cannot write the boot processor's tables to guest memory")]
    Tables(#[source] GuestMemoryError),
}

/// Makes the boot processor ready for `entry`.
pub fn setup(vcpu: &VcpuFd, ram: &GuestRam, entry: &Entry) -> Result<(), Error> {
    let kvm = |what| move |source| Error::Kvm { what, source };
    let mut sregs = vcpu.get_sregs().map_err(kvm("get system registers"))?;
    let regs = match *entry {
        Entry::Pvh { rip, start_info } => {
            protected_mode_sregs(&mut sregs);
            kvm_regs {
                rip: rip.0,
                rbx: start_info.0,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
        Entry::Multiboot { rip, info } => {
            protected_mode_sregs(&mut sregs);
            kvm_regs {
                rip: rip.0,
                rax: multiboot::BOOTLOADER_MAGIC.into(),
                rbx: info.0,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
        Entry::Linux64 { rip, zero_page } => {
            linux64_sregs(&mut sregs);
            write_page_tables(ram).map_err(Error::Tables)?;
            kvm_regs {
                rip: rip.0,
                rsi: zero_page.0,
                rsp: BOOT_STACK,
                rbp: BOOT_STACK,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
    };
    write_gdt(ram, &sregs).map_err(Error::Tables)?;
    vcpu.set_sregs(&sregs)
        .map_err(kvm("set system registers"))?;
    vcpu.set_regs(&regs).map_err(kvm("set registers"))?;
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .map_err(kvm("set the FPU state"))?;
    let mut lapic = vcpu.get_lapic().map_err(kvm("get the LAPIC"))?;
    wire_lints(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(kvm("set the LAPIC"))
}

/// A flat segment of 4 GiB with the descriptor's type.
fn flat_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Loads segments: `code` and flat data in all others, with an empty busy TSS.
fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment) {
    const DATA_WRITE_ACCESSED: u8 = 0x3;
    const TSS_BUSY: u8 = 0xb;
    let data = flat_segment(DATA_SELECTOR, DATA_WRITE_ACCESSED);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        db: 0,
        s: 0,
        g: 0,
        ..flat_segment(TSS_SELECTOR, TSS_BUSY)
    };
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

const CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;

/// 32-bit protected mode, no paging: PVH's and multiboot's.
fn protected_mode_sregs(sregs: &mut kvm_sregs) {
    set_segments(
        sregs,
        flat_segment(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED),
    );
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// 64-bit mode on the page tables of [`write_page_tables`].
fn linux64_sregs(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        db: 0,
        l: 1,
        ..flat_segment(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED)
    };
    set_segments(sregs, code);
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = BOOT_PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

const GDT_ENTRIES: usize = 6;

/// Writes the GDT that the segment registers were loaded from: null, unused, code, data, and the TSS,
/// which takes two entries in 64-bit mode.
fn write_gdt(ram: &GuestRam, sregs: &kvm_sregs) -> Result<(), GuestMemoryError> {
    let table: [u64; GDT_ENTRIES] = [
        0,
        0,
        descriptor(&sregs.cs),
        descriptor(&sregs.ds),
        descriptor(&sregs.tr),
        0,
    ];
    ram.memory().write_obj(table, GuestAddress(BOOT_GDT))
}

/// A segment as the GDT has it (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access =
        u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Maps the first [`MAPPED_GIB`] one to one with 2 MiB pages, which every 64-bit processor has.
fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let memory = ram.memory();
    let pointers = BOOT_PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    memory.write_slice(&[0; 2 * PAGE as usize], GuestAddress(BOOT_PAGE_TABLES))?;
    memory.write_obj(pointers | PTE_PRESENT_WRITE, GuestAddress(BOOT_PAGE_TABLES))?;
    for gib in 0..MAPPED_GIB {
        let directory = directories + gib * PAGE;
        memory.write_obj(
            directory | PTE_PRESENT_WRITE,
            GuestAddress(pointers + gib * 8),
        )?;
        let entries: Vec<u8> = (0..512)
            .map(|i| gib * GIB + (i << 21))
            .flat_map(|page| (page | PTE_PRESENT_WRITE | PDE_HUGE).to_le_bytes())
            .collect();
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// LINT0 takes the PIC's interrupts, LINT1 is NMI: the virtual wire that firmware leaves behind.
fn wire_lints(lapic: &mut kvm_lapic_state) {
    for (at, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (reg, byte) in lapic.regs[at..at + 4].iter_mut().zip(mode.to_le_bytes()) {
            *reg = byte.cast_signed();
        }
    }
}

/// A vCPU's registers in words, several lines, for the message about a guest that failed. Says so where
/// KVM does not give them.
pub fn dump(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => {
            let mut text = String::new();
            write_dump(&mut text, &regs, &sregs).expect("writing to a string cannot fail");
            if let Ok(events) = vcpu.get_vcpu_events()
                && (events.exception.injected | events.exception.pending) != 0
            {
                let (nr, code) = (events.exception.nr, events.exception.error_code);
                write!(text, "\nexception {nr}, error code {code:#x}")
                    .expect("writing to a string cannot fail");
            }
            text
        }
        (Err(error), _) | (_, Err(error)) => format!("registers are not available: {error}"),
    }
}

fn write_dump(text: &mut String, regs: &kvm_regs, sregs: &kvm_sregs) -> std::fmt::Result {
    let general = [
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rbp", regs.rbp),
        ("rsp", regs.rsp),
        ("r8 ", regs.r8),
        ("r9 ", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("rip", regs.rip),
        ("rfl", regs.rflags),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efr", sregs.efer),
        ("apb", sregs.apic_base),
    ];
    for row in general.chunks(4) {
        for (i, (name, value)) in row.iter().enumerate() {
            let gap = if i == 0 { "" } else { "  " };
            write!(text, "{gap}{name}={value:016x}")?;
        }
        text.push('\n');
    }
    let segments = [
        ("cs", &sregs.cs),
        ("ss", &sregs.ss),
        ("ds", &sregs.ds),
        ("es", &sregs.es),
        ("fs", &sregs.fs),
        ("gs", &sregs.gs),
        ("tr", &sregs.tr),
    ];
    for (name, s) in segments {
        let (selector, base, limit) = (s.selector, s.base, s.limit);
        let mode = match (s.l, s.db) {
            (1, _) => 64,
            (_, 1) => 32,
            _ => 16,
        };
        writeln!(
            text,
            "{name} ={selector:04x} base={base:016x} limit={limit:08x} type={:x} dpl={} {mode}-bit",
            s.type_, s.dpl
        )?;
    }
    let (gdt, idt) = (&sregs.gdt, &sregs.idt);
    write!(
        text,
        "gdt base={:016x} limit={:04x}  idt base={:016x} limit={:04x}",
        gdt.base, gdt.limit, idt.base, idt.limit
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;

    fn ram() -> GuestRam {
        GuestRam::new(&MemoryConfig::of(2 << 20)).unwrap()
    }

    #[test]
    fn page_tables_map_5_gib_one_to_one() {
        let ram = ram();
        write_page_tables(&ram).unwrap();
        let entry = |table: u64, index: u64| {
            let at = GuestAddress(table + index * 8);
            ram.memory().read_obj::<u64>(at).unwrap()
        };
        for gpa in [
            0,
            0x20_0000,
            0x7fff_ffff,
            0xfee0_0000u64,
            0xffff_ffff,
            0x1_0100_0000,
        ] {
            let pdpt = entry(BOOT_PAGE_TABLES, gpa >> 39) & !0xfff;
            let pd = entry(pdpt, gpa >> 30) & !0xfff;
            let page = entry(pd, gpa >> 21 & 511);
            assert_eq!(page, (gpa & !0x1f_ffff) | 0x83, "{gpa:#x}");
        }
        assert_eq!(entry(BOOT_PAGE_TABLES, 1), 0);
        assert_eq!(entry(BOOT_PAGE_TABLES + PAGE, MAPPED_GIB), 0);
    }

    #[test]
    fn the_gdt_says_what_the_segment_registers_say() {
        let ram = ram();
        let mut sregs = kvm_sregs::default();
        linux64_sregs(&mut sregs);
        write_gdt(&ram, &sregs).unwrap();
        let table: [u64; GDT_ENTRIES] = ram.memory().read_obj(GuestAddress(BOOT_GDT)).unwrap();
        assert_eq!(table[2], 0x00af_9b00_0000_ffff);
        assert_eq!(table[3], 0x00cf_9300_0000_ffff);
        assert_eq!(table[4], 0x0000_8b00_0000_0067);
        protected_mode_sregs(&mut sregs);
        assert_eq!(descriptor(&sregs.cs), 0x00cf_9b00_0000_ffff);
        assert_eq!((sregs.cr0, sregs.efer), (0x11, 0));
    }

    #[test]
    fn the_local_interrupt_pins_are_wired() {
        let mut lapic = kvm_lapic_state { regs: [0; 1024] };
        wire_lints(&mut lapic);
        assert_eq!(lapic.regs[0x351], 7);
        assert_eq!(lapic.regs[0x361], 4);
    }

    #[test]
    fn a_dump_names_every_register_once() {
        let mut text = String::new();
        let regs = kvm_regs {
            rip: 0xdead,
            ..Default::default()
        };
        write_dump(&mut text, &regs, &kvm_sregs::default()).unwrap();
        assert!(text.contains("rip=000000000000dead"), "{text}");
        assert_eq!(text.lines().count(), 14, "{text}");
    }
}
