//! Media that fail, fill up, or end too early: the guest gets an error for that request alone. And what a
//! flush does to the medium, counted there.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_queue_worker::testing::{FakeDriver, Setup};
use support::{Daemon, LoopDevice, TempDir, in_namespace, request, write_and_read};

const MIB: u64 = 1 << 20;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;

fn serve(dir: &TempDir, medium: &Path, flags: &[&str]) -> (Daemon, FakeDriver) {
    let socket = dir.path("disk.sock");
    let daemon = Daemon::serve(&socket, medium, flags);
    let driver = FakeDriver::connect(&socket, Setup::default());
    (daemon, driver)
}

/// A loop device of `size` on a tmpfs with room for less, which nobody else sees.
fn full_disk(dir: &TempDir, size: u64, room: u64) -> Option<LoopDevice> {
    let at = dir.path("small");
    std::fs::create_dir(&at).unwrap();
    let at = at.display();
    let name = in_namespace(
        "-m",
        &format!(
            "mount -t tmpfs -o size={room} small {at} && truncate -s {size} {at}/disk && \
         losetup --find --show {at}/disk"
        ),
    )?;
    Some(LoopDevice(name))
}

#[test]
fn medium_that_fails_a_read_fails_that_request_and_no_other() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let Some(device) = LoopDevice::attach(&image) else {
        return;
    };
    for cache in ["none", "writeback"] {
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(8 * MIB)
            .unwrap();
        let flag = format!("--cache={cache}");
        let (daemon, mut driver) = serve(&dir, Path::new(&device.0), &[&flag]);
        write_and_read(&mut driver, 0, 5);
        // The loop device keeps its size, and now answers EIO for what is gone.
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(4 * MIB)
            .unwrap();
        for sector in [8192, 12288, 16384 - 8] {
            assert_eq!(
                request(&mut driver, READ, sector, &[], 4096).0,
                IOERR,
                "{cache}"
            );
        }
        assert_eq!(
            request(&mut driver, READ, 0, &[], 4096),
            (OK, vec![5; 4096])
        );
        write_and_read(&mut driver, 8, 6);
        driver.finish();
        daemon.terminate();
    }
}

#[test]
fn full_medium_fails_the_writes_that_do_not_fit() {
    let dir = TempDir::new();
    // 2 MiB of room for a disk of 8, seen directly.
    let Some(device) = full_disk(&dir, 8 * MIB, 2 * MIB) else {
        return;
    };
    let (daemon, mut driver) = serve(&dir, Path::new(&device.0), &["--cache=none"]);
    let written = fill(&mut driver, 8 * MIB);
    assert!((256 << 10..=2 * MIB).contains(&written), "{written}");
    // What was acknowledged is there; what was not reads as before.
    assert_eq!(
        request(&mut driver, READ, 0, &[], 4096),
        (OK, vec![1; 4096])
    );
    let last = (written - 4096) / 512;
    assert_eq!(
        request(&mut driver, READ, last, &[], 4096),
        (OK, vec![1; 4096])
    );
    let beyond = 4 * MIB / 512;
    assert_eq!(
        request(&mut driver, READ, beyond, &[], 4096),
        (OK, vec![0; 4096])
    );
    write_and_read(&mut driver, 0, 9);
    driver.finish();
    daemon.terminate();
}

#[test]
fn write_that_the_page_cache_took_and_the_medium_did_not_fails_the_flush() {
    let dir = TempDir::new();
    let Some(device) = full_disk(&dir, 8 * MIB, 2 * MIB) else {
        return;
    };
    let (daemon, mut driver) = serve(&dir, Path::new(&device.0), &["--cache=writeback"]);
    // The cache has room for all of it.
    assert_eq!(fill(&mut driver, 8 * MIB), 8 * MIB);
    assert_eq!(request(&mut driver, FLUSH, 0, &[], 0).0, IOERR);
    // The error was of those writes: the next flush has nothing that fails.
    assert_eq!(request(&mut driver, FLUSH, 0, &[], 0).0, OK);
    write_and_read(&mut driver, 0, 3);
    assert_eq!(request(&mut driver, FLUSH, 0, &[], 0).0, OK);
    driver.finish();
    daemon.terminate();
}

/// Writes 64 KiB after 64 KiB up to `size`, until one fails; how many bytes were acknowledged.
fn fill(driver: &mut FakeDriver, size: u64) -> u64 {
    const STEP: usize = 64 << 10;
    let data = vec![1; STEP];
    (0..size)
        .step_by(STEP)
        .find(|at| {
            let status = request(driver, WRITE, at / 512, &data, 0).0;
            assert!([OK, IOERR].contains(&status));
            status == IOERR
        })
        .unwrap_or(size)
}

#[test]
fn file_on_a_full_file_system_fails_what_does_not_fit() {
    let dir = TempDir::new();
    let at = dir.path("small");
    std::fs::create_dir(&at).unwrap();
    // The daemon itself lives in the namespace, so that it sees the file system.
    let mut command = Command::new("unshare");
    let script =
        "mount -t tmpfs -o size=1M small $0 && truncate -s 8M $0/disk && shift && exec \"$@\"";
    let program = support::command();
    command
        .args(["-rm", "sh", "-c", script])
        .arg(&at)
        .arg("-")
        .arg(program.get_program())
        .arg(format!("--socket-path={}", dir.path("disk.sock").display()))
        .arg(format!("--blk-file={}", at.join("disk").display()));
    if in_namespace("-rm", "true").is_none() {
        return;
    }
    let mut daemon = Daemon::spawn(support::piped(command));
    daemon.wait_for("ready for a frontend");
    let mut driver = FakeDriver::connect(&dir.path("disk.sock"), Setup::default());
    let written = fill(&mut driver, 8 * MIB);
    assert!((256 << 10..=MIB).contains(&written), "{written}");
    // No room for zeros either, where they must take space.
    let range = [&8192u64.to_le_bytes()[..], &4096u32.to_le_bytes(), &[0; 4]].concat();
    assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &range, 0).0, IOERR);
    assert_eq!(request(&mut driver, FLUSH, 0, &[], 0).0, OK);
    write_and_read(&mut driver, 0, 9);
    driver.finish();
    daemon.terminate();
}

/// How many flushes a block device has carried out (Documentation/block/stat.rst, "flush I/Os").
fn flushes(device: &LoopDevice) -> u64 {
    let name = device.0.trim_start_matches("/dev/");
    let stat = std::fs::read_to_string(PathBuf::from("/sys/block").join(name).join("stat"));
    let stat = stat.unwrap();
    let count = stat.split_whitespace().nth(15).expect("Linux 5.5 or newer");
    count.parse().unwrap()
}

#[test]
fn flush_reaches_the_medium_and_a_write_does_only_without_a_write_cache() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let Some(device) = LoopDevice::attach(&image) else {
        return;
    };
    for cache in ["none", "writeback"] {
        let flag = format!("--cache={cache}");
        let (daemon, mut driver) = serve(&dir, Path::new(&device.0), &[&flag]);
        let start = flushes(&device);
        for n in 0..8 {
            assert_eq!(request(&mut driver, WRITE, n * 8, &[7; 4096], 0).0, OK);
        }
        assert_eq!(flushes(&device), start, "{cache}: writes alone");
        for n in 1..=5 {
            assert_eq!(request(&mut driver, FLUSH, 0, &[], 0).0, OK);
            assert_eq!(flushes(&device), start + n, "{cache}: one each");
        }
        let mut written = [0; 4096];
        File::open(&image)
            .unwrap()
            .read_exact_at(&mut written, 7 * 4096)
            .unwrap();
        assert_eq!(written, [7; 4096]);
        // The driver turns the write cache off while the queue runs: from now on each write is durable.
        assert_eq!(driver.frontend.set_config(32, &[0]), 0);
        for n in 1..=5 {
            assert_eq!(request(&mut driver, WRITE, n * 8, &[8; 4096], 0).0, OK);
            assert_eq!(flushes(&device), start + 5 + n, "{cache}: each write");
        }
        assert_eq!(driver.frontend.set_config(32, &[1]), 0);
        assert_eq!(request(&mut driver, WRITE, 0, &[8; 4096], 0).0, OK);
        assert_eq!(flushes(&device), start + 10, "{cache}: cached again");
        driver.finish();
        daemon.terminate();
    }
}
