//! Memory of guests, written down: found, taken or made up.

pub(crate) mod made;
pub(crate) mod store;
pub mod take;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use self::store::Reader;
use self::take::TakeArgs;
use crate::context::{Context, source_tree};
use crate::interrupt;

/// In the source tree.
const FOLDER: &str = "target/memory-dumps";
/// Programs that a guest needs.
const PROGRAMS: [&str; 2] = ["berth-vmm", "berth-blk"];

/// The folder of a set with guests of this number and size, which is taken where it is not there: once a source tree.
pub(crate) fn obtain(context: &Context, guests: u64, mib: u64) -> Result<PathBuf> {
    let tree = source_tree().context(
        "dumps of guests' memory are taken with tests/lab/run of the source tree: run this in it",
    )?;
    let folder = tree.join(FOLDER);
    let is_it =
        |reader: &Reader| reader.set.bytes == mib << 20 && reader.set.guests.len() as u64 == guests;
    match Reader::open(&folder) {
        Ok(reader) if is_it(&reader) => return Ok(folder),
        _ => eprintln!(
            "taking the memory of {guests} guests of {mib} MiB: about a quarter of an hour, once; it stays in {}",
            folder.display()
        ),
    }
    let bin = &context.builds[0].folder;
    for program in PROGRAMS {
        ensure!(
            bin.join(program).is_file(),
            "no {}: build it with 'cargo build --release -p {program}'",
            bin.join(program).display()
        );
    }
    let place = Command::new(tree.join("tests/lab/where")).output()?;
    match String::from_utf8_lossy(&place.stdout).trim() {
        "host" => {
            let assets = tree.join("target/lab/assets");
            let args = TakeArgs {
                guests,
                mib,
                assets,
                bin: bin.clone(),
                out: folder.clone(),
            };
            take::run(&args)?;
        }
        _ => in_lab(&tree, bin, &folder, guests, mib)?,
    }
    let reader = Reader::open(&folder)?;
    ensure!(
        is_it(&reader),
        "{}: another set than wanted",
        folder.display()
    );
    Ok(folder)
}

fn in_lab(tree: &Path, bin: &Path, folder: &Path, guests: u64, mib: u64) -> Result<()> {
    let own = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(tree.join("tests/lab/run"));
    command.args(["--memory", "8192", "--out"]).arg(folder);
    let mut copy = |from: &Path, to: &str| {
        command
            .arg("--copy")
            .arg(format!("{}:{to}", from.display()));
    };
    for program in PROGRAMS {
        copy(&bin.join(program), &format!("bin/{program}"));
    }
    copy(&own, "bin/berth-perf");
    let disk = tree.join("target/lab/assets/demo-disk.raw");
    copy(&disk, "assets/demo-disk.raw");
    command.args(["--", "berth-perf", take::SUBCOMMAND]);
    command.args(["--guests", &guests.to_string(), "--mib", &mib.to_string()]);
    command.args(["--assets", "assets", "--bin", "bin", "--out", "out"]);
    // The disk is made with the other assets, before anything is copied.
    let assets = Command::new(tree.join("tests/lab/assets"))
        .arg("--quiet")
        .status()?;
    ensure!(assets.success(), "tests/lab/assets failed");
    let status = command.status().context("cannot run tests/lab/run")?;
    interrupt::check()?;
    if !status.success() {
        bail!("the guests' memory could not be taken in the lab: {status}");
    }
    Ok(())
}
