//! Clears up whatever becomes of us.
//!
//! A child of ours with a session of its own is told of everything that must not outlive the run. When
//! its pipe closes, because we are through or because we were killed, it removes all of it, last
//! first. So there is one way of clearing up, and every run takes it.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sys;

/// The hidden subcommand that is the janitor.
pub const SUBCOMMAND: &str = "janitor";
/// How long a device may stay busy after its last user has been killed.
const PATIENCE: Duration = Duration::from_secs(15);

/// Our end.
pub struct Janitor {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Janitor {
    /// Starts one.
    pub fn start() -> Result<Janitor> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).stdin(Stdio::piped());
        sys::own_session(&mut command);
        let mut child = command.spawn().context("cannot start the janitor")?;
        let pipe = child.stdin.take();
        Ok(Janitor { child, pipe })
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        let pipe = self.pipe.as_mut().context("the janitor has gone")?;
        writeln!(pipe, "{line}").context("the janitor has gone")
    }

    /// A directory to be removed with all it has.
    pub fn directory(&mut self, path: &Path) -> Result<()> {
        self.tell(&format!("directory {}", path.display()))
    }

    /// A zram device to be removed.
    pub fn zram(&mut self, number: u32) -> Result<()> {
        self.tell(&format!("zram {number}"))
    }

    /// Clears up now, and says what could not be removed.
    pub fn finish(mut self) -> Result<()> {
        self.pipe = None;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("not everything could be removed (see above)");
        }
        Ok(())
    }
}

/// The janitor itself: reads what there is until nobody can write any more.
pub fn run() -> Result<()> {
    let things: Vec<String> = std::io::stdin().lock().lines().collect::<Result<_, _>>()?;
    let mut failed = false;
    for thing in things.iter().rev() {
        if let Err(error) = remove(thing) {
            eprintln!("berth-perf: cannot remove {thing}: {error:#}");
            failed = true;
        }
    }
    if failed {
        bail!("something was left");
    }
    Ok(())
}

fn remove(thing: &str) -> Result<()> {
    match thing.split_once(' ') {
        Some(("directory", path)) => Ok(fs::remove_dir_all(PathBuf::from(path))?),
        Some(("zram", number)) => remove_zram(number),
        _ => bail!("unknown kind"),
    }
}

/// It is busy until the last daemon has gone and its last request has ended.
fn remove_zram(number: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match fs::write("/sys/class/zram-control/hot_remove", number) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}
