//! The daemon: sample, decide, act, tell. Once every interval, and at once when the kernel reports pressure.
//!
//! ```text
//!   signals (SIGHUP, SIGTERM) ─┐
//!   psi (memory pressure) ─────┼─▶ Event ─▶ main: Tuner ─▶ Published ─▶ control, metrics
//!   compare (hashes) ──────────┘
//! ```
//!
//! `main` is the only one that reads the host, talks to VMs' balloons and writes to the kernel. `Published` is behind a
//! lock that is held for copying only.
//!
//! The end: the scanner stands still, memory that was offered is withdrawn where there is room to take it apart
//! (`policy::farewell`), then the kernel's settings and balloons go back to what they were. What stays merged is in the notes, and so
//! is everything after a kill; with the scanner still, nothing more is merged.

mod serve;
mod watch;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::act::{self, Kernel, Saved};
use crate::config::{self, Config};
use crate::policy::{self, Action, Decision, History};
use crate::report::{self, Explained, Published, Since};
use crate::sample::{self, Roots, Run, Sample, Settings};
use crate::vms::{self, Directory, Hashes, Key, compare};

pub use serve::{Question, ask, control_path};

/// Shortest time between two steps, however often the kernel reports pressure.
const LEAST: Duration = Duration::from_millis(200);

/// What the daemon was started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Configuration file; without one all is as documented.
    pub config: Option<PathBuf>,
    /// What the command line says in its place.
    pub vms: Option<PathBuf>,
    /// The same of the folder of state and socket.
    pub run_dir: Option<PathBuf>,
    /// Say what would be done and do nothing.
    pub dry_run: bool,
    /// Serve metrics here.
    pub metrics_socket: Option<PathBuf>,
    /// Write every sample to this file, a line of JSON each.
    pub record: Option<PathBuf>,
}

/// Why the daemon ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// What it has to know of the host.
    #[error("this kernel does not merge pages (CONFIG_KSM), or /sys is not there")]
    NoKsm(#[source] sample::Error),
    /// Only root may.
    #[error("cannot write to {}: berth-tuner must be root, or use --dry-run", .0.display())]
    Rights(PathBuf),
    /// Its notes.
    #[error(transparent)]
    Saved(#[from] act::SavedError),
    /// Something of its own.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// What the main thread waits for.
pub(crate) enum Event {
    /// Told to end.
    End,
    /// Told to read the configuration again.
    Reload,
    /// Tasks wait for memory.
    Pressure,
    /// Hashes of a VM's pages.
    Hashed(Box<Hashes>),
}

/// Loads the configuration that these options mean.
pub fn load(options: &Options) -> Result<Config, config::Error> {
    let mut config = match &options.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    if let Some(vms) = &options.vms {
        config.general.vms.clone_from(vms);
    }
    if let Some(run_dir) = &options.run_dir {
        config.general.run_dir.clone_from(run_dir);
    }
    Ok(config)
}

/// Runs until SIGTERM or SIGINT.
pub fn run(options: Options) -> Result<(), Error> {
    let config = load(&options)?;
    let roots = Roots::host();
    let (sender, events) = channel();
    // Before anything is changed, so that no signal finds us unprepared.
    watch::signals(sender.clone()).map_err(system("cannot watch for signals"))?;
    let mut tuner = Tuner::new(options, config, roots, sender.clone())?;
    let published = Arc::clone(&tuner.published);
    let run_dir = &tuner.config.general.run_dir;
    let _control = serve::control(run_dir, Arc::clone(&published)).map_err(system(format!(
        "cannot serve {}",
        control_path(run_dir).display()
    )))?;
    let metrics = tuner.options.metrics_socket.clone();
    let _metrics = metrics
        .map(|path| {
            serve::metrics(&path, published)
                .map_err(system(format!("cannot serve {}", path.display())))
        })
        .transpose()?;
    watch::pressure(&tuner.roots, sender);
    tracing::info!(
        vms = %tuner.config.general.vms.display(),
        domain = tuner.config.merge.domain.as_deref().unwrap_or("none: nothing is merged"),
        dry_run = tuner.options.dry_run,
        "berth-tuner runs"
    );
    tuner.serve(&events);
    tuner.end();
    Ok(())
}

pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    |source| Error::System { what, source }
}

/// Everything that the main thread owns.
struct Tuner {
    options: Options,
    config: Config,
    roots: Roots,
    kernel: Kernel,
    /// None in a dry run, which changes nothing.
    saved: Option<Saved>,
    directory: Directory,
    history: History,
    start: Instant,
    scanner_pid: Option<u32>,
    since: Since,
    last: Sample,
    index: compare::Index,
    /// Comparisons that the next sample carries.
    compared: BTreeMap<String, Vec<Run>>,
    /// VMs whose hashes are on their way.
    hashing: usize,
    key: Key,
    sender: Sender<Event>,
    published: Arc<Mutex<Published>>,
    record: Option<std::fs::File>,
}

impl Tuner {
    fn new(
        options: Options,
        config: Config,
        roots: Roots,
        sender: Sender<Event>,
    ) -> Result<Self, Error> {
        let scanner_pid = sample::scanner_pid(&roots);
        let first = sample::read(&roots, scanner_pid, 0).map_err(Error::NoKsm)?;
        let kernel = Kernel::new(&roots);
        let saved = match options.dry_run {
            true => None,
            false => {
                check_rights(&roots)?;
                let mut saved = Saved::open(&config.general.run_dir)?;
                restore(&kernel, &mut saved, "a tuner that was killed");
                Some(saved)
            }
        };
        let record = options.record.as_ref().map(|path| {
            std::fs::File::create(path).map_err(system(format!("cannot write {}", path.display())))
        });
        Ok(Self {
            directory: Directory::new(&config.general.vms),
            since: Since {
                scanner_cpu_us: first.scanner_cpu_us,
                cow_ksm: first.host.cow_ksm,
                tuner_cpu_us: 0,
            },
            record: record.transpose()?,
            options,
            config,
            roots,
            kernel,
            saved,
            history: History::default(),
            start: Instant::now(),
            scanner_pid,
            last: first,
            index: compare::Index::default(),
            compared: BTreeMap::new(),
            hashing: 0,
            key: Key::random().map_err(system("cannot read /dev/urandom"))?,
            sender,
            published: Arc::default(),
        })
    }

    fn serve(&mut self, events: &Receiver<Event>) {
        let mut last = Instant::now();
        self.step();
        let mut hurry = false;
        loop {
            let interval = Duration::from_millis(self.config.general.interval_ms);
            let wait = if hurry { LEAST.min(interval) } else { interval };
            match events.recv_timeout((last + wait).saturating_duration_since(Instant::now())) {
                Ok(Event::End) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(Event::Reload) => self.reload(),
                Ok(Event::Pressure) => hurry = true,
                Ok(Event::Hashed(hashed)) => self.hashed(*hashed),
                Err(RecvTimeoutError::Timeout) => {
                    last = Instant::now();
                    hurry = false;
                    self.step();
                }
            }
        }
    }

    /// One round. What cannot be read is said, and the next round tries again.
    fn step(&mut self) {
        let at_ms = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut sample = match sample::read(&self.roots, self.scanner_pid, at_ms) {
            Ok(sample) => sample,
            Err(error) => {
                tracing::warn!("{}", crate::chain(&error));
                return;
            }
        };
        sample.vms = self.directory.look(&self.roots, at_ms);
        for (name, runs) in std::mem::take(&mut self.compared) {
            if let Some(vm) = sample.vms.get_mut(&name) {
                vm.compared = Some(runs);
            }
        }
        self.write_record(&sample);
        let (history, decision) = policy::decide(&self.config, &self.history, &sample);
        self.history = history;
        self.last = sample;
        let failed = self.act(&decision);
        self.publish(decision, failed);
    }

    fn act(&mut self, decision: &Decision) -> Vec<String> {
        if let Some(why) = &decision.changed {
            tracing::info!(state = %decision.state, why, "state");
        }
        let mut failed = Vec::new();
        for step in &decision.steps {
            let what = report::action(&step.action);
            tracing::info!(state = %decision.state, why = step.why, "{what}");
            // To compare changes nothing, and a dry run is to say what would come of it.
            if self.options.dry_run && !matches!(step.action, Action::Compare { .. }) {
                continue;
            }
            if let Err(error) = self.carry_out(&step.action) {
                tracing::warn!(error, "failed: {what}");
                failed.push(format!("{what}: {error}"));
            }
        }
        failed
    }

    fn carry_out(&mut self, action: &Action) -> Result<(), String> {
        if let Action::Compare { vm } = action {
            return self.compare(vm);
        }
        let saved = self.saved.as_mut().ok_or("nothing is done in a dry run")?;
        let socket = |vm: &String| {
            self.directory
                .socket(vm)
                .ok_or_else(|| "it has gone".to_owned())
        };
        match action {
            Action::Scanner(wanted) => {
                let now = &self.last.ksm.settings;
                self.kernel
                    .set(saved, now, wanted)
                    .map_err(|error| crate::chain(&error))
            }
            Action::Compare { .. } => Ok(()),
            Action::Advise {
                vm,
                domain,
                merge,
                ranges,
            } => {
                let socket = socket(vm)?;
                let pid = self.last.vms.get(vm).map(|vm| vm.pid);
                if *merge {
                    saved
                        .note_offer(socket, pid)
                        .map_err(|error| crate::chain(&error))?;
                }
                vms::advise(socket, domain, *merge, ranges)
                    .map_err(|error| crate::chain(&error))?;
                if !merge && ranges.is_empty() {
                    saved
                        .note_offer(socket, None)
                        .map_err(|error| crate::chain(&error))?;
                }
                Ok(())
            }
            Action::Balloon { vm, bytes } => {
                let socket = socket(vm)?;
                let now = self.last.vms.get(vm).and_then(|vm| vm.balloon);
                if let Some(balloon) = now {
                    saved
                        .note_balloon(socket, balloon.target_bytes)
                        .map_err(|error| crate::chain(&error))?;
                }
                vms::resize(socket, *bytes).map_err(|error| crate::chain(&error))
            }
            Action::Reclaim { vm, bytes } => {
                let cgroup = self.last.vms.get(vm).and_then(|vm| vm.cgroup.as_ref());
                let cgroup = cgroup.ok_or("it has no cgroup of its own")?;
                act::reclaim(cgroup, *bytes).map_err(|error| crate::chain(&error))
            }
        }
    }

    /// Has the pages of the whole domain hashed; one comparison at a time.
    fn compare(&mut self, vm: &str) -> Result<(), String> {
        let Some(domain) = self
            .config
            .merge
            .domain
            .clone()
            .filter(|_| self.hashing == 0)
        else {
            tracing::debug!(vm, "a comparison is under way");
            return Ok(());
        };
        let ours = self.last.vms.iter().filter(|(_, vm)| {
            vm.domain.as_ref() == Some(&domain) && vm.running && vm.mergeable_bytes > 0
        });
        let vms: Vec<(String, PathBuf)> = ours
            .filter_map(|(name, _)| Some((name.clone(), self.directory.socket(name)?.to_owned())))
            .collect();
        self.hashing = vms.len();
        let to = self.sender.clone();
        vms::hash(vms, domain, self.key.clone(), to, |hashes| {
            Event::Hashed(Box::new(hashes))
        })
        .map_err(|error| {
            self.hashing = 0;
            error.to_string()
        })
    }

    fn hashed(&mut self, (name, hashes): Hashes) {
        self.hashing = self.hashing.saturating_sub(1);
        match hashes {
            Ok(pages) => self.index.put(&name, pages),
            Err(error) => tracing::warn!(
                vm = name,
                error = crate::chain(&error),
                "pages are not compared"
            ),
        }
        if self.hashing == 0 {
            let vms = &self.last.vms;
            let domain = &self.config.merge.domain;
            self.index
                .keep(|name| vms.get(name).is_some_and(|vm| vm.domain == *domain));
            self.compared = self.index.runs();
        }
    }

    fn publish(&mut self, decision: Decision, failed: Vec<String>) {
        if let Ok(cpu_us) = sample::cpu_of_self(&self.roots) {
            self.since.tuner_cpu_us = cpu_us;
        }
        let (state, since_ms) = self.history.state();
        let status = report::Status {
            state,
            state_s: self.last.at_ms.saturating_sub(since_ms) / 1000,
            domain: self.config.merge.domain.clone(),
            dry_run: self.options.dry_run,
            scanner: self.history.scanner_says(),
            ..report::status(&self.last, self.since)
        };
        let time_s = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        let mut published = self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        published.status = status;
        if !decision.is_empty() {
            published.explain(Explained {
                time_s,
                decision,
                failed,
            });
        }
    }

    fn write_record(&mut self, sample: &Sample) {
        let Some(file) = &mut self.record else {
            return;
        };
        let line = serde_json::to_string(sample).map_err(io::Error::from);
        if let Err(error) = line.and_then(|line| writeln!(file, "{line}")) {
            tracing::warn!(%error, "samples are no longer recorded");
            self.record = None;
        }
    }

    /// A configuration that is wrong changes nothing.
    fn reload(&mut self) {
        match load(&self.options) {
            Ok(config) => {
                if config.general.run_dir != self.config.general.run_dir {
                    tracing::warn!(
                        "general.run_dir stays as it is until berth-tuner is started again"
                    );
                }
                if config.general.vms != self.config.general.vms {
                    self.directory = Directory::new(&config.general.vms);
                }
                self.config = config;
                tracing::info!("configuration read again");
            }
            Err(error) => tracing::error!("{}; the old configuration stays", crate::chain(&error)),
        }
    }

    fn end(&mut self) {
        if self.saved.is_some() && self.config.merge.withdraw_at_end {
            self.withdraw();
        }
        if let Some(saved) = &mut self.saved {
            restore(&self.kernel, saved, "this tuner");
        }
        tracing::info!("berth-tuner ends");
    }
}

impl Tuner {
    /// Withdraws what this tuner has offered, as far as there is room.
    fn withdraw(&mut self) {
        let Some(saved) = self
            .saved
            .as_mut()
            .filter(|saved| !saved.offers().is_empty())
        else {
            return;
        };
        let still = Settings {
            run: 0,
            ..self.last.ksm.settings.clone()
        };
        // Or it would merge again what is taken apart.
        if let Err(error) = self.kernel.set(saved, &self.last.ksm.settings, &still) {
            tracing::error!("{}", crate::chain(&error));
        }
        let offers = saved.offers().clone();
        let ours: BTreeMap<String, u32> = self
            .last
            .vms
            .keys()
            .filter_map(|name| {
                let pid = offers.get(self.directory.socket(name)?)?;
                Some((name.clone(), *pid))
            })
            .collect();
        let (steps, stay) = policy::farewell(&self.config, &self.last, &ours);
        let decision = Decision {
            state: self.history.state().0,
            steps,
            ..Decision::default()
        };
        self.act(&decision);
        for why in stay {
            tracing::warn!(why, "memory stays offered and merged");
        }
        self.forget_gone();
    }

    /// Offers of VMs that are not there any more went with them.
    fn forget_gone(&mut self) {
        let Some(saved) = &mut self.saved else { return };
        let there: Vec<_> = self
            .last
            .vms
            .iter()
            .filter(|(_, vm)| vm.advised_bytes > 0)
            .filter_map(|(name, vm)| Some((self.directory.socket(name)?.to_owned(), vm.pid)))
            .collect();
        for (socket, pid) in saved.offers().clone() {
            if !there.contains(&(socket.clone(), pid))
                && let Err(error) = saved.note_offer(&socket, None)
            {
                tracing::error!("{}", crate::chain(&error));
            }
        }
    }
}

fn check_rights(roots: &Roots) -> Result<(), Error> {
    let path = roots.ksm().join("run");
    match std::fs::OpenOptions::new().write(true).open(&path) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::Rights(path)),
    }
}

/// Puts back what was noted; what cannot be is said and stays noted.
fn restore(kernel: &Kernel, saved: &mut Saved, who: &str) {
    match kernel.restore(saved) {
        Ok(0) => {}
        Ok(count) => tracing::info!(
            count,
            "settings of the kernel that {who} had changed are put back"
        ),
        Err(error) => tracing::error!("{}", crate::chain(&error)),
    }
    for (socket, bytes) in saved.balloons().clone() {
        restore_balloon(saved, &socket, bytes);
    }
}

fn restore_balloon(saved: &mut Saved, socket: &Path, bytes: u64) {
    match vms::resize(socket, bytes) {
        Ok(()) => tracing::info!(socket = %socket.display(), bytes, "balloon is put back"),
        // With its VM it is gone; one that does not answer cannot be helped.
        Err(error) => tracing::info!("balloon is not put back: {}", crate::chain(&error)),
    }
    if let Err(error) = saved.forget_balloon(socket) {
        tracing::error!("{}", crate::chain(&error));
    }
}

#[cfg(test)]
mod tests;
