//! Images and who else uses them: locks against QEMU's tools and QEMU itself, both ways, and block devices.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use berth_queue_worker::testing::{FakeDriver, Setup};
use support::{
    Daemon, LoopDevice, TempDir, Watchdog, in_namespace, refused, request, write_and_read,
};

const MIB: u64 = 1 << 20;

#[test]
fn image_of_another_writer_is_refused_and_its_holder_named() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let daemon = Daemon::serve(&dir.path("a.sock"), &image, &[]);
    for more in [None, Some("--read-only".to_owned())] {
        let mut args = vec![
            format!("--socket-path={}", dir.path("b.sock").display()),
            format!("--blk-file={}", image.display()),
        ];
        args.extend(more);
        let (code, text) = refused(&args);
        assert_eq!((code, text.lines().count()), (1, 1), "{text}");
        let holder = format!("in use by process {} (berth-blk)", daemon.pid());
        assert!(text.contains(&holder), "{text}");
    }
    daemon.terminate();
}

/// Runs a program of QEMU's, if this machine has it: whether it succeeded, and what it said.
fn qemu(program: &str, args: &[&str], image: &Path) -> Option<(bool, String)> {
    let result = Command::new(program).args(args).arg(image).output();
    let output = match result {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: no {program}");
            return None;
        }
        Err(e) => panic!("{program}: {e}"),
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Some((output.status.success(), text))
}

/// While `command` has the image open for writing, we are refused and its process is named. That it has
/// opened it is shown by its answer to `question`, which contains `answer`.
fn refused_beside(
    command: &mut Command,
    [name, question, answer]: [&'static str; 3],
    dir: &TempDir,
    image: &Path,
) {
    let _watchdog = Watchdog::new(answer);
    let mut holder = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = holder.stdin.as_mut().unwrap();
    stdin.write_all(question.as_bytes()).unwrap();
    let mut said = BufReader::new(holder.stdout.as_mut().unwrap()).lines();
    let answered = said.any(|line| line.unwrap().contains(answer));
    assert!(answered, "{name} ended");
    for more in [None, Some("--read-only".to_owned())] {
        let mut args = vec![
            format!("--socket-path={}", dir.path("x.sock").display()),
            format!("--blk-file={}", image.display()),
        ];
        args.extend(more);
        let (code, text) = refused(&args);
        assert_eq!((code, text.lines().count()), (1, 1), "{text}");
        let held = format!("in use by process {} ({name})", holder.id());
        assert!(text.contains(&held), "{text}");
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
}

#[test]
fn qemu_io_and_we_keep_each_other_out_of_an_image() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let read = ["-f", "raw", "-c", "read 0 512"];
    let read_shared = ["-r", "-f", "raw", "-c", "read 0 512"];
    let writer = Daemon::serve(&dir.path("w.sock"), &image, &[]);
    let Some((opened, text)) = qemu("qemu-io", &read, &image) else {
        return;
    };
    assert!(!opened && text.contains("lock"), "{text}");
    writer.terminate();
    // Readers share with readers only.
    let reader = Daemon::serve(&dir.path("r.sock"), &image, &["--read-only"]);
    assert!(!qemu("qemu-io", &read, &image).unwrap().0);
    let (opened, text) = qemu("qemu-io", &read_shared, &image).unwrap();
    assert!(opened, "{text}");
    reader.terminate();
    let mut holder = Command::new("qemu-io");
    refused_beside(
        holder.args(["-f", "raw"]).arg(&image),
        ["qemu-io", "length\n", "1 MiB"],
        &dir,
        &image,
    );
}

#[test]
fn qemu_img_does_not_write_to_an_image_in_use() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let source = dir.image("source.img", MIB);
    let writer = Daemon::serve(&dir.path("w.sock"), &image, &[]);
    let source = source.to_str().unwrap();
    let over_it = ["convert", "-n", "-f", "raw", "-O", "raw", source];
    let Some((done, text)) = qemu("qemu-img", &over_it, &image) else {
        return;
    };
    assert!(!done && text.contains("lock"), "{text}");
    let resize = Command::new("qemu-img")
        .args(["resize", "-f", "raw"])
        .args([image.to_str().unwrap(), "2M"])
        .output();
    let resize = resize.unwrap();
    assert!(!resize.status.success());
    assert!(String::from_utf8_lossy(&resize.stderr).contains("lock"));
    assert_eq!(std::fs::metadata(&image).unwrap().len(), MIB);
    writer.terminate();
    let (done, text) = qemu("qemu-img", &over_it, &image).unwrap();
    assert!(done, "{text}");
}

#[test]
fn qemu_and_we_keep_each_other_out_of_an_image() {
    const QEMU: &str = "qemu-system-x86_64";
    const MACHINE: [&str; 10] = [
        "-accel",
        "tcg",
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "stdio",
        "-device",
        "virtio-blk-pci,drive=d",
    ];
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let drive = format!("file={},format=raw,if=none,id=d", image.display());
    let writer = Daemon::serve(&dir.path("w.sock"), &image, &[]);
    let args = [&MACHINE[..], &["-drive"]].concat();
    let Some((ran, text)) = qemu(QEMU, &args, Path::new(&drive)) else {
        return;
    };
    assert!(!ran && text.contains("lock"), "{text}");
    writer.terminate();
    let mut holder = Command::new(QEMU);
    holder.args(&args).arg(&drive);
    // The name that the kernel keeps has 15 bytes.
    let talk = ["qemu-system-x86", "info block\n", "(raw)"];
    refused_beside(&mut holder, talk, &dir, &image);
}

#[test]
fn block_device_is_served_discarded_and_locked() {
    use std::os::unix::fs::MetadataExt;
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let Some(device) = LoopDevice::attach(&image) else {
        return;
    };
    let path = Path::new(&device.0);
    for cache in ["none", "writeback"] {
        let flag = format!("--cache={cache}");
        let daemon = Daemon::serve(&dir.path("d.sock"), path, &[&flag]);
        let mut driver = FakeDriver::connect(&dir.path("d.sock"), Setup::default());
        let capacity = driver.frontend.get_config(0, 8);
        assert_eq!(capacity, (8 * MIB / 512).to_le_bytes());
        for n in 0..16 {
            write_and_read(&mut driver, n * 8, 7);
        }
        assert_eq!(request(&mut driver, 4, 0, &[], 0).0, 0);
        assert_eq!(std::fs::read(&image).unwrap()[..4096], [7; 4096]);
        // Discard all of it: the blocks of the file behind the device go.
        let range = [&0u64.to_le_bytes()[..], &128u32.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(request(&mut driver, 11, 0, &range, 0).0, 0);
        assert_eq!(request(&mut driver, 4, 0, &[], 0).0, 0);
        assert_eq!(std::fs::metadata(&image).unwrap().blocks(), 0);
        let (code, text) = refused(&[
            format!("--socket-path={}", dir.path("e.sock").display()),
            format!("--blk-file={}", path.display()),
        ]);
        assert_eq!(code, 1);
        assert!(text.contains("in use by process"), "{text}");
        driver.finish();
        daemon.terminate();
    }
}

/// A number of a block device's queue.
fn queue_limit(device: &LoopDevice, name: &str) -> u64 {
    let disk = device.0.trim_start_matches("/dev/");
    let path = format!("/sys/block/{disk}/queue/{name}");
    std::fs::read_to_string(path)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn guest_is_told_the_units_of_the_block_device() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", 8 * MIB);
    let sectors = ["--sector-size", "4096"];
    let Some(device) = LoopDevice::attach_with(&image, &sectors) else {
        return;
    };
    let socket = dir.path("d.sock");
    let daemon = Daemon::serve(&socket, Path::new(&device.0), &[]);
    let mut driver = FakeDriver::connect(&socket, Setup::default());
    let config = driver.frontend.get_config(0, 60);
    let number = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(number(20), 4096, "block size");
    let physical = queue_limit(&device, "physical_block_size");
    assert_eq!(4096 << config[24], physical);
    let min_io = u16::from_le_bytes([config[26], config[27]]);
    assert_eq!(
        u64::from(min_io) * 4096,
        queue_limit(&device, "minimum_io_size")
    );
    let opt_io = u64::from(number(28)) * 4096;
    assert_eq!(opt_io, queue_limit(&device, "optimal_io_size"));
    let unit = queue_limit(&device, "discard_granularity");
    assert_eq!(u64::from(number(44)) * 512, unit, "discard alignment");
    assert!(driver.has(13), "VIRTIO_BLK_F_DISCARD");
    driver.finish();
    daemon.terminate();
}

#[test]
fn medium_without_discards_offers_none_and_writes_its_zeros() {
    let dir = TempDir::new();
    let at = dir.path("small");
    std::fs::create_dir(&at).unwrap();
    let at = at.display();
    // A ramfs cannot punch holes.
    let script = format!(
        "mount -t ramfs none {at} && truncate -s 8M {at}/disk && losetup --find --show {at}/disk"
    );
    let Some(device) = in_namespace("-m", &script).map(LoopDevice) else {
        return;
    };
    assert_eq!(queue_limit(&device, "discard_max_bytes"), 0);
    for cache in ["none", "writeback"] {
        let socket = dir.path("d.sock");
        let flag = format!("--cache={cache}");
        let daemon = Daemon::serve(&socket, Path::new(&device.0), &[&flag]);
        let mut driver = FakeDriver::connect(&socket, Setup::default());
        assert!(!driver.has(13), "VIRTIO_BLK_F_DISCARD");
        assert!(driver.has(14), "VIRTIO_BLK_F_WRITE_ZEROES");
        for unmap in [0u32, 1] {
            for n in 0..40 {
                write_and_read(&mut driver, n * 8, 7);
            }
            let range = [
                &8u64.to_le_bytes()[..],
                &304u32.to_le_bytes(),
                &unmap.to_le_bytes(),
            ];
            assert_eq!(
                request(&mut driver, 13, 0, &range.concat(), 0).0,
                0,
                "{cache}"
            );
            let (status, data) = request(&mut driver, 0, 0, &[], 160 << 10);
            assert_eq!(status, 0);
            assert!(data[..4096] == [7; 4096] && data[156 << 10..] == [7; 4096]);
            assert!(data[4096..156 << 10].iter().all(|byte| *byte == 0));
        }
        // A driver that asks nevertheless.
        let range = [&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(request(&mut driver, 11, 0, &range, 0).0, 2, "UNSUPP");
        driver.finish();
        daemon.terminate();
    }
}
