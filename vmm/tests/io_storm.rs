//! A guest that writes and reads anything anywhere in its I/O space, natively: it stops and grows nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot look at its process has failed"
)]

mod support;

use std::time::{Duration, Instant};

use support::{Code, Guest, eventually, has_kvm};

/// Each round of a storm lasts so long; a reset that the guest stumbles into makes it begin anew.
const ROUND: Duration = Duration::from_secs(2);

/// 32-bit code: xorshift32 in ebx; ebp is a counter. `seed` makes another storm.
fn storm(seed: u32, ports: bool) -> Code {
    let mut code = vec![0xbb];
    code.extend(seed.to_le_bytes()); // mov ebx, seed
    let start = code.len();
    // ebx ^= ebx << 13; ebx ^= ebx >> 17; ebx ^= ebx << 5
    for (shift, count) in [(0xe0, 13), (0xe8, 17), (0xe0, 5)] {
        code.extend([0x89, 0xd8, 0xc1, shift, count, 0x31, 0xc3]); // mov eax, ebx; shift; xor ebx, eax
    }
    if ports {
        code.extend([0x89, 0xda, 0xc1, 0xea, 0x10]); // mov edx, ebx; shr edx, 16
        code.extend([0x89, 0xd8]); // mov eax, ebx
        // All but the power management block, which would end the guest in order.
        code.extend([0x89, 0xd1, 0x81, 0xe1, 0xf0, 0xff, 0x00, 0x00]); // mov ecx, edx; and ecx, 0xfff0
        code.extend([0x81, 0xf9, 0x00, 0x06, 0x00, 0x00]); // cmp ecx, 0x600
        let end = code.len() + 2;
        code.extend([0x74, (start as i32 - end as i32) as u8]); // je start
        code.extend([0xef, 0xee, 0x66, 0xef, 0xec, 0xed]); // out edx, eax; al; ax; in al; in eax
    } else {
        // Somewhere from 3 GiB on: windows, ECAM, IOAPIC, local APIC.
        code.extend([0x89, 0xdf, 0x81, 0xcf, 0x00, 0x00, 0x00, 0xc0]); // mov edi, ebx; or edi, 0xc0000000
        code.extend([0x89, 0xd8, 0xc1, 0xc0, 0x07]); // mov eax, ebx; rol eax, 7
        code.extend([0x89, 0x07, 0x88, 0x07, 0x8b, 0x0f]); // mov [edi], eax; mov [edi], al; mov ecx, [edi]
        // And in the first functions' configuration space.
        code.extend([0x81, 0xe7, 0xfc, 0xff, 0x01, 0x00]); // and edi, 0x1fffc
        code.extend([0x81, 0xc7]); // add edi, ECAM
        code.extend((berth_vmm::memory::layout::ECAM_START as u32).to_le_bytes());
        code.extend([0x89, 0x07, 0x8b, 0x0f]); // mov [edi], eax; mov ecx, [edi]
    }
    code.push(0xe9); // jmp start
    let back = start as i32 - (code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    Code::new().raw(&code)
}

fn weather(ports: bool, args: &[&str]) {
    for seed in [1, 0x9e37_79b9, 0xdead_beef] {
        let guest = Guest::start_with(&storm(seed, ports), args);
        let name = if ports {
            "exits_io_out"
        } else {
            "exits_mmio_write"
        };
        eventually("the storm", || {
            let exits = guest.counter("vcpu0", name)?;
            (exits > 0 || guest.counter("vmm", "boots")? > 1).then_some(())
        });
        let begin = Instant::now();
        let tasks =
            || std::fs::read_dir(format!("/proc/{}/task", guest.pid())).map(Iterator::count);
        // A guest that resets itself is between two machines now and then; the API answers all the time.
        while begin.elapsed() < ROUND {
            let state = guest.state();
            assert!(["Running", "Created"].contains(&state.as_str()), "{state}");
            assert!(tasks().unwrap() < 20, "threads pile up");
        }
        assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
        let (status, stderr) = guest.wait();
        assert_eq!(status, 0, "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        assert!(
            stderr.lines().count() < 100,
            "the log is flooded:\n{stderr}"
        );
    }
}

#[test]
fn ports_stand_a_storm() {
    if has_kvm() {
        weather(true, &[]);
    }
}

#[test]
fn memory_mapped_devices_stand_a_storm() {
    if has_kvm() {
        weather(false, &[]);
    }
}

#[test]
fn so_do_they_with_the_ioapic_in_this_process() {
    if has_kvm() {
        weather(false, &["--platform", "irqchip=split"]);
    }
}
