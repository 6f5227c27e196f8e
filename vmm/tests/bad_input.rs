//! What an operator may get wrong: each gets one clear line and the right exit code.

mod support;

use std::os::unix::net::UnixListener;

use support::{Code, has_kvm, run, vmm};
use vmm_sys_util::tempdir::TempDir;

/// Runs, expects that exit code and one line with all the parts.
fn refused(args: &[&str], code: i32, parts: &[&str]) {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().last().unwrap_or_default();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(last.starts_with("berth-vmm: "), "{args:?}: {stderr}");
    assert_eq!(
        stderr.matches("berth-vmm: ").count(),
        1,
        "{args:?}: {stderr}"
    );
    for part in parts {
        assert!(last.contains(part), "{args:?}: no '{part}' in: {stderr}");
    }
}

#[test]
fn wrong_usage_is_exit_2_and_names_the_nearest() {
    let k = ["--kernel", "/k"];
    let usage = |args: &[&str], parts: &[&str]| refused(&[&k, args].concat(), 2, parts);
    refused(&[], 2, &["--kernel"]);
    usage(&["--memroy", "1G"], &["--memroy", "nearest: '--memory'"]);
    usage(&["--disk", "socet=/a"], &["'socet'", "nearest: 'socket'"]);
    usage(&["--disk", "readonly=on"], &["path= is missing"]);
    usage(
        &["--disk", "path=/a,socket=/b"],
        &["path= and socket= exclude each other"],
    );
    usage(&["--fs", "tag=t"], &["socket= is missing"]);
    usage(
        &["--generic-vhost-user", "device_type=vsocks,socket=/a"],
        &["'vsocks'", "nearest: 'vsock'"],
    );
    usage(&["--net", "socket=/a,mac=nonsense"], &["mac=nonsense"]);
    usage(&["--memory", "size=lots"], &["size=lots", "512M"]);
    usage(&["--cpus", "boot=many"], &["boot=many"]);
    usage(&["--balloon", "siez=1G"], &["'siez'", "nearest: 'size'"]);
    usage(&["--serial", "ttyS0"], &["'ttyS0'", "nearest: 'tty'"]);
    refused(&["--kernel", "/k,entry=uefi"], 2, &["entry=uefi", "pvh"]);
    usage(
        &["--cpus", "features=+x2apci"],
        &["'x2apci'", "nearest: 'x2apic'"],
    );
    usage(
        &["--platform", "test-devise=on"],
        &["'test-devise'", "nearest: 'test-device'"],
    );
}

#[test]
fn what_cannot_be_done_is_exit_1() {
    let k = ["--kernel", "/k", "--serial", "null"];
    let cannot = |args: &[&str], parts: &[&str]| refused(&[&k, args].concat(), 1, parts);
    for boot in ["0", "256", "70000"] {
        cannot(
            &["--cpus", &format!("boot={boot}")],
            &["--cpus", "1 to 255"],
        );
    }
    let split = ["--platform", "irqchip=split", "--cpus"];
    cannot(
        &[&split[..], &["boot=1025"]].concat(),
        &["--cpus", "1024 with --platform"],
    );
    cannot(&["--memory", "size=0"], &["too small"]);
    cannot(
        &["--memory", "size=536870913"],
        &["not a multiple of 2 MiB"],
    );
    cannot(
        &["--balloon", "size=1G"],
        &["1024 MiB", "the guest's memory of 512 MiB"],
    );
    cannot(&["--memory", "size=4096T"], &["physical addresses"]);
    cannot(&["--memory", "size=99999T"], &["physical addresses"]);
    cannot(
        &["--disk", "socket=/a", "socket=/a"],
        &["socket /a is given twice"],
    );
    cannot(
        &["--disk", "socket=/a,id=x", "--net", "socket=/b,id=x"],
        &["id='x'"],
    );
    cannot(&["--disk", "socket=/a,queue_size=100"], &["power of two"]);
    cannot(&["--net", "socket=/a,num_queues=3"], &["even"]);
    cannot(
        &["--log-file", "/nowhere/log"],
        &["/nowhere/log", "No such file"],
    );
}

#[test]
fn kernels_that_are_none() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name).display().to_string();
    let elf = Code::new().halt().elf();
    std::fs::write(at("truncated"), &elf[..100]).unwrap();
    std::fs::write(at("text"), "#!/bin/sh\n").unwrap();
    std::fs::write(at("empty"), "").unwrap();
    std::fs::write(at("good"), &elf).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    let tail = ["--serial", "null", "--memory", "32M"];
    for (name, part) in [
        ("missing", "No such file"),
        ("truncated", ""),
        ("text", ""),
        ("empty", ""),
        ("folder", "a directory"),
    ] {
        let path = at(name);
        refused(
            &[&["--kernel", path.as_str()][..], &tail].concat(),
            1,
            &[&path, part],
        );
    }
    let (good, missing) = (at("good"), at("missing"));
    let args = ["--kernel", good.as_str(), "--initramfs", missing.as_str()];
    refused(&[&args[..], &tail].concat(), 1, &[&missing]);
    let folder = at("folder");
    let args = ["--kernel", good.as_str(), "--initramfs", folder.as_str()];
    refused(&[&args[..], &tail].concat(), 1, &["not a regular file"]);
    let big = at("big");
    std::fs::File::create(&big)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let args = ["--kernel", good.as_str(), "--initramfs", big.as_str()];
    refused(&[&args[..], &tail].concat(), 1, &[&big]);
    let args = ["--kernel", good.as_str(), "--rng", "src=/nowhere/rng"];
    refused(&[&args[..], &tail].concat(), 1, &["/nowhere/rng"]);
}

#[test]
fn sockets_and_files_that_are_in_the_way() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name).display().to_string();
    let kernel = at("kernel");
    std::fs::write(&kernel, Code::new().halt().elf()).unwrap();
    std::fs::write(at("file"), "precious").unwrap();
    let _listener = UnixListener::bind(at("used")).unwrap();
    let cannot = |args: &[&str], parts: &[&str]| {
        refused(
            &[&["--kernel", kernel.as_str()][..], args].concat(),
            1,
            parts,
        );
    };
    for flag in ["--api-socket", "--serial"] {
        let argument = |name: &str| {
            let key = if flag == "--serial" { "socket" } else { "path" };
            format!("{key}={}", at(name))
        };
        cannot(&[flag, &argument("file")], &[&at("file"), "not a socket"]);
        cannot(
            &[flag, &argument("used")],
            &[&at("used"), "another process listens"],
        );
        cannot(&[flag, &argument("no/where")], &["No such file"]);
    }
    assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
    let serial = format!("file={}", at("no/serial"));
    cannot(&["--serial", &serial], &[&at("no/serial"), "No such file"]);
    let disk = format!("socket={}", at("file"));
    cannot(
        &["--serial", "null", "--disk", &disk],
        &[&at("file"), "not a socket"],
    );
}

#[test]
fn help_and_version_are_for_standard_output() {
    let version = run(&["--version"]);
    assert!(version.status.success());
    let text = String::from_utf8(version.stdout).unwrap();
    assert_eq!(text, format!("berth-vmm {}\n", env!("CARGO_PKG_VERSION")));
    let help = vmm().arg("--help").output().unwrap();
    assert!(help.status.success());
    let text = String::from_utf8(help.stdout).unwrap();
    for flag in ["--kernel", "--disk", "--net", "--api-socket", "Examples:"] {
        assert!(text.contains(flag), "no {flag} in:\n{text}");
    }
}
