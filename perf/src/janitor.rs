//! Clears up whatever becomes of us.
//!
//! A child of ours with a session of its own is told of everything that must not outlive the run. When its pipe
//! closes, because we are through or because we were killed, it removes all of it, last first. So there is one way
//! of clearing up, and every run takes it. What is gone already when its turn comes is no failure.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::proc;
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
        command.stdout(Stdio::null());
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

    /// A process to be killed; nobody else's that has its number by then.
    pub fn process(&mut self, pid: u32) -> Result<()> {
        let began = proc::start_time(pid)?;
        self.tell(&format!("process {pid} {began}"))
    }

    /// A network interface to be removed (in the network namespace that we were started in).
    pub fn tap(&mut self, name: &str) -> Result<()> {
        self.tell(&format!("tap {name}"))
    }

    /// A mount to be undone.
    pub fn mount(&mut self, path: &Path) -> Result<()> {
        self.tell(&format!("mount {}", path.display()))
    }

    /// An instance of the kernel's trace to be removed; gone is fine.
    pub fn trace(&mut self, path: &Path) -> Result<()> {
        self.tell(&format!("trace {}", path.display()))
    }

    /// A control group to be removed, its processes killed.
    pub fn cgroup(&mut self, path: &Path) -> Result<()> {
        self.tell(&format!("cgroup {}", path.display()))
    }

    /// A file of /proc or /sys that gets the value back that it has now.
    pub fn setting(&mut self, path: &Path) -> Result<()> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        // "always [madvise] never": the one in brackets is set.
        let chosen = text.split_whitespace().find_map(|word| {
            let word = word.strip_prefix('[')?;
            word.strip_suffix(']')
        });
        let value = chosen.unwrap_or(text.trim());
        self.tell(&format!("setting {} {value}", path.display()))
    }

    /// Clears up now, and says what could not be removed.
    pub fn finish(&mut self) -> Result<()> {
        self.pipe = None;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("not everything could be removed (see above)");
        }
        Ok(())
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.pipe = None;
        let _ = self.child.wait();
    }
}

/// The janitor itself: reads what there is until nobody can write any more.
pub fn run() -> Result<()> {
    let things: Vec<String> = std::io::stdin().lock().lines().collect::<Result<_, _>>()?;
    let mut failed = false;
    for thing in things.iter().rev() {
        if let Err(error) = remove(thing) {
            eprintln!("berth-perf: cannot clear up {thing}: {error:#}");
            failed = true;
        }
    }
    if failed {
        bail!("something was left");
    }
    Ok(())
}

fn remove(thing: &str) -> Result<()> {
    let (kind, rest) = thing.split_once(' ').unwrap_or((thing, ""));
    match kind {
        "directory" => gone_is_fine(fs::remove_dir_all(PathBuf::from(rest))),
        "zram" => insist(|| fs::write("/sys/class/zram-control/hot_remove", rest)),
        "process" => kill(rest),
        "tap" => tap(rest),
        "mount" => insist(|| sys::unmount(Path::new(rest))),
        "cgroup" => cgroup(Path::new(rest)),
        "trace" => gone_is_fine(fs::remove_dir(rest)),
        "setting" => {
            let (path, value) = rest.split_once(' ').context("a setting without a value")?;
            Ok(fs::write(path, value)?)
        }
        _ => bail!("unknown kind"),
    }
}

fn gone_is_fine(result: std::io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => Ok(result?),
    }
}

/// Busy until the last user has gone and its last request has ended.
fn insist(mut remove: impl FnMut() -> std::io::Result<()>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match remove() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn kill(rest: &str) -> Result<()> {
    let (pid, began) = rest
        .split_once(' ')
        .context("a process without its start")?;
    let pid: u32 = pid.parse()?;
    let there = || proc::start_time(pid).is_ok_and(|start| start.to_string() == began);
    if !there() {
        return Ok(());
    }
    sys::signal(pid, libc::SIGKILL);
    let deadline = Instant::now() + PATIENCE;
    while there() {
        if Instant::now() >= deadline {
            bail!("it does not end");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn tap(name: &str) -> Result<()> {
    if !Path::new("/sys/class/net").join(name).exists() {
        return Ok(());
    }
    let status = Command::new("ip").args(["link", "delete", name]).status();
    match status.context("no ip on the PATH")?.success() {
        true => Ok(()),
        false => bail!("ip link delete failed"),
    }
}

fn cgroup(path: &Path) -> Result<()> {
    // An older kernel has no kill; its processes are ours and have gone.
    let _ = fs::write(path.join("cgroup.kill"), "1");
    insist(|| match fs::remove_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    })
}
