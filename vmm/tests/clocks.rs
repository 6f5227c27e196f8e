//! What KVM does about a guest's time: it is told of a pause, and a halted vCPU is polled for as long as asked.

mod support;

use support::{Code, Guest, eventually, has_kvm};

/// Has KVM keep a clock at 3 MiB, and waits until it says that the guest was stopped: PVCLOCK_GUEST_STOPPED, bit 1 of
/// the byte at offset 29 (Linux, pvclock-abi.h; KVM api.rst, KVM_KVMCLOCK_CTRL).
fn waits_to_be_told() -> Code {
    Code::new()
        .raw(&[0xb9, 0x01, 0x4d, 0x56, 0x4b]) // mov ecx, 0x4b564d01
        .raw(&[0xb8, 0x01, 0x00, 0x30, 0x00]) // mov eax, 0x300001
        .raw(&[0x31, 0xd2, 0x0f, 0x30]) // xor edx, edx; wrmsr
        .print("kept\n")
        .raw(&[0xf6, 0x05, 0x1d, 0x00, 0x30, 0x00, 0x02]) // test byte ptr [0x30001d], 2
        .raw(&[0x74, 0xf7]) // jz to it
        .print("stopped\n")
        .echo()
}

#[test]
fn a_guest_is_told_that_it_was_paused() {
    if !has_kvm() {
        return;
    }
    for irqchip in ["kernel", "split"] {
        let platform = format!("irqchip={irqchip}");
        let guest = Guest::start_with(&waits_to_be_told(), &["--platform", &platform]);
        eventually("the clock", || (guest.lines() == ["kept"]).then_some(()));
        assert_eq!(guest.api("PUT", "vm.pause").0, 204);
        assert_eq!(guest.lines(), ["kept"], "told before it was paused");
        assert_eq!(guest.api("PUT", "vm.resume").0, 204);
        eventually("the news", || {
            (guest.lines() == ["kept", "stopped"]).then_some(())
        });
        assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
        assert_eq!(guest.wait().0, 0);
    }
}

/// Halts, and is woken by the local APIC's timer every 100 us.
///
/// ```text
/// .code32
/// start: mov esp, 0x200000; mov edi, 0x40; mov eax, handler; call gate; push 0x00300000; push 0x07ff0000;
///     lidt [esp+2]; mov dword ptr [0xfee000f0], 0x1ff; mov dword ptr [0xfee003e0], 0xb;
///     mov dword ptr [0xfee00320], 0x20040; mov dword ptr [0xfee00380], 100000
/// idle: sti; hlt; jmp idle
/// gate: movzx ecx, ax; or ecx, 0x00100000; mov [0x300000 + edi*8], ecx; mov ax, 0x8e00;
///     mov [0x300004 + edi*8], eax; ret
/// handler: mov esp, 0x200000; mov dword ptr [0xfee000b0], 0; jmp idle
/// ```
#[rustfmt::skip]
const TICKS: &[u8] = &[
    0xbc, 0x00, 0x00, 0x20, 0x00, 0xbf, 0x40, 0x00, 0x00, 0x00, 0xb8, 0x8b, 0x00, 0x40, 0x00, 0xe8, 0x3b, 0x00,
    0x00, 0x00, 0x68, 0x00, 0x00, 0x30, 0x00, 0x68, 0x00, 0x00, 0xff, 0x07, 0x0f, 0x01, 0x5c, 0x24, 0x02, 0xc7,
    0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, 0xc7, 0x05, 0xe0, 0x03, 0xe0, 0xfe, 0x0b, 0x00, 0x00,
    0x00, 0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x40, 0x00, 0x02, 0x00, 0xc7, 0x05, 0x80, 0x03, 0xe0, 0xfe, 0xa0,
    0x86, 0x01, 0x00, 0xfb, 0xf4, 0xeb, 0xfc, 0x0f, 0xb7, 0xc8, 0x81, 0xc9, 0x00, 0x00, 0x10, 0x00, 0x89, 0x0c,
    0xfd, 0x00, 0x00, 0x30, 0x00, 0x66, 0xb8, 0x00, 0x8e, 0x89, 0x04, 0xfd, 0x04, 0x00, 0x30, 0x00, 0xc3, 0xbc,
    0x00, 0x00, 0x20, 0x00, 0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x00, 0xeb, 0xcf,
];

#[test]
fn a_halted_vcpu_is_polled_as_long_as_asked_and_not_at_all_with_0() {
    if !has_kvm() {
        return;
    }
    let image = Code::new().raw(TICKS).multiboot(0x40_0000);
    let start = |ns: u32| {
        let platform = format!("halt_poll_ns={ns}");
        let guest = Guest::start_image(&image, &["--platform", &platform]);
        let counter = move |name| guest.counter("vcpu0", name);
        eventually("halts", || {
            counter("kvm_halt_exits").filter(|halts| *halts > 200)
        });
        counter
    };
    let never = start(0);
    assert_eq!(never("kvm_halt_attempted_poll"), Some(0));
    drop(never);
    // KVM begins to poll after a halt that was shorter, on a busy machine too.
    let often = start(500_000_000);
    eventually("polls", || {
        often("kvm_halt_attempted_poll").filter(|polls| *polls > 0)
    });
}
