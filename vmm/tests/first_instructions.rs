//! A kernel of a few instructions, entered by each entry on the machine's own KVM: the first registers
//! lead to what the kernel is told, and a guest that fails is described. Skipped where KVM does not open.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::PathBuf;
use std::sync::Arc;

use berth_vmm::boot::{self, acpi};
use berth_vmm::config::{CpusConfig, KernelEntry, MemoryConfig, PayloadConfig};
use berth_vmm::cpu::{cpuid, msr, regs};
use berth_vmm::memory::{GuestRam, layout};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

const TEXT: u64 = 0x10_0000;
const ENTRY64_OFFSET: usize = 0x40;

/// 32-bit: mov eax, ebx; mov dx, 0x3f8; out dx, eax; ud2.
const PVH_CODE: [u8; 9] = [0x89, 0xd8, 0x66, 0xba, 0xf8, 0x03, 0xef, 0x0f, 0x0b];
/// 64-bit: mov rax, rsi; mov dx, 0x3f8; out dx, eax; mov eax, [rsi + 0x202]; out dx, eax; ud2.
const LINUX64_CODE: [u8; 17] = [
    0x48, 0x89, 0xf0, 0x66, 0xba, 0xf8, 0x03, 0xef, 0x8b, 0x86, 0x02, 0x02, 0, 0, 0xef, 0x0f, 0x0b,
];

/// An ELF kernel with both entries.
fn kernel() -> Vec<u8> {
    let mut text = PVH_CODE.to_vec();
    text.resize(ENTRY64_OFFSET, 0xcc);
    text.extend(LINUX64_CODE);
    let mut note = Vec::new();
    for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), TEXT as u32] {
        note.extend(word.to_le_bytes());
    }
    let text_offset = 64 + 2 * 56;
    let note_offset = text_offset + text.len() as u64;

    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend((TEXT + ENTRY64_OFFSET as u64).to_le_bytes());
    image.extend(64u64.to_le_bytes());
    image.extend([0; 12]);
    image.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, len) in [
        (1u32, text_offset, text.len() as u64),
        (4, note_offset, note.len() as u64),
    ] {
        image.extend(kind.to_le_bytes());
        image.extend(5u32.to_le_bytes());
        for field in [offset, TEXT, TEXT, len, len, 0x1000] {
            image.extend(field.to_le_bytes());
        }
    }
    image.extend(text);
    image.extend(note);
    image
}

struct Guest {
    vcpu: VcpuFd,
    ram: GuestRam,
    rsdp: GuestAddress,
    kernel: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.kernel);
    }
}

impl Guest {
    /// Boots the small kernel; `None` where there is no KVM.
    fn boot(name: &str, entry: KernelEntry) -> Option<Self> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        if vm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(layout::KVM_TSS as usize).unwrap();
        }
        vm.create_irq_chip().unwrap();
        let ram = GuestRam::new(&MemoryConfig::of(4 << 20)).unwrap();
        std::mem::forget(ram.register(&vm).unwrap());
        let kernel_path =
            std::env::temp_dir().join(format!("berth-first-{}-{name}", std::process::id()));
        std::fs::write(&kernel_path, kernel()).unwrap();

        let input = acpi::AcpiInput {
            vcpus: 1,
            serial: true,
            pic: true,
        };
        let rsdp = acpi::build(&ram, &input).unwrap();
        let payload = PayloadConfig {
            kernel: kernel_path.clone(),
            entry,
            initramfs: None,
            cmdline: "quiet".to_owned(),
        };
        let entry = boot::load(&ram, &payload, rsdp).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = cpuid::for_vcpu(&kvm, &CpusConfig::of(1), 0).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        msr::boot(&vcpu).unwrap();
        regs::setup(&vcpu, &ram, &entry).unwrap();
        Some(Self {
            vcpu,
            ram,
            rsdp,
            kernel: kernel_path,
        })
    }

    /// The next 32 bits that the guest writes to COM1's port.
    fn next_word(&mut self) -> u32 {
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x3f8, data) => u32::from_le_bytes(data.try_into().unwrap()),
            other => panic!("{other:?}"),
        }
    }

    fn read<T: vm_memory::ByteValued>(&self, gpa: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }
}

#[test]
fn a_pvh_kernel_finds_its_start_info() {
    let Some(mut guest) = Guest::boot("pvh", KernelEntry::Auto) else {
        return;
    };
    let start_info = u64::from(guest.next_word());
    assert_eq!(guest.read::<u32>(start_info), 0x336e_c578);
    assert_eq!(guest.read::<u64>(start_info + 32), guest.rsdp.0);
    let cmdline = guest.read::<u64>(start_info + 24);
    assert_eq!(guest.read::<[u8; 6]>(cmdline), *b"quiet\0");
}

#[test]
fn a_64_bit_kernel_finds_its_zero_page_through_the_page_tables() {
    let Some(mut guest) = Guest::boot("linux64", KernelEntry::Linux64) else {
        return;
    };
    let zero_page = u64::from(guest.next_word());
    assert_eq!(guest.read::<u64>(zero_page + 0x70), guest.rsdp.0);
    assert_eq!(guest.next_word(), u32::from_le_bytes(*b"HdrS"));
}

#[test]
fn a_guest_that_fails_is_described_by_its_registers() {
    let Some(mut guest) = Guest::boot("fails", KernelEntry::Linux64) else {
        return;
    };
    guest.next_word();
    guest.next_word();
    let exit = format!("{:?}", guest.vcpu.run().unwrap());
    let dump = regs::dump(&guest.vcpu);
    assert_eq!(exit, "Shutdown", "{dump}");
    let rsi = format!("rsi={:016x}", layout::ZERO_PAGE);
    assert!(dump.contains(&rsi) && dump.contains("64-bit"), "{dump}");
}
