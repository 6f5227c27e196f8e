//! Stories and their checks: running, reporting, cleaning up.
//!
//! ```text
//!   run(stories, options)
//!     worker 1..jobs ── takes the next story ──▶ thread "story": own namespace, own directory
//!                                                   context.step("…")        what it is doing
//!                                                   context.check("…", || …) one reported line
//! ```
//!
//! A check that fails is reported at once, with the step it was in and the end of every log of its story.
//! The story goes on with its other checks, unless the machine itself is gone or silent
//! ([`crate::wait::Broken`]): then the rest is reported as not reached.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::{sys, wait};

/// Lines of each log that a failure shows.
const LOG_LINES: usize = 30;

/// Where a story can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// Needs a KVM that runs ordinary guests.
    Guest,
    /// Needs no KVM.
    Client,
}

/// One machine and what is asked of it.
#[derive(Debug, Clone, Copy)]
pub struct Story {
    /// Name, also of its directory.
    pub name: &'static str,
    /// Where it can run.
    pub tier: Tier,
    /// Runs only with `--full`.
    pub long: bool,
    /// Names of all checks that it makes.
    pub checks: &'static [&'static str],
    /// The story.
    pub run: fn(&Context) -> Result<()>,
}

/// Settings of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Kernels, initramfs and images, as tests/lab/assets makes them.
    pub assets: PathBuf,
    /// The programs under test.
    pub bin: PathBuf,
    /// Where logs go, one directory a story.
    pub out: PathBuf,
    /// Stories at a time.
    pub jobs: usize,
}

impl Options {
    /// Makes `out` where it is not there, and takes all three by their absolute paths.
    ///
    /// # Errors
    /// One of them is not there, or `out` cannot be made.
    pub fn of_folders(assets: &Path, bin: &Path, out: &Path, jobs: usize) -> Result<Self> {
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        let absolute = |path: &Path| {
            path.canonicalize()
                .with_context(|| format!("no such folder: {}", path.display()))
        };
        Ok(Self {
            assets: absolute(assets)?,
            bin: absolute(bin)?,
            out: absolute(out)?,
            jobs,
        })
    }
}

/// How many checks ended how.
#[derive(Debug, Default)]
pub struct Totals {
    passed: AtomicUsize,
    failed: AtomicUsize,
    skipped: AtomicUsize,
}

impl Totals {
    /// Whether no check failed.
    #[must_use]
    pub fn all_well(&self) -> bool {
        self.failed.load(Ordering::Relaxed) == 0
    }

    /// `N passed, N failed, N skipped`.
    #[must_use]
    pub fn line(&self) -> String {
        let [passed, failed, skipped] =
            [&self.passed, &self.failed, &self.skipped].map(|count| count.load(Ordering::Relaxed));
        format!("{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// What a story works with. Lives on the story's thread.
#[derive(Debug)]
pub struct Context {
    options: Options,
    logs: PathBuf,
    scratch: Scratch,
    progress: RefCell<Progress>,
    quiet: bool,
}

#[derive(Debug)]
struct Progress {
    step: String,
    since: Instant,
    reported: Vec<&'static str>,
    lines: Vec<Line>,
}

/// How one check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Passed,
    Failed,
    Skipped,
}

impl Context {
    /// A context outside [`run`], for a program that is one story; reports nothing by itself.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn alone(options: &Options) -> Result<Self> {
        sys::unshare_network().context("a network namespace of its own (needs root)")?;
        crate::process::run("ip", &["link", "set", "lo", "up"])?;
        let mut context = Self::new("", options)?;
        context.quiet = true;
        Ok(context)
    }

    fn new(story: &str, options: &Options) -> Result<Self> {
        let logs = options.out.join(story);
        if !story.is_empty() && logs.exists() {
            fs::remove_dir_all(&logs)?;
        }
        fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        Ok(Self {
            options: options.clone(),
            logs,
            scratch: Scratch::new()?,
            progress: RefCell::new(Progress {
                step: "start".to_owned(),
                since: Instant::now(),
                reported: Vec::new(),
                lines: Vec::new(),
            }),
            quiet: false,
        })
    }

    /// A program under test.
    #[must_use]
    pub fn bin(&self, name: &str) -> PathBuf {
        self.options.bin.join(name)
    }

    /// A kernel, initramfs or image.
    #[must_use]
    pub fn asset(&self, name: &str) -> PathBuf {
        self.options.assets.join(name)
    }

    /// A path for a log, which stays after the run.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// A path for a socket or image, which goes with the story.
    #[must_use]
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.0.join(name)
    }

    /// Says what the story does next; a failure names it.
    pub fn step(&self, what: impl Into<String>) {
        self.progress.borrow_mut().step = what.into();
    }

    /// What the story was doing.
    #[must_use]
    pub fn current_step(&self) -> String {
        self.progress.borrow().step.clone()
    }

    /// Asks one question. Its time counts from the end of the check before.
    ///
    /// # Errors
    /// Only when the story cannot go on.
    pub fn check(&self, name: &'static str, question: impl FnOnce() -> Result<()>) -> Result<()> {
        self.step(name);
        match question() {
            Ok(()) => {
                self.report(name, Line::Passed, "");
                Ok(())
            }
            Err(error) if wait::is_broken(&error) => Err(error),
            Err(error) => {
                self.report(name, Line::Failed, &format!("{error:#}"));
                Ok(())
            }
        }
    }

    /// Reports a check that makes no sense here.
    pub fn skip(&self, name: &'static str, reason: &str) {
        self.report(name, Line::Skipped, reason);
    }

    fn report(&self, name: &'static str, line: Line, reason: &str) {
        let mut progress = self.progress.borrow_mut();
        let took = progress.since.elapsed().as_secs_f64();
        progress.since = Instant::now();
        progress.reported.push(name);
        progress.lines.push(line);
        if self.quiet {
            return;
        }
        match line {
            Line::Passed => println!("ok {name} {took:.1}s"),
            Line::Skipped => println!("skipped {name}: {reason}"),
            Line::Failed => {
                let step = &progress.step;
                let place = if step == name {
                    String::new()
                } else {
                    format!(" (while: {step})")
                };
                let logs = log_tails(&self.logs);
                println!("FAILED {name} {took:.1}s: {reason}{place}\n{logs}");
            }
        }
    }

    /// Reports every check that the story did not come to, and an end that no check accounts for.
    fn close(&self, story: &Story, end: Result<()>) {
        let missing: Vec<_> = {
            let progress = self.progress.borrow();
            story
                .checks
                .iter()
                .filter(|name| !progress.reported.contains(name))
                .copied()
                .collect()
        };
        let (first, rest) = match (missing.split_first(), &end) {
            (Some((first, rest)), _) => (*first, rest),
            (None, Ok(())) => return,
            (None, Err(_)) => (story.name, &[][..]),
        };
        let reason = match end {
            Ok(()) => "the story ended without it".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        self.report(first, Line::Failed, &reason);
        for name in rest {
            println!("FAILED {name} 0.0s: not reached after {first}");
            self.progress.borrow_mut().lines.push(Line::Failed);
        }
    }

    /// The end of each log so far, for a failure's report.
    #[must_use]
    pub fn log_tails(&self) -> String {
        log_tails(&self.logs)
    }
}

/// The last lines of every log in a directory.
fn log_tails(directory: &Path) -> String {
    let mut text = String::new();
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths
        .iter()
        .filter(|path| path.extension().is_some_and(|ext| ext == "log"))
    {
        let content = fs::read(path).unwrap_or_default();
        let content = String::from_utf8_lossy(&content);
        let lines: Vec<_> = content.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
        // Writing into a string cannot fail.
        let _ = writeln!(
            text,
            "  | == {} (last {} lines)",
            path.display(),
            tail.len()
        );
        for line in tail {
            let _ = writeln!(text, "  | {}", line.trim_end());
        }
    }
    text
}

/// A directory that goes with its owner, and when a signal ends the run.
#[derive(Debug)]
struct Scratch(PathBuf);

/// Directories of the stories that run; protects only the list.
static SCRATCHES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

impl Scratch {
    fn new() -> Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Short: a unix socket's path has at most 107 bytes.
        let path = std::env::temp_dir().join(format!("berth-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        SCRATCHES
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(path.clone());
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A second failure would hide the first; the directory's name says whose it was.
        let _ = fs::remove_dir_all(&self.0);
        SCRATCHES
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|scratch| *scratch != self.0);
    }
}

/// Ends the program by SIGINT, SIGTERM or SIGHUP with nothing left behind. Call it before any thread starts.
///
/// # Errors
/// No thread can be made.
pub fn clean_up_on_signals() -> Result<()> {
    sys::block_ending_signals();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(|| {
            let signal = sys::wait_ending_signal();
            eprintln!("ended by signal {signal}: cleaning up");
            for scratch in SCRATCHES
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
            {
                let _ = fs::remove_dir_all(scratch);
            }
            // Children die with the threads that started them.
            std::process::exit(128 + signal);
        })?;
    Ok(())
}

/// Runs stories, `options.jobs` at a time.
///
/// # Errors
/// No thread can be made.
pub fn run(stories: &[Story], options: &Options) -> Result<Totals> {
    let totals = Totals::default();
    let queue: Mutex<VecDeque<&Story>> = Mutex::new(stories.iter().collect());
    let next = || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while let Some(story) = next() {
                    run_story(story, options, &totals);
                }
            });
        }
    });
    Ok(totals)
}

fn run_story(story: &Story, options: &Options, totals: &Totals) {
    let lines = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(format!("story-{}", story.name));
        match thread.spawn_scoped(scope, || tell(story, options)) {
            Ok(thread) => thread.join().unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    });
    let count = |wanted| lines.iter().filter(|line| **line == wanted).count();
    totals
        .passed
        .fetch_add(count(Line::Passed), Ordering::Relaxed);
    totals
        .skipped
        .fetch_add(count(Line::Skipped), Ordering::Relaxed);
    // A story that panicked or never started has failed in all its checks.
    let failed = if lines.is_empty() {
        story.checks.len()
    } else {
        count(Line::Failed)
    };
    if lines.is_empty() {
        println!(
            "FAILED {} 0.0s: the story did not run, see above",
            story.name
        );
    }
    totals.failed.fetch_add(failed, Ordering::Relaxed);
}

/// Body of a story's thread.
fn tell(story: &Story, options: &Options) -> Vec<Line> {
    let context = match Context::new(story.name, options) {
        Ok(context) => context,
        Err(error) => {
            println!("FAILED {} 0.0s: {error:#}", story.name);
            return vec![Line::Failed; story.checks.len()];
        }
    };
    let end = sys::unshare_network()
        .context("a network namespace of its own (needs root)")
        .and_then(|()| crate::process::run("ip", &["link", "set", "lo", "up"]))
        .and_then(|_| (story.run)(&context));
    context.close(story, end);
    context.progress.into_inner().lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempPath;

    fn context(name: &str) -> (Context, TempPath) {
        let out = TempPath::new(name);
        let options = Options {
            assets: PathBuf::new(),
            bin: PathBuf::new(),
            out: out.to_path_buf(),
            jobs: 1,
        };
        (Context::new("s", &options).expect("a context"), out)
    }

    fn story() -> Story {
        Story {
            name: "s",
            tier: Tier::Client,
            long: false,
            checks: &["a", "b", "c"],
            run: |_| Ok(()),
        }
    }

    #[test]
    fn a_failed_check_does_not_stop_the_story_but_a_dead_machine_does() {
        let (context, _out) = context("stop");
        context
            .check("a", || anyhow::bail!("wrong"))
            .expect("goes on");
        let gone = wait::Broken::Gone("dead".to_owned());
        let end = context.check("b", || Err(gone.into()));
        assert!(end.is_err());
        context.close(&story(), end);
        let lines = context.progress.borrow().lines.clone();
        assert_eq!(lines, [Line::Failed; 3]);
    }

    #[test]
    fn a_check_that_was_never_made_fails() {
        let (context, _out) = context("missing");
        context.check("a", || Ok(())).expect("passes");
        context.skip("b", "no reason");
        context.close(&story(), Ok(()));
        let lines = context.progress.borrow().lines.clone();
        assert_eq!(lines, [Line::Passed, Line::Skipped, Line::Failed]);
    }

    #[test]
    fn scratch_goes_with_its_context() {
        let (context, _out) = context("scratch");
        let path = context.scratch("x");
        fs::write(&path, b"x").expect("written");
        drop(context);
        assert!(!path.parent().expect("a directory").exists());
    }
}
