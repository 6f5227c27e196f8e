//! Daemons that the VMM starts: what is said when one cannot serve, and that they are started again and end
//! with the VMM. The micro-guests do not touch their disks; guests that do are in tests/cases.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use support::daemons::{daemon, has_daemons, image, is_gone, kill, parent, processes};
use support::{Code, Guest, eventually, has_kvm, run};
use vmm_sys_util::tempdir::TempDir;

/// Runs a guest that cannot start; its exit code and the last line.
fn refused(args: &[&str]) -> (Option<i32>, String) {
    let dir = TempDir::new().unwrap();
    let kernel = dir.as_path().join("kernel").display().to_string();
    std::fs::write(&kernel, Code::new().halt().elf()).unwrap();
    let fixed = [
        "--kernel", &kernel, "--memory", "size=32M", "--serial", "null",
    ];
    let output = run(&[&fixed, args].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().last().unwrap_or_default().to_owned();
    (output.status.code(), last)
}

/// A program of a few lines of shell.
fn script(path: &Path, text: &str) -> String {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    let executable = PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(path, executable).unwrap();
    format!("backend={}", path.display())
}

#[test]
fn a_daemons_last_words_are_the_error() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let program = dir.as_path().join("program");
    let image = image(&dir.as_path().join("image"));
    let with = |text: &str| refused(&["--disk", &format!("{image},{}", script(&program, text))]);
    let (code, line) = with("echo first >&2; printf 'no, and \\033[31mnever' >&2; exit 3");
    assert_eq!(
        (code, line.as_str()),
        (Some(1), "berth-vmm: _disk0: no, and ?[31mnever")
    );
    let (code, line) = with("exit 3");
    assert_eq!(code, Some(1));
    assert!(line.ends_with("program ended with exit code 3"), "{line}");
    let (code, line) = with("kill -11 $$");
    assert_eq!(code, Some(1));
    assert!(line.ends_with("program was ended by signal 11"), "{line}");
}

#[test]
fn a_program_that_is_not_there_is_said() {
    if !has_kvm() {
        return;
    }
    let (code, line) = refused(&["--disk", "path=/d,backend=/nowhere/daemon"]);
    assert_eq!(code, Some(1));
    assert!(
        line.contains("_disk0: cannot start /nowhere/daemon: No such file"),
        "{line}"
    );
}

#[test]
fn an_image_that_is_missing_or_in_use_keeps_the_guest_from_starting() {
    if !has_daemons() {
        return;
    }
    let (code, line) = refused(&["--disk", "path=/nowhere/disk.raw"]);
    assert_eq!(code, Some(1));
    let parts = ["_disk0", "/nowhere/disk.raw", "No such file"];
    assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    let dir = TempDir::new().unwrap();
    let disk = image(&dir.as_path().join("image"));
    let (code, line) = refused(&["--disk", &disk, &disk]);
    assert_eq!(code, Some(1));
    assert!(line.contains("the image is in use by"), "{line}");
    let (code, line) = refused(&[
        "--disk",
        &format!("{disk},id=root,num_queues=64,queue_size=2"),
    ]);
    assert_eq!(code, Some(1));
    assert!(line.starts_with("berth-vmm: root: "), "{line}");
}

/// A guest with a disk of its own, which runs, and the image.
fn with_disk() -> (Guest, TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    let disk = image(&path);
    let guest = Guest::start_with(&Code::new().print("up\n").halt(), &["--disk", &disk]);
    eventually("the guest runs", || {
        guest.serial().contains("up").then_some(())
    });
    (guest, dir, path)
}

#[test]
fn a_daemon_that_is_killed_is_started_again() {
    if !has_daemons() {
        return;
    }
    let (guest, _dir, image) = with_disk();
    for _ in 0..2 {
        let first = eventually("a daemon", || daemon(&image));
        kill(first);
        eventually("its successor", || {
            daemon(&image).filter(|&next| next != first)
        });
        eventually("the disk is back", || {
            let connected = guest.counter("_disk0", "backend_connected");
            (connected == Some(1)).then_some(())
        });
    }
    let last = eventually("a daemon", || daemon(&image));
    let (status, _) = guest.api("PUT", "vmm.shutdown");
    assert_eq!(status, 204);
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
    assert!(is_gone(last), "the daemon outlives the VMM: {stderr}");
    assert!(
        stderr.contains("berth-blk was ended by signal 9"),
        "{stderr}"
    );
    assert!(stderr.contains("disk opened image="), "{stderr}");
}

#[test]
fn a_vmm_that_is_killed_takes_launcher_and_daemon_along() {
    if !has_daemons() {
        return;
    }
    let (guest, _dir, image) = with_disk();
    let blk = eventually("a daemon", || daemon(&image));
    let launcher = parent(blk);
    assert_ne!(launcher, guest.pid());
    kill(guest.pid());
    eventually("the daemon ends", || is_gone(blk).then_some(()));
    eventually("the launcher ends", || is_gone(launcher).then_some(()));
}

#[test]
fn a_daemon_that_does_not_listen_to_anybody_ends_too() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let backend = script(
        &dir.as_path().join("program"),
        "trap '' TERM\nwhile :; do sleep 1; done",
    );
    let disk = format!("{},{backend}", image(&dir.as_path().join("image")));
    let program = dir.as_path().join("program").display().to_string();
    let guest = Guest::start_with(&Code::new().halt(), &["--disk", &disk]);
    // The script's first argument is the interpreter's.
    let pid = eventually("the daemon runs", || {
        let shell = format!("/bin/sh\0{program}");
        processes(&shell).first().copied()
    });
    kill(guest.pid());
    eventually("the daemon ends", || is_gone(pid).then_some(()));
}

#[test]
fn a_reboot_has_a_daemon_of_its_own() {
    if !has_daemons() {
        return;
    }
    let (guest, _dir, image) = with_disk();
    let first = eventually("a daemon", || daemon(&image));
    let (status, _) = guest.api("PUT", "vm.reboot");
    assert_eq!(status, 204);
    let next = eventually("the next daemon", || {
        daemon(&image).filter(|&next| next != first)
    });
    assert!(is_gone(first), "two daemons on one image");
    eventually("the guest runs again", || {
        (guest.serial().matches("up").count() == 2).then_some(())
    });
    assert_eq!(daemon(&image), Some(next));
}
