//! Bad input: one clear line, exit code 1 or 2, and nothing lost.
//!
//! Each attempt is a program started with something wrong. It must end by itself within seconds; the last
//! line on standard error must name what was wrong; no attempt may panic.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::process::{Process, describe, run};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::wait::seconds;
use berth_tests_framework::{image, net};

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "bad-input",
    tier: Tier::Client,
    long: false,
    checks: &[
        "bad.flags_and_keys",
        "bad.cpus_and_memory",
        "bad.kernels",
        "bad.initramfs",
        "bad.sockets",
        "bad.images",
        "bad.taps",
        "bad.kvm",
    ],
    run: bad_input,
}];

/// Wrong usage, and what cannot be done.
const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// One attempt: its arguments, the exit codes it may have, and words of its last line.
struct Attempt<'a> {
    args: Vec<String>,
    codes: &'a [i32],
    words: &'a [&'a str],
}

fn attempt<'a>(args: &[&str], codes: &'a [i32], words: &'a [&'a str]) -> Attempt<'a> {
    Attempt {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        codes,
        words,
    }
}

/// Makes one attempt with `program`.
fn fails(context: &Context, program: &str, attempt: &Attempt<'_>) -> Result<()> {
    let mut command = Command::new(context.bin(program));
    command.args(&attempt.args);
    fails_as(
        context,
        command,
        &format!("{program} {}", attempt.args.join(" ")),
        attempt,
    )
}

fn fails_as(context: &Context, command: Command, what: &str, attempt: &Attempt<'_>) -> Result<()> {
    let log = context.log("attempt");
    // The log is added to; only this attempt's words count.
    let _ = fs::remove_file(&log);
    context.step(what);
    let mut process = Process::spawn("the attempt", command, &log)?;
    let status = process.wait(seconds(20))?;
    let output = process.output()?;
    let line = output.lines().last().unwrap_or_default();
    let code = status
        .code()
        .with_context(|| format!("{what}: {}", describe(status)))?;
    ensure!(
        attempt.codes.contains(&code),
        "{what}: exit code {code}: {line}"
    );
    ensure!(!output.contains("panicked"), "{what}: {output}");
    for word in attempt.words {
        let found = line.to_lowercase().contains(&word.to_lowercase());
        ensure!(found, "{what}: no '{word}' in its last line: {line:?}");
    }
    Ok(())
}

fn bad_input(context: &Context) -> Result<()> {
    context.check("bad.flags_and_keys", || alone(flags_and_keys(context)))?;
    context.check("bad.cpus_and_memory", || alone(cpus_and_memory(context)))?;
    context.check("bad.kernels", || alone(kernels(context)))?;
    context.check("bad.initramfs", || alone(initramfs(context)))?;
    context.check("bad.sockets", || alone(sockets(context)))?;
    context.check("bad.images", || alone(images(context)))?;
    context.check("bad.taps", || alone(taps(context)))?;
    context.check("bad.kvm", || alone(kvm(context)))
}

/// A failure here says nothing about the questions after it, even where a daemon did not start.
fn alone(result: Result<()>) -> Result<()> {
    result.map_err(|error| anyhow::anyhow!("{error:#}"))
}

fn kernel(context: &Context) -> String {
    context.asset("vmlinux").display().to_string()
}

fn flags_and_keys(context: &Context) -> Result<()> {
    let kernel = kernel(context);
    for (args, words) in [
        (&["--kernell", &kernel][..], &["--kernel"][..]),
        (&["--kernel", &kernel, "--cpus", "bot=2"], &["bot", "boot"]),
        (
            &["--kernel", &kernel, "--memory", "size=1G,hugepage=on"],
            &["hugepage", "hugepages"],
        ),
        (
            &["--kernel", &kernel, "--disk", "path=/x,direkt=on"],
            &["direkt", "direct"],
        ),
        (
            &["--kernel", &kernel, "--net", "vhost_user=on,soket=/x"],
            &["soket", "socket"],
        ),
        (
            &[
                "--kernel",
                &kernel,
                "--net",
                "vhost_user=on,socket=/x,mac=no",
            ],
            &["mac", "no"],
        ),
        (&["--kernel", &kernel, "--serial", "uart"], &["uart"]),
        (&[], &["--kernel"]),
    ] {
        fails(context, "berth-vmm", &attempt(args, &[USAGE], words))?;
    }
    let daemon = ["--socket-path=/x", "--blk-fil=/x"];
    fails(
        context,
        "berth-blk",
        &attempt(&daemon, &[USAGE], &["--blk-file"]),
    )?;
    let daemon = ["--socket-path=/x", "--tapp=x"];
    fails(
        context,
        "berth-net",
        &attempt(&daemon, &[USAGE], &["--tap"]),
    )
}

fn cpus_and_memory(context: &Context) -> Result<()> {
    let kernel = kernel(context);
    for (flag, value) in [
        ("--cpus", "boot=0"),
        ("--cpus", "boot=256"),
        ("--cpus", "boot=many"),
        ("--memory", "size=0"),
        ("--memory", "size=1"),
        ("--memory", "size=512000001"),
        ("--memory", "size=99999999G"),
        ("--memory", "size=-1G"),
    ] {
        let args = ["--kernel", &kernel, flag, value];
        let key = value.split('=').next().unwrap_or(value);
        fails(
            context,
            "berth-vmm",
            &attempt(&args, &[FAILURE, USAGE], &[key]),
        )?;
    }
    Ok(())
}

fn kernels(context: &Context) -> Result<()> {
    let path = |name: &str| context.scratch(name).display().to_string();
    let vmlinux = fs::read(context.asset("vmlinux"))?;
    fs::write(path("truncated"), &vmlinux[..vmlinux.len() / 2])?;
    fs::write(path("short"), &vmlinux[..100])?;
    fs::write(path("empty"), b"")?;
    let mut foreign = vmlinux[..4096].to_vec();
    // e_machine of an ELF header: AArch64.
    foreign[18] = 183;
    fs::write(path("foreign"), foreign)?;
    let bzimage = fs::read(context.asset("vmlinuz"))?;
    fs::write(path("truncated-bzimage"), &bzimage[..bzimage.len() / 2])?;
    fs::write(path("text"), "#!/bin/sh\nexit 0\n".repeat(1000))?;
    let tail: &[&str] = &["--serial", "off"];
    for name in [
        "missing",
        "truncated",
        "short",
        "empty",
        "foreign",
        "truncated-bzimage",
        "text",
    ] {
        let file = path(name);
        let args = [&["--kernel", &file][..], tail].concat();
        fails(context, "berth-vmm", &attempt(&args, &[FAILURE], &[&file]))?;
    }
    let (vmlinux, directory) = (kernel(context), context.scratch(".").display().to_string());
    let args = [&["--kernel", &directory][..], tail].concat();
    fails(
        context,
        "berth-vmm",
        &attempt(&args, &[FAILURE], &[&directory]),
    )?;
    let args = [&["--kernel", &vmlinux, "--memory", "size=16M"][..], tail].concat();
    fails(
        context,
        "berth-vmm",
        &attempt(&args, &[FAILURE], &["memory"]),
    )
}

fn initramfs(context: &Context) -> Result<()> {
    let kernel = kernel(context);
    let (missing, big) = (context.scratch("no.cpio"), context.scratch("big.cpio"));
    image::sparse(&big, 1 << 30)?;
    for (file, word) in [(missing, "no.cpio"), (big, "memory")] {
        let file = file.display().to_string();
        let args = [
            "--kernel",
            &kernel,
            "--initramfs",
            &file,
            "--memory",
            "size=256M",
            "--serial",
            "off",
        ];
        fails(context, "berth-vmm", &attempt(&args, &[FAILURE], &[word]))?;
    }
    Ok(())
}

/// A path that is a file is kept; a socket that someone listens on is kept too.
fn sockets(context: &Context) -> Result<()> {
    let (file, taken) = (context.scratch("a-file"), context.scratch("taken.sock"));
    fs::write(&file, b"precious")?;
    let listener = UnixListener::bind(&taken)?;
    let disk = context.scratch("sockets.img");
    image::sparse(&disk, 1 << 20)?;
    let blk_file = format!("--blk-file={}", disk.display());
    let kernel = kernel(context);
    for (path, name) in [(&file, "a-file"), (&taken, "taken.sock")] {
        let path = path.display().to_string();
        let socket = format!("--socket-path={path}");
        fails(
            context,
            "berth-blk",
            &attempt(&[&socket, &blk_file], &[FAILURE], &[name]),
        )?;
        let args = [&socket, "--tap=berth0", "--create"];
        fails(context, "berth-net", &attempt(&args, &[FAILURE], &[name]))?;
        let api = format!("path={path}");
        let args = ["--kernel", &kernel, "--serial", "off", "--api-socket", &api];
        fails(context, "berth-vmm", &attempt(&args, &[FAILURE], &[name]))?;
        let serial = format!("socket={path}");
        let args = ["--kernel", &kernel, "--serial", &serial];
        fails(context, "berth-vmm", &attempt(&args, &[FAILURE], &[name]))?;
    }
    ensure!(fs::read(&file)? == b"precious", "the file was changed");
    std::os::unix::net::UnixStream::connect(&taken).context("the socket in use is gone")?;
    drop(listener);
    let unreachable = format!("--socket-path={}", context.scratch("no/such/dir").display());
    fails(
        context,
        "berth-blk",
        &attempt(&[&unreachable, &blk_file], &[FAILURE], &["no/such/dir"]),
    )
}

fn images(context: &Context) -> Result<()> {
    let (missing, odd) = (context.scratch("missing.img"), context.scratch("odd.img"));
    image::sparse(&odd, 1000)?;
    let directory = context.scratch("a-directory");
    fs::create_dir(&directory)?;
    let locked = context.scratch("locked.img");
    image::sparse(&locked, 1 << 20)?;
    let holder = Daemon::blk(context, "holder", &locked, BlkSettings::default())?;
    let socket = format!("--socket-path={}", context.scratch("image.sock").display());
    let try_image = |path: &Path, words: &[&str]| {
        let file = format!("--blk-file={}", path.display());
        fails(
            context,
            "berth-blk",
            &attempt(&[&socket, &file], &[FAILURE], words),
        )
    };
    try_image(&missing, &["missing.img"])?;
    try_image(&odd, &["odd.img", "512"])?;
    try_image(&directory, &["a-directory"])?;
    try_image(&locked, &["locked.img", "lock"])?;
    ensure!(holder.process().is_running(), "the first writer ended");
    Ok(())
}

fn taps(context: &Context) -> Result<()> {
    let socket = format!("--socket-path={}", context.scratch("tap.sock").display());
    let try_tap = |name: &str, words: &[&str]| {
        let tap = format!("--tap={name}");
        fails(
            context,
            "berth-net",
            &attempt(&[&socket, &tap], &[FAILURE, USAGE], words),
        )
    };
    try_tap("no-such-tap", &["no-such-tap"])?;
    try_tap(
        "a-name-that-is-too-long-for-linux",
        &["a-name-that-is-too-long"],
    )?;
    try_tap("lo", &["lo"])?;
    net::make_tap("taken0")?;
    let holder = Daemon::net(context, "tap-holder", "taken0", &[])?;
    try_tap("taken0", &["taken0"])?;
    ensure!(holder.process().is_running(), "the tap's first user ended");
    Ok(())
}

/// A KVM that is not there, is no KVM, or is somebody else's: in a mount namespace of its own.
fn kvm(context: &Context) -> Result<()> {
    let kernel = kernel(context);
    let vmm = context.bin("berth-vmm").display().to_string();
    for (what, prepare) in [
        ("no /dev/kvm", "mount -t tmpfs none /dev"),
        (
            "a /dev/kvm that is none",
            "mount -t tmpfs none /dev && touch /dev/kvm",
        ),
    ] {
        let script = format!("{prepare} && exec {vmm} --kernel {kernel} --serial null 2>&1");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        fails_as(
            context,
            command,
            what,
            &attempt(&[], &[FAILURE], &["/dev/kvm"]),
        )?;
    }
    if Path::new("/dev/kvm").exists() {
        // Somewhere that nobody else may be kept out of.
        let open = context.scratch("open");
        fs::create_dir(&open)?;
        run(
            "chmod",
            &["755", &context.scratch(".").display().to_string()],
        )?;
        let copy = open.join("berth-vmm");
        fs::copy(&vmm, &copy)?;
        fs::copy(&kernel, open.join("vmlinux"))?;
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command
            .arg(&copy)
            .arg("--kernel")
            .arg(open.join("vmlinux"))
            .args(["--serial", "null"]);
        let what = "no right to /dev/kvm";
        fails_as(
            context,
            command,
            what,
            &attempt(&[], &[FAILURE], &["/dev/kvm"]),
        )?;
    }
    Ok(())
}
