//! qemu-img and qemu-io on berth-blk without a guest: QEMU's block layer over libblkio's vhost-user driver.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::process::Process;
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::wait::seconds;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "qemu-img",
    tier: Tier::Client,
    long: false,
    checks: CHECKS,
    run: qemu_img,
}];

const CHECKS: &[&str] = &[
    "qemu_img.io_patterns_read_back",
    "qemu_img.convert_to_the_disk_and_back",
    "qemu_img.bench_at_depth",
];

const SIZE: u64 = 64 << 20;
const MIB: usize = 1 << 20;
/// QEMU's own driver, where it has one.
const MODULE: &str = "/usr/lib/x86_64-linux-gnu/qemu/block-blkio.so";

fn qemu_img(context: &Context) -> Result<()> {
    if let Ok(why) = std::fs::read_to_string(context.asset("qemu-blkio/absent")) {
        CHECKS.iter().for_each(|check| context.skip(check, &why));
        return Ok(());
    }
    let disk = context.scratch("disk.img");
    image::sparse(&disk, SIZE)?;
    let settings = BlkSettings {
        queues: 2,
        more: &["--cache=none"],
        ..Default::default()
    };
    let daemon = Daemon::blk(context, "blk", &disk, settings)?;
    let options = format!(
        "driver=virtio-blk-vhost-user,path={},cache.direct=on",
        daemon.socket().display()
    );
    context.check("qemu_img.io_patterns_read_back", || {
        patterns(context, &options, &disk)
    })?;
    context.check("qemu_img.convert_to_the_disk_and_back", || {
        convert(context, &options, &disk)
    })?;
    context.check("qemu_img.bench_at_depth", || {
        bench(context, &daemon, &options)
    })
}

/// Runs one of QEMU's tools to its end; what it says.
fn tool(context: &Context, name: &str, args: &[&str]) -> Result<String> {
    let mut command = if Path::new(MODULE).exists() {
        Command::new(name)
    } else {
        let folder = context.asset("qemu-blkio");
        let mut command = Command::new(folder.join("lib/ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", folder.join("modules"))
            .arg("--library-path")
            .arg(folder.join("lib"))
            .arg(folder.join(name));
        command
    };
    command.args(args);
    let mut process = Process::spawn(name, command, &context.log(name))?;
    process.wait_success(seconds(60))?;
    process.output()
}

/// qemu-io writes, zeroes and discards, and reads patterns back; the image holds them too.
fn patterns(context: &Context, options: &str, disk: &Path) -> Result<()> {
    let commands = [
        "write -P 0x5a 1M 256k",
        "aio_write -P 0x77 4M 64k",
        "aio_write -P 0x78 5M 512",
        "aio_flush",
        "flush",
        "read -P 0x5a 1M 256k",
        "read -P 0x77 4M 64k",
        "read -P 0x78 5M 512",
        "write -z -u 1M 128k",
        "read -P 0 1M 128k",
        "read -P 0x5a 1152k 128k",
        "discard 4M 64k",
    ];
    let mut args = vec!["--image-opts", options];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    let said = tool(context, "qemu-io", &args)?;
    ensure!(
        !said.contains("failed") && !said.contains("error"),
        "qemu-io: {said}"
    );
    let bytes = std::fs::read(disk)?;
    let wrong = |range: std::ops::Range<usize>, byte| bytes[range].iter().any(|b| *b != byte);
    ensure!(!wrong(MIB..MIB + MIB / 8, 0), "zeroes are not in the image");
    ensure!(
        !wrong(MIB + MIB / 8..MIB + MIB / 4, 0x5a),
        "a write is not in the image"
    );
    ensure!(
        !wrong(5 * MIB..5 * MIB + 512, 0x78),
        "a sector is not in the image"
    );
    Ok(())
}

/// An image copied to the disk, and from it, is the same.
fn convert(context: &Context, options: &str, disk: &Path) -> Result<()> {
    let (original, back) = (context.scratch("original"), context.scratch("back"));
    image::random(&original, SIZE, 33)?;
    let (from, to) = (path(&original)?, path(&back)?);
    tool(
        context,
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "--target-image-opts",
            from,
            options,
        ],
    )?;
    ensure!(
        image::same(&original, disk)?,
        "the disk is not what was copied to it"
    );
    tool(
        context,
        "qemu-img",
        &["convert", "--image-opts", "-O", "raw", options, to],
    )?;
    ensure!(
        image::same(&original, &back)?,
        "the copy is not what the disk holds"
    );
    Ok(())
}

/// 20 000 writes and reads, 32 at a time: the daemon counts as many.
fn bench(context: &Context, daemon: &Daemon, options: &str) -> Result<()> {
    let before = daemon.total("berth_requests_total")?;
    let common = [
        "bench",
        "-c",
        "20000",
        "-d",
        "32",
        "-s",
        "4096",
        "--image-opts",
        options,
    ];
    tool(context, "qemu-img", &[&common[..], &["-w"]].concat())?;
    tool(context, "qemu-img", &common)?;
    let requests = daemon.total("berth_requests_total")? - before;
    let errors = daemon.total("berth_errors_total")?;
    ensure!(
        requests >= 40_000 && errors == 0,
        "the daemon counts {requests} requests, {errors} errors"
    );
    Ok(())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
