//! Disks and network cards that the API adds with an image, a tap's name or its descriptor: the launcher starts
//! their daemons while the guest runs, with the sandbox on, and ends them with the device.

#![expect(
    unsafe_code,
    reason = "a network of its own, and a tap in it, are made by system calls"
)]
#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod support;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use support::daemons::{daemon, has_daemons, image, is_gone, kill, processes};
use support::slot::{BELOW, BUTTON, CONTROL, PORT, POWER_OFF, PRESENT, STATUS};
use support::virtio::{Access, BUFFER};
use support::{Code, Guest, PATIENCE, eventually};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;

/// Virtio's types as PCI device ids.
const NET: u16 = 0x1041;
const BLK: u16 = 0x1042;

/// Switches on what comes, has it `used`, and switches it off when it is to go.
fn driver(device: u16, used: impl FnOnce(Code) -> Code) -> Code {
    let on = Code::new()
        .pci_wait(PORT, STATUS, PRESENT, PRESENT)
        .pci_write(PORT, STATUS, 0xffff)
        .pci_write(PORT, CONTROL, 0)
        .pci_wait(BELOW, 2, 0xffff, device);
    used(on)
        .print("added\n")
        .pci_wait(PORT, STATUS, BUTTON, BUTTON)
        .pci_write(PORT, CONTROL, POWER_OFF)
        .pci_wait(PORT, STATUS, PRESENT, 0)
        .pci_write(PORT, STATUS, 0xffff)
        .print("removed\n")
        .again()
}

/// Reads the first sector, and waits for what the image begins with.
fn reads_a_sector(code: Code) -> Code {
    let (data, status) = (BUFFER + 0x1000, BUFFER + 0x2000);
    // Type 0 is a read, and sector 0 is meant: the header is zero, as memory is.
    let chain = [
        (BUFFER, 16, Access::Reads),
        (data, 512, Access::Writes),
        (status, 1, Access::Writes),
    ];
    code.store32(data, 0)
        .store32(status, u32::MAX)
        .virtio_submit(PORT, BELOW, 0, &chain)
        .virtio_complete()
        .wait32(data, u32::from_le_bytes(*b"disk"))
        .wait32(status, u32::MAX << 8)
}

/// Sends a frame to everybody.
fn sends_a_frame(code: Code) -> Code {
    code.store32(BUFFER + 12, u32::MAX)
        .store32(BUFFER + 16, 0x0002_ffff)
        .virtio_submit(PORT, BELOW, 1, &[(BUFFER, 12 + 60, Access::Reads)])
        .virtio_complete()
}

fn start(code: &Code) -> Guest {
    let guest = Guest::start_with(code, &["--platform", "hotplug_ports=1"]);
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    guest
}

fn lines(guest: &Guest, expected: &[&str]) {
    eventually("the guest's lines", || {
        (guest.lines().len() >= expected.len()).then_some(())
    });
    assert_eq!(guest.lines(), expected);
}

#[test]
fn an_image_is_added_read_and_free_again_when_the_guest_lets_go() {
    if !has_daemons() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    image(&path);
    let guest = start(&driver(BLK, reads_a_sector));
    let body = format!(r#"{{"path": "{}"}}"#, path.display());

    let absent = dir.as_path().join("absent");
    let (status, text) = guest.put(
        "vm.add-disk",
        &format!(r#"{{"path": "{}"}}"#, absent.display()),
    );
    assert_eq!(status, 500, "{text}");
    assert!(text.contains("No such file"), "{text}");

    std::fs::write(&path, b"disk".repeat(4 << 20)).unwrap();
    for round in 0..2 {
        let (status, answer) = guest.put("vm.add-disk", &body);
        let added = r#"{"id":"_disk0","bdf":"0000:01:00.0"}"#;
        assert_eq!((status, answer.as_str()), (200, added));
        let expected = ["added", "removed"].repeat(2);
        lines(&guest, &expected[..=2 * round]);
        let first = eventually("a daemon", || daemon(&path));
        kill(first);
        let next = eventually("its successor", || {
            daemon(&path).filter(|&pid| pid != first)
        });
        eventually("the disk is back", || {
            (guest.counter("_disk0", "backend_connected") == Some(1)).then_some(())
        });
        assert_eq!(guest.put("vm.remove-device", r#"{"id": "_disk0"}"#).0, 204);
        lines(&guest, &expected[..2 * round + 2]);
        eventually("the daemon ends", || is_gone(next).then_some(()));
    }
    assert_eq!(daemon(&path), None);
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_UP: u16 = 1;
/// A tap, without a header of its own, with virtio's.
const TAP_FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// Gives this thread, and what it starts, a network of its own; says so where it may not.
fn own_network() -> bool {
    // SAFETY: it concerns this thread alone, which is a test's.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    if !done {
        eprintln!("skipped: no network: {}", io::Error::last_os_error());
    }
    done
}

/// A struct ifreq with a name and flags, given to an ioctl.
fn ask_interface(file: &impl AsRawFd, request: libc::c_ulong, name: &str, flags: u16) {
    let mut ifreq = [0_u8; 40];
    ifreq[..name.len()].copy_from_slice(name.as_bytes());
    ifreq[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the kernel reads and writes at most the 40 bytes of a struct ifreq, which outlive the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), request, ifreq.as_mut_ptr()) };
    assert_eq!(done, 0, "{name}: {}", io::Error::last_os_error());
}

/// A tap that is up.
fn tap(name: &str) -> File {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tun = tun.unwrap();
    ask_interface(&tun, TUNSETIFF, name, TAP_FLAGS);
    let any = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    ask_interface(&any, libc::SIOCSIFFLAGS, name, IFF_UP);
    tun
}

/// Frames that came out of the tap; `None` where there is none of that name.
fn frames(name: &str) -> Option<u64> {
    let all = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = all.lines().find_map(|line| {
        let (of, counts) = line.trim().split_once(':')?;
        (of == name).then_some(counts)
    });
    line?.split_whitespace().nth(1)?.parse().ok()
}

/// `vm.add-net` with descriptors.
fn add_net(guest: &Guest, body: &str, taps: &[&File]) -> String {
    let mut stream = UnixStream::connect(guest.path("api")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let text = format!(
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let fds: Vec<_> = taps.iter().map(|tap| tap.as_raw_fd()).collect();
    let sent = stream.send_with_fds(&[text.as_bytes()], &fds).unwrap();
    assert_eq!(sent, text.len());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Adds a card, has the guest send through it, and removes it.
fn sends_through(name: &str, body: &str, taps: &[&File]) {
    let guest = start(&driver(NET, sends_a_frame));
    let answer = add_net(&guest, body, taps);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains(r#""id":"_net0""#), "{answer}");
    lines(&guest, &["added"]);
    eventually("the frame", || (frames(name)? >= 1).then_some(()));
    assert_eq!(guest.counter("_net0", "backend_connected"), Some(1));
    assert_eq!(guest.put("vm.remove-device", r#"{"id": "_net0"}"#).0, 204);
    lines(&guest, &["added", "removed"]);
}

#[test]
fn a_card_is_added_with_the_descriptor_of_a_tap_and_sends_through_it() {
    if !has_daemons() || !own_network() {
        return;
    }
    let name = &format!("fd{}", std::process::id());
    let tap = tap(name);
    sends_through(name, r#"{"mac": "52:54:00:be:47:0a"}"#, &[&tap]);
    drop(tap);
    eventually("the tap goes with its last descriptor", || {
        frames(name).is_none().then_some(())
    });
}

#[test]
fn a_card_is_added_with_the_name_of_a_tap_that_its_daemon_makes() {
    if !has_daemons() || !own_network() {
        return;
    }
    let name = &format!("name{}", std::process::id());
    sends_through(name, &format!(r#"{{"tap": "{name}"}}"#), &[]);
    eventually("the daemon ends and takes its tap along", || {
        let none = processes(&format!("--tap={name}")).is_empty() && frames(name).is_none();
        none.then_some(())
    });
}
