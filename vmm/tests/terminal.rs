//! The serial port on a terminal and on a socket: raw mode and its end, input that is not lost.
#![expect(unsafe_code, reason = "pseudo-terminals have no safe wrapper")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot start its process has failed"
)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use support::{Code, eventually, has_kvm};
use vmm_sys_util::tempdir::TempDir;

struct Terminal {
    ours: File,
    slave: OwnedFd,
}

fn terminal() -> Terminal {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: both fds are written on success; the other pointers may be null.
    let made = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(made, 0);
    // SAFETY: openpty made both and nothing else owns them.
    unsafe {
        Terminal {
            ours: File::from_raw_fd(master),
            slave: OwnedFd::from_raw_fd(slave),
        }
    }
}

impl Terminal {
    /// Whether keys are handed on one by one, without echo and without signals.
    fn is_raw(&self) -> bool {
        let mut termios = std::mem::MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: the call writes a termios; all zeroes is one too.
        let flags = unsafe {
            assert_eq!(
                libc::tcgetattr(self.slave.as_raw_fd(), termios.as_mut_ptr()),
                0
            );
            termios.assume_init().c_lflag
        };
        flags & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    fn start(&self, dir: &TempDir) -> Child {
        let kernel = dir.as_path().join("kernel");
        std::fs::write(&kernel, Code::new().echo().elf()).unwrap();
        let end = || Stdio::from(self.slave.try_clone().unwrap());
        support::vmm()
            .args(["--kernel", &kernel.display().to_string(), "--memory", "32M"])
            .stdin(end())
            .stdout(end())
            .spawn()
            .unwrap()
    }
}

fn kill(child: &Child, signal: i32) {
    // SAFETY: the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

#[test]
fn keys_go_to_the_guest_and_the_terminal_is_set_back() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    // In order; by a request to end; from inside, as a panic does it.
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGABRT] {
        let mut terminal = terminal();
        assert!(!terminal.is_raw());
        let mut child = terminal.start(&dir);
        eventually("raw mode", || terminal.is_raw().then_some(()));
        // Ctrl-C, Ctrl-D, Ctrl-Z and Enter are keys like any other.
        let keys = b"ab\x03\x04\x1a\r";
        terminal.ours.write_all(keys).unwrap();
        let mut echoed = [0; 6];
        terminal.ours.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed, keys);
        kill(&child, signal);
        let status = child.wait().unwrap();
        assert_eq!(status.success(), signal != libc::SIGABRT);
        assert!(!terminal.is_raw(), "after signal {signal}");
    }
}

#[test]
fn what_is_pasted_comes_back_whole() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = dir.as_path().join("kernel");
    std::fs::write(&kernel, Code::new().echo().elf()).unwrap();
    let path = dir.as_path().join("serial");
    let mut child = support::vmm()
        .args(["--kernel", &kernel.display().to_string(), "--memory", "32M"])
        .args(["--serial", &format!("socket={}", path.display())])
        .spawn()
        .unwrap();
    let mut reader = eventually("the socket", || UnixStream::connect(&path).ok());
    let mut writer = reader.try_clone().unwrap();
    // More than the input queue and the FIFO hold.
    let sent: Vec<u8> = (0..100_000u32).map(|at| (at * 7 % 251) as u8).collect();
    let expected = sent.clone();
    let pasting = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
    });
    let mut received = vec![0; expected.len()];
    reader.read_exact(&mut received).unwrap();
    assert!(received == expected, "bytes were lost or changed");
    pasting.join().unwrap();
    reader.shutdown(Shutdown::Both).unwrap();
    kill(&child, libc::SIGTERM);
    assert!(child.wait().unwrap().success());
}
