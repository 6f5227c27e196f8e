//! Which engine does the I/O, and what happens where the one asked for is not to be had.
#![allow(clippy::unwrap_used, missing_docs)]
#![allow(
    unsafe_code,
    reason = "a seccomp filter in the daemon before it starts"
)]

mod support;

use std::os::unix::process::CommandExt;
use std::path::Path;

use berth_queue_worker::testing::{FakeDriver, Setup};
use support::{Daemon, TempDir, Watchdog, refused, serving, write_and_read};

const MIB: u64 = 1 << 20;

#[test]
fn every_engine_reads_back_what_it_wrote() {
    let _watchdog = Watchdog::new("engines");
    let dir = TempDir::new();
    // All hole: what is read first does not get to the device.
    let image = dir.image("disk.img", MIB);
    let socket = dir.path("disk.sock");
    for (n, flag) in [
        "--engine=auto",
        "--engine=io-uring",
        "--engine=sync",
        "--sqpoll",
        "--fixed-buffers=guest-never-discards",
        // Refused only once it gets to the device, if that has no poll queues: then without.
        "--iopoll",
        "--iopoll --fixed-buffers=guest-never-discards",
    ]
    .iter()
    .enumerate()
    {
        // Not what the engine before wrote.
        dir.image("disk.img", MIB);
        for cache in ["--cache=none", "--cache=writeback"] {
            if flag.starts_with("--iopoll") && cache == "--cache=writeback" {
                continue;
            }
            let flags: Vec<_> = flag.split(' ').chain([cache]).collect();
            let daemon = Daemon::serve(&socket, &image, &flags);
            let mut driver = FakeDriver::connect(&socket, Setup::default());
            for sector in 0..8 {
                write_and_read(&mut driver, sector * 8, n as u8 + 1);
            }
            driver.finish();
            daemon.terminate();
        }
    }
}

#[test]
fn polled_io_is_refused_by_name_where_it_cannot_be() {
    let _watchdog = Watchdog::new("polled I/O");
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let socket = dir.path("disk.sock");
    let mut args = vec![
        format!("--socket-path={}", socket.display()),
        format!("--blk-file={}", image.display()),
        "--iopoll".to_owned(),
    ];
    let (code, text) = refused(&args);
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert!(text.contains("--iopoll needs --cache=none"), "{text}");
    args.push("--sqpoll".to_owned());
    assert_eq!(refused(&args).0, 2);
}

#[test]
fn registered_buffers_are_refused_where_there_is_no_ring_to_have_them() {
    let _watchdog = Watchdog::new("registered buffers without a ring");
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let mut args = vec![
        format!("--socket-path={}", dir.path("disk.sock").display()),
        format!("--blk-file={}", image.display()),
        "--engine=sync".to_owned(),
        "--fixed-buffers=guest-never-discards".to_owned(),
    ];
    let (code, text) = refused(&args);
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert!(text.contains("--fixed-buffers needs io_uring"), "{text}");
    args.pop();
    args.push("--fixed-buffers=on".to_owned());
    assert_eq!(
        refused(&args).0,
        2,
        "whoever turns it on says what it takes"
    );
}

/// From here on io_uring_setup fails with EPERM in this process, as in many containers.
fn forbid_io_uring() -> std::io::Result<()> {
    forbid(libc::SYS_io_uring_setup, None)
}

/// From here on no buffers can be registered with a ring (IORING_REGISTER_BUFFERS2).
fn forbid_registered_buffers() -> std::io::Result<()> {
    forbid(libc::SYS_io_uring_register, Some(15))
}

/// From here on a system call fails with EPERM: with this second argument, or with any.
fn forbid(call: libc::c_long, second: Option<u32>) -> std::io::Result<()> {
    /// Where the low half of the second argument is in struct seccomp_data.
    const SECOND: u32 = 24;
    const LOAD: u16 = 0x20;
    const EQUALS: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut steps = [
        step(LOAD, 0, 0, 0),
        step(EQUALS, 0, 3, call as u32),
        step(LOAD, 0, 0, SECOND),
        // Without one that is asked for, on to the verdict either way.
        step(
            EQUALS,
            0,
            u8::from(second.is_some()),
            second.unwrap_or_default(),
        ),
        step(
            RETURN,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
        ),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: plain system calls; the program lives until the second has returned.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
    };
    if failed {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Has a daemon of two queues serve and end; the one warning that it gave.
fn only_warning(mut daemon: Daemon, socket: &Path) -> String {
    let setup = Setup {
        num_queues: 2,
        ..Setup::default()
    };
    let mut driver = FakeDriver::connect(socket, setup);
    write_and_read(&mut driver, 8, 0x5a);
    driver.finish();
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0));
    let warnings = daemon.log.iter().filter(|line| line.contains("WARN"));
    let warnings: Vec<_> = warnings.collect();
    assert_eq!(warnings.len(), 1, "{:#?}", daemon.log);
    warnings[0].clone()
}

#[test]
fn system_calls_take_over_with_one_warning_where_io_uring_is_forbidden() {
    let _watchdog = Watchdog::new("no io_uring");
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let socket = dir.path("disk.sock");
    let mut command = serving(&socket, &image, &["--num-queues=2"]);
    // SAFETY: the closure makes system calls only, which is what may be done after fork.
    unsafe { command.pre_exec(forbid_io_uring) };
    let mut daemon = Daemon::spawn(command);
    daemon.wait_for("ready for a frontend");
    let warning = only_warning(daemon, &socket);
    assert!(
        warning.contains("falling back to pread and pwrite"),
        "{warning}"
    );
    // Asked for by name, it is an error.
    let mut command = serving(&socket, &image, &["--sqpoll"]);
    // SAFETY: as above.
    unsafe { command.pre_exec(forbid_io_uring) };
    let mut daemon = Daemon::spawn(command);
    assert_eq!(daemon.wait().code(), Some(1));
    let last = daemon.log.last().unwrap();
    assert!(last.contains("cannot be used with --sqpoll"), "{last}");
}

#[test]
fn memory_that_cannot_be_registered_is_served_with_one_warning() {
    let _watchdog = Watchdog::new("no registered buffers");
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let socket = dir.path("disk.sock");
    let flags = ["--fixed-buffers=guest-never-discards", "--num-queues=2"];
    let mut command = serving(&socket, &image, &flags);
    // SAFETY: the closure makes system calls only, which is what may be done after fork.
    unsafe { command.pre_exec(forbid_registered_buffers) };
    let mut daemon = Daemon::spawn(command);
    daemon.wait_for("nobody may discard pages of it");
    daemon.wait_for("ready for a frontend");
    let warning = only_warning(daemon, &socket);
    assert!(
        warning.contains("guest memory cannot be registered"),
        "{warning}"
    );
}
