//! Test programs: multiboot images on the host's own KVM, with the test device.

mod programs;
mod support;

use support::{Code, Guest, has_kvm};
use vmm_sys_util::tempfile::TempFile;

const DEVICE: [&str; 2] = ["--platform", "test-device=on"];

/// Prints the NUL-terminated text that the word at `[ebx + offset]` points to, `back` levels deep.
fn print_text_of_information(code: Code, offset: u8, levels: u8) -> Code {
    let mut code = code.raw(&[0x8b, 0x73, offset]); // mov esi, [ebx + offset]
    for _ in 1..levels {
        code = code.raw(&[0x8b, 0x36]); // mov esi, [esi]
    }
    code.raw(&[0x66, 0xba, 0xf8, 0x03]) // mov dx, 0x3f8
        .raw(&[0xac, 0x84, 0xc0]) // next: lodsb; test al, al
        .raw(&[0x74, 0x03]) // jz done
        .raw(&[0xee, 0xeb, 0xf8]) // out dx, al; jmp next
}

/// Ends the process by the test device.
fn end(code: Code, value: u8) -> Code {
    code.out8(0xf4, value).halt()
}

#[test]
fn a_multiboot_image_finds_its_command_line_and_its_module() {
    if !has_kvm() {
        return;
    }
    let module = TempFile::new().unwrap();
    std::fs::write(module.as_path(), b"NR_CPUS=1\n\0").unwrap();
    let path = module.as_path().display().to_string();
    let code = Code::new()
        // cmp eax, 0x2badb002; jz on; hlt and jmp to it
        .raw(&[0x3d, 0x02, 0xb0, 0xad, 0x2b, 0x74, 0x03, 0xf4, 0xeb, 0xfd]);
    let code = print_text_of_information(code, 16, 1);
    let code = print_text_of_information(code.out8(0x3f8, b'\n'), 24, 2);
    let image = end(code, 0).multiboot(0x40_0000);
    let args = ["--initramfs", &path, "--cmdline", "a b=c"];
    let mut guest = Guest::start_image(&image, &[&args[..], &DEVICE].concat());
    let (code, stderr) = guest.ended();
    assert_eq!(guest.lines(), ["kernel a b=c", "NR_CPUS=1"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("by the test device"), "{stderr}");
}

#[test]
fn an_image_below_1_mib_is_left_whole() {
    if !has_kvm() {
        return;
    }
    // Where the 64-bit entry has its page tables.
    let code = Code::new().raw(&[0x90; 0x3000]);
    let image = end(code, 9).multiboot(0x8000);
    let (code, stderr) = Guest::start_image(&image, &DEVICE).wait();
    assert_eq!(code, 19, "{stderr}");
}

#[test]
fn an_interrupt_line_that_the_guest_drives_itself_interrupts_it() {
    if !has_kvm() {
        return;
    }
    // Image at 4 MiB. A gate for vector 0x0d, which is ISA interrupt 5 where firmware has set up the PICs;
    // the handler ends with 7.
    let code = Code::new()
        .raw(&[0xbc, 0x00, 0x00, 0x20, 0x00]) // mov esp, 0x200000
        .raw(&[0xc7, 0x05, 0x68, 0x00, 0x30, 0x00, 0x53, 0x00, 0x10, 0x00]) // mov [0x300068], 0x100053
        .raw(&[0xc7, 0x05, 0x6c, 0x00, 0x30, 0x00, 0x00, 0x8e, 0x40, 0x00]) // mov [0x30006c], 0x408e00
        .raw(&[0x68, 0x00, 0x00, 0x30, 0x00]) // push 0x300000
        .raw(&[0x68, 0x00, 0x00, 0xff, 0x07]) // push 0x07ff0000
        .raw(&[0x0f, 0x01, 0x5c, 0x24, 0x02, 0xfb]) // lidt [esp + 2]; sti
        .raw(&[0x66, 0xba, 0x05, 0x20, 0xb0, 0x01, 0xee]) // mov dx, 0x2005; mov al, 1; out dx, al
        .raw(&[0xf4, 0xeb, 0xfd]); // hlt, and again
    let image = end(code, 7).multiboot(0x40_0000);
    let (code, stderr) = Guest::start_image(&image, &DEVICE).wait();
    assert_eq!(code, 15, "{stderr}");
}

#[test]
fn without_the_device_its_ports_do_nothing() {
    if !has_kvm() {
        return;
    }
    let image = Code::new()
        .out8(0xf4, 0)
        .out8(0x2005, 1)
        .print("still here\n")
        .power_off()
        .multiboot(0x40_0000);
    let mut guest = Guest::start_image(&image, &[]);
    let (code, stderr) = guest.ended();
    assert_eq!(
        (code, guest.lines()),
        (0, vec!["still here".to_owned()]),
        "{stderr}"
    );
}

/// Ends with whether that bit of leaf 1's ecx is set: exit code 3 or 1.
fn shows_bit_of_leaf_1(bit: u8) -> Vec<u8> {
    Code::new()
        .raw(&[0xb8, 1, 0, 0, 0, 0x0f, 0xa2]) // mov eax, 1; cpuid
        .raw(&[0x0f, 0xba, 0xe1, bit]) // bt ecx, bit
        .raw(&[0x0f, 0x92, 0xc0]) // setc al
        .raw(&[0x66, 0xba, 0xf4, 0x00, 0xee]) // mov dx, 0xf4; out dx, al
        .halt()
        .multiboot(0x40_0000)
}

#[test]
fn a_guest_has_the_features_that_were_asked_for() {
    if !has_kvm() {
        return;
    }
    const X2APIC: u8 = 21;
    // Both are KVM's own doing: some KVMs show the processor's features whatever CPUID says.
    const TSC_DEADLINE: u8 = 24;
    let code = |bit, features: &str| {
        let cpus = format!("boot=1{features}");
        let args = [&DEVICE[..], &["--cpus", &cpus]].concat();
        Guest::start_image(&shows_bit_of_leaf_1(bit), &args).wait()
    };
    assert_eq!(code(X2APIC, "").0, 3);
    assert_eq!(code(X2APIC, ",features=-x2apic").0, 1);
    assert_eq!(code(X2APIC, ",features=+x2apic,-tsc-deadline").0, 3);
    assert_eq!(code(TSC_DEADLINE, ",features=+x2apic,-tsc-deadline").0, 1);
    // No processor has both makers' virtualisation.
    let (code, stderr) = code(X2APIC, ",features=+svm,+vmx");
    assert_eq!(code, 1);
    assert!(
        stderr.contains("does not support the CPU feature"),
        "{stderr}"
    );
}

/// Runs a program with either irqchip.
fn finds_no_fault(program: &[u8], load: u32) {
    if !has_kvm() {
        return;
    }
    let image = Code::new().raw(program).multiboot(load);
    for irqchip in ["kernel", "split"] {
        let platform = format!("test-device=on,irqchip={irqchip}");
        let (code, stderr) = Guest::start_image(&image, &["--platform", &platform]).wait();
        let step = code >> 1;
        assert_eq!(
            step,
            programs::GOOD,
            "irqchip={irqchip}, step {step}: {stderr}"
        );
    }
}

#[test]
fn msrs_keep_what_the_guest_writes() {
    finds_no_fault(programs::MSRS, 0x40_0000);
}

#[test]
fn the_local_apic_changes_its_mode_and_keeps_its_registers() {
    finds_no_fault(programs::APIC_MODES, 0x40_0000);
}

#[test]
fn exceptions_an_nmi_and_nested_interrupts_reach_their_handlers() {
    finds_no_fault(programs::EVENTS, 0x40_0000);
}

#[test]
fn kvms_clock_never_goes_back() {
    finds_no_fault(programs::CLOCK, 0x40_0000);
}

#[test]
fn a_guest_goes_to_real_mode_and_comes_back() {
    finds_no_fault(programs::REAL_MODE, 0x8000);
}
