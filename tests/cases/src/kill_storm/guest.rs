//! The storm under a guest: `berth-guest-load` works on an ext4 behind the daemon that is killed.
//!
//! The program is the host's, linked dynamically; it goes into the image together with its libraries and the
//! loader, so that the guest needs none.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests_framework::console::Console;
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::process::run;
use berth_tests_framework::story::Context;
use berth_tests_framework::vmm::VmBuilder;
use berth_tests_framework::wait::{seconds, until};

use crate::blocks::Random;

const PROGRAM: &str = "berth-guest-load";
/// Where it is in an image.
const FOLDER: &str = "load";

/// Puts the program below `contents`, which becomes an image.
pub(crate) fn add_program(context: &Context, contents: &Path) -> Result<()> {
    let folder = contents.join(FOLDER);
    fs::create_dir_all(&folder)?;
    let program = context.bin(PROGRAM);
    fs::copy(&program, folder.join(PROGRAM)).with_context(|| program.display().to_string())?;
    let program = program.to_str().context("a path that is not UTF-8")?;
    let mut loader = false;
    // Lines such as 'libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)' and '/lib64/ld-linux… (0x…)'.
    for line in run("ldd", &[program])?.lines() {
        let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            continue;
        };
        let name = Path::new(library)
            .file_name()
            .context("a library without a name")?;
        let is_loader = name.to_str().is_some_and(|name| name.starts_with("ld-"));
        loader |= is_loader;
        let target = if is_loader { "loader".as_ref() } else { name };
        fs::copy(library, folder.join(target)).with_context(|| library.to_owned())?;
    }
    ensure!(loader, "ldd names no loader for {program}");
    Ok(())
}

/// Starts the load in a guest: the program of the file system mounted at `programs`, on the one at `place`.
pub(crate) fn start_load(console: &mut Console, programs: &str, place: &str) -> Result<()> {
    console.sh(&format!(
        "rm -f /tmp/enough /tmp/load.code
         (cd {programs}/{FOLDER} && ./loader --library-path . ./{PROGRAM} --dir {place} --stop /tmp/enough
          echo $? >/tmp/load.code) >/tmp/load.log 2>&1 &"
    ))?;
    Ok(())
}

/// Kills the daemon `kills` times, each after some more requests, and starts it again.
pub(crate) fn kill_under_load(
    console: &mut Console,
    daemon: &mut Daemon,
    kills: u32,
) -> Result<()> {
    let mut random = Random::new(u64::from(kills));
    for kill in 0..kills {
        let count = 20 + random.below(200);
        let what = format!("{count} requests before kill {kill}");
        let worked = until(&what, seconds(60), || {
            Ok((daemon.total("berth_requests_total")? >= count).then_some(()))
        });
        if let Err(error) = worked {
            let log = console.sh("cat /tmp/load.log; dmesg | tail -n 20");
            return Err(error.context(log.unwrap_or_default()));
        }
        daemon.kill();
        daemon.start_again()?;
    }
    Ok(())
}

/// Ends it: every byte was right, and the guest's kernel saw no error.
pub(crate) fn finish_load(console: &mut Console) -> Result<()> {
    let wait = "touch /tmp/enough
        until [ -s /tmp/load.code ]; do usleep 50000; done; cat /tmp/load.code /tmp/load.log";
    let end = console.sh_within(wait, seconds(120))?;
    let complaints = console.sh("dmesg | grep -iE 'I/O error|ext4-fs error|hung task' || true")?;
    if !end.starts_with("0\n") || !complaints.is_empty() {
        bail!("in the guest: {end}\n{complaints}");
    }
    Ok(())
}

/// A guest under berth-vmm on ext4 with a journal, whose disk's daemon dies `kills` times.
pub(super) fn under_berth_vmm(context: &Context, check: &'static str, kills: u32) -> Result<()> {
    let (image, contents) = (context.scratch("disk.img"), context.scratch("contents"));
    add_program(context, &contents)?;
    image::ext4(&image, 256 << 20, &contents)?;
    let settings = BlkSettings {
        queues: 2,
        more: &["--cache=none"],
        ..Default::default()
    };
    let mut daemon = Daemon::blk(context, "blk", &image, settings)?;
    context.step("boot");
    let mut vm = VmBuilder::new(context, "vmm")
        .cpus(2)
        .disk(daemon.socket(), ",num_queues=2")
        .boot(context)?;
    context.check(check, || {
        vm.sh("mount -t ext4 -o discard /dev/vda /mnt")?;
        start_load(&mut vm.console, "/mnt", "/mnt")?;
        kill_under_load(&mut vm.console, &mut daemon, kills)?;
        finish_load(&mut vm.console)?;
        vm.sh("umount /mnt")?;
        vm.power_off()?;
        image::require_clean(&image)
    })
}
