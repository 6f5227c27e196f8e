//! Whole machines on the host's own KVM, with guests of a few instructions.

mod support;

use std::io::Read;
use std::os::unix::net::UnixStream;

use support::{Code, Guest, eventually, has_kvm, is_absent};

fn dots() -> Code {
    Code::new().out8(0x3f8, b'.').again()
}

#[test]
fn a_guest_prints_and_powers_itself_off() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&Code::new().print("hello from the guest\n").power_off());
    let (api, serial) = (guest.path("api"), guest.path("serial"));
    let text = eventually("the guest's text", || {
        std::fs::read_to_string(&serial)
            .ok()
            .filter(|text| text.ends_with('\n'))
    });
    assert_eq!(text, "hello from the guest\n");
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("powered off"), "{stderr}");
    assert!(is_absent(&api));
}

#[test]
fn a_guest_of_the_split_irqchip_programmes_an_ioapic_that_is_ours() {
    if !has_kvm() {
        return;
    }
    // Pin 4, the serial port's: edge, vector 0x34, to APIC 0.
    let code = Code::new()
        .store32(0xfec0_0000, 0x18)
        .store32(0xfec0_0010, 0x34)
        .print("programmed\n")
        .echo();
    let args = ["--platform", "irqchip=split,halt_poll_ns=0"];
    let guest = Guest::start_with(&code, &args);
    eventually("the guest's text", || {
        (guest.lines() == ["programmed"]).then_some(())
    });
    let updates = guest.counter("irqchip", "routing_updates");
    assert_eq!(updates, Some(2), "the empty table, then the pin");
    assert_eq!(guest.counter("vcpu0", "exits_mmio_write"), Some(2));
    let (_, info) = guest.api("GET", "vm.info");
    assert!(info.contains(r#""irqchip":"split""#), "{info}");
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
}

/// vCPU 299 is there, with its thread, and is paused and resumed with the others.
#[test]
fn a_guest_of_300_vcpus_runs_with_the_split_irqchip() {
    if !has_kvm() {
        return;
    }
    let args = ["--platform", "irqchip=split", "--cpus", "boot=300"];
    let guest = Guest::start_with(&Code::new().print("boot\n").echo(), &args);
    eventually("the guest's text", || {
        (guest.lines() == ["boot"]).then_some(())
    });
    let last = |name| guest.counter(name, "exits_mmio_write");
    assert!(last("vcpu299").is_some(), "it has counters");
    assert!(last("vcpu300").is_none());
    assert_eq!(guest.api("PUT", "vm.pause").0, 204);
    assert_eq!(guest.api("PUT", "vm.resume").0, 204);
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn a_triple_fault_ends_with_the_exit_and_the_registers() {
    if !has_kvm() {
        return;
    }
    let (code, stderr) = Guest::start(&Code::new().print("last words\n").triple_fault()).wait();
    assert_eq!(code, 1, "{stderr}");
    for part in ["KVM_EXIT_SHUTDOWN (triple fault)", "vcpu0", "rip=", "cr0="] {
        assert!(stderr.contains(part), "no {part}: {stderr}");
    }
}

#[test]
fn a_reset_boots_the_guest_again_and_again() {
    if !has_kvm() {
        return;
    }
    for (port, value) in [(0xcf9, 0x06), (0x64, 0xfe)] {
        let guest = Guest::start(&Code::new().print("boot\n").out8(port, value).halt());
        eventually("four boots", || (guest.lines().len() >= 4).then_some(()));
        assert!(guest.lines().iter().all(|line| line == "boot"));
        assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
        let (code, stderr) = guest.wait();
        assert_eq!(code, 0, "{stderr}");
    }
}

#[test]
fn neither_memory_nor_threads_nor_files_grow_with_reboots() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&Code::new().print("boot\n").out8(0xcf9, 6).halt());
    let maps = format!("/proc/{}/maps", guest.pid());
    eventually("twenty boots", || (guest.lines().len() >= 20).then_some(()));
    let mapped = std::fs::read_to_string(maps).unwrap();
    let rams = mapped.matches("berth-guest-ram").count();
    // One machine may be on its way out while the next is made, or gone before it is.
    assert!(rams <= 2, "{rams} guest memories:\n{mapped}");
    let count = |what: &str| {
        let path = format!("/proc/{}/{what}", guest.pid());
        std::fs::read_dir(path).unwrap().count()
    };
    let (threads, files) = (count("task"), count("fd"));
    assert!(threads < 12, "{threads} threads");
    assert!(files < 80, "{files} open files");
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&dots());
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    eventually("dots", || guest.serial().starts_with('.').then_some(()));
    assert_eq!(guest.api("PUT", "vm.pause").0, 204);
    assert_eq!(guest.state(), "Paused");
    let before = guest.counter("vcpu0", "exits_io_out").unwrap();
    assert!(before > 0);
    assert_eq!(guest.api("PUT", "vm.pause").0, 500);
    assert_eq!(guest.counter("vcpu0", "exits_io_out").unwrap(), before);
    assert_eq!(guest.api("PUT", "vm.resume").0, 204);
    eventually("more dots", || {
        (guest.counter("vcpu0", "exits_io_out").unwrap() > before).then_some(())
    });
    assert_eq!(guest.state(), "Running");
}

#[test]
fn pauses_and_resumes_in_a_row_lose_nobody() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start_with(&dots(), &["--cpus", "boot=4"]);
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    for round in 0..200 {
        assert_eq!(guest.api("PUT", "vm.pause").0, 204, "{round}");
        assert_eq!(guest.api("PUT", "vm.resume").0, 204, "{round}");
    }
    let (_, threads) = guest.api("GET", "vm.counters");
    assert!(threads.contains("vcpu3"), "{threads}");
}

#[test]
fn a_guest_that_was_shut_down_can_be_booted_again() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&Code::new().print("boot\n").halt());
    eventually("a boot", || (guest.lines().len() == 1).then_some(()));
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    assert_eq!(guest.state(), "Shutdown");
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 500);
    assert_eq!(guest.api("PUT", "vm.boot").0, 204);
    eventually("the second boot", || {
        (guest.lines().len() == 2).then_some(())
    });
    assert_eq!(guest.api("PUT", "vm.reboot").0, 204);
    eventually("the third boot", || {
        (guest.lines().len() == 3).then_some(())
    });
}

#[test]
fn a_boot_that_a_client_asked_for_may_fail_and_be_tried_again() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&Code::new().print("boot\n").halt());
    let (kernel, aside) = (guest.path("kernel"), guest.path("aside"));
    eventually("a boot", || (guest.lines().len() == 1).then_some(()));
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    std::fs::rename(&kernel, &aside).unwrap();
    let (status, reason) = guest.api("PUT", "vm.boot");
    assert_eq!(status, 500);
    assert!(
        reason.contains("kernel") && reason.contains("No such file"),
        "{reason}"
    );
    assert_eq!(guest.state(), "Shutdown");
    std::fs::rename(&aside, &kernel).unwrap();
    assert_eq!(guest.api("PUT", "vm.boot").0, 204);
    eventually("the second boot", || {
        (guest.lines().len() == 2).then_some(())
    });
}

#[test]
fn the_kernel_counts_the_same_exits() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&dots());
    eventually("some exits", || {
        guest
            .counter("vcpu0", "exits_io_out")
            .filter(|count| *count > 1000)
    });
    assert_eq!(guest.api("PUT", "vm.pause").0, 204);
    let own = guest.counter("vcpu0", "exits_io_out").unwrap();
    // A kernel without KVM_GET_STATS_FD tells nothing, and one that emulates all of the guest, so that
    // it has no exits, counts none.
    let kernel = guest.counter("vcpu0", "kvm_io_exits");
    if let Some(kernel) = kernel.filter(|count| *count > 0) {
        assert!(
            own.abs_diff(kernel) <= 1,
            "own {own}, the kernel's {kernel}"
        );
    }
}

#[test]
fn a_signal_ends_the_process_in_order() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start(&dots());
    eventually("dots", || guest.serial().starts_with('.').then_some(()));
    let api = guest.path("api");
    let killed = std::process::Command::new("kill")
        .args(["-TERM", &guest.pid().to_string()])
        .status();
    assert!(killed.unwrap().success());
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
    assert!(is_absent(&api));
}

#[test]
fn a_missing_backend_holds_up_neither_the_api_nor_the_end() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start_with(&dots(), &["--disk", "vhost_user=on,socket=/nowhere/disk"]);
    assert_eq!(guest.state(), "Created");
    assert_eq!(guest.api("PUT", "vm.pause").0, 500);
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    assert_eq!(guest.state(), "Shutdown");
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    assert_eq!(guest.wait().0, 0);
}

#[test]
fn a_reader_of_the_serial_socket_gets_what_the_guest_writes() {
    if !has_kvm() {
        return;
    }
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = dir.as_path().join("serial.sock");
    let kernel = dir.as_path().join("kernel");
    std::fs::write(&kernel, dots().elf()).unwrap();
    let mut child = support::vmm()
        .args(["--kernel", &kernel.display().to_string(), "--memory", "32M"])
        .args(["--serial", &format!("socket={}", path.display())])
        .spawn()
        .unwrap();
    for _ in 0..3 {
        let mut reader = eventually("the socket", || UnixStream::connect(&path).ok());
        let mut bytes = [0; 1000];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [b'.'; 1000]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
