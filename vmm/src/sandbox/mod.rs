//! What the VMM gives up before a guest runs, so that whoever takes it over has little.
//!
//! ```text
//!  main: prepare ─ no new privileges, capabilities ─▶ open sockets, files ─▶ confine ─ Landlock, filter ─▶ event loop
//!                        │                                                     │
//!                        └─ serial-out: its filter                             ├─ api, metrics: their filters
//!                                                                              ├─ boot: Landlock of this guest, filter
//!                                                                              │    ├─ vcpuN ── rng, shN-ID
//!                                                                              │    ├─ balloon
//!                                                                              │    └─ vu-ID, vu-deadline
//!                                                                              ├─ plug, vu-ID of a device that is added
//!                                                                              ├─ advice: a tuner's request
//!                                                                              └─ teardown
//! ```
//!
//! Every thread is started by [`spawn`], or calls [`enter`] first of all, with its [`ThreadKind`]: a system call
//! that its kind does not need ends the process with SIGSYS after one line on stderr ([`violation`]); with
//! [`Mode::Log`] the kernel logs it and makes it. Filters are inherited and can only be narrowed, so a thread may do
//! no more than the one that started it ([`ThreadKind::parent`]; a test holds the lists against that).
//!
//! The lists and why each call is there: [`syscalls`]. The operator's view and the lists in words: docs/threat-model.md.
//! Kernel: Documentation/userspace-api/seccomp_filter.rst, landlock.rst; capabilities(7).

mod files;
mod filter;
mod names;
mod privileges;
pub mod syscalls;
mod violation;

use std::io;
use std::path::PathBuf;
use std::process;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

pub use self::files::{Access, FileRule};
pub use self::filter::FilterError;
use self::filter::Filters;
use crate::config::{ArgError, VmConfig};

/// What becomes of a system call that a thread does not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// It ends the process.
    #[default]
    On,
    /// It is made.
    Off,
    /// It is made, and the kernel logs it.
    Log,
}

/// What the operator chose.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// System calls.
    pub mode: Mode,
    /// Whether files are confined too, by Landlock.
    pub landlock: bool,
    /// Files for what comes later through the API.
    pub rules: Vec<FileRule>,
}

/// What a thread is for, and so what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The event loop, the one writer of VM state.
    Main,
    /// Puts a machine together.
    Boot,
    /// Takes a machine apart.
    Teardown,
    /// Waits for the backend of a device that is added.
    Plug,
    /// Does what a tuner wants of guest memory.
    Advice,
    /// Runs a vCPU.
    Vcpu,
    /// Keeps one vhost-user session (`vu-ID`).
    VhostUser,
    /// Cuts off backends that are silent.
    Deadline,
    /// HTTP of the REST API.
    Api,
    /// Gives back to the host what the guest lends it.
    Balloon,
    /// Fills the entropy device's buffers.
    Rng,
    /// Copies for one queue of a device that has none of the guest's memory (`shN-ID`).
    Shadow,
    /// Writes what the guest prints.
    SerialOut,
    /// Answers on the metrics socket.
    Metrics,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Main,
        Self::Boot,
        Self::Teardown,
        Self::Plug,
        Self::Advice,
        Self::Vcpu,
        Self::VhostUser,
        Self::Deadline,
        Self::Api,
        Self::Balloon,
        Self::Rng,
        Self::Shadow,
        Self::SerialOut,
        Self::Metrics,
    ];

    /// Whose thread starts it; its filter is in force there already.
    pub fn parent(self) -> Self {
        match self {
            Self::Vcpu | Self::VhostUser | Self::Deadline | Self::Balloon => Self::Boot,
            Self::Rng | Self::Shadow => Self::Vcpu,
            _ => Self::Main,
        }
    }

    /// Name of the thread, as `top -H` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Boot => "boot",
            Self::Teardown => "teardown",
            Self::Plug => "plug",
            Self::Advice => "advice",
            Self::Vcpu => "vcpuN",
            Self::VhostUser => "vu-ID",
            Self::Deadline => "vu-deadline",
            Self::Api => "api",
            Self::Balloon => "balloon",
            Self::Rng => "rng",
            Self::Shadow => "shN-ID",
            Self::SerialOut => "serial-out",
            Self::Metrics => "metrics",
        }
    }
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A privilege could not be given up.
    #[error("sandbox: cannot {what}")]
    Privileges {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Landlock.
    #[error("sandbox: cannot confine file access")]
    Files(#[source] landlock::RulesetError),
    /// A file named by `--landlock-rules`.
    #[error("--landlock-rules: cannot open {}", path.display())]
    Rule {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: landlock::PathFdError,
    },
    /// Seccomp.
    #[error(
        "sandbox: cannot set a system call filter (a kernel without seccomp needs --sandbox=off)"
    )]
    Filter(#[from] FilterError),
}

/// What is in force in this process.
struct Prepared {
    settings: Settings,
    filters: Filters,
}

static PREPARED: OnceLock<Prepared> = OnceLock::new();

/// Gives up privileges and gets the filters ready; from here on [`spawn`] and [`enter`] confine threads. To be called
/// by the main thread before it starts any other.
pub fn prepare(settings: &Settings) -> Result<(), Error> {
    match settings.mode {
        Mode::Off if !settings.landlock => {
            tracing::debug!("the sandbox is off");
            return Ok(());
        }
        Mode::Off => {}
        Mode::Log => tracing::warn!(
            "the sandbox only logs: calls that it would forbid are made, and go to the kernel's log"
        ),
        Mode::On => violation::install().map_err(privileges("handle SIGSYS"))?,
    }
    privileges::forbid_new().map_err(privileges("set no_new_privs"))?;
    if settings.mode == Mode::On {
        privileges::drop_capabilities().map_err(privileges("drop capabilities"))?;
    }
    PREPARED.get_or_init(|| Prepared {
        settings: settings.clone(),
        filters: Filters::new(settings.mode, crate::cpu::counts_doorbells()),
    });
    Ok(())
}

/// Closes the sandbox around the main thread, and all that it starts from here on.
///
/// With a guest's configuration its files can be opened, and those of the rules; without one everything can until a
/// boot thread narrows itself ([`confine_boot`]), unless there are rules: then theirs only. `sockets` are removed at
/// the end of the process.
pub fn confine(config: Option<&VmConfig>, sockets: &[PathBuf]) -> Result<(), Error> {
    let Some(prepared) = PREPARED.get() else {
        return Ok(());
    };
    let settings = &prepared.settings;
    if settings.landlock && (config.is_some() || !settings.rules.is_empty()) {
        files::confine(config, sockets, &settings.rules)?;
    }
    Ok(prepared.filters.apply(ThreadKind::Main)?)
}

/// Confines the thread that puts this guest together, and all that it starts, to the guest's files.
pub fn confine_boot(config: &VmConfig) -> Result<(), Error> {
    match PREPARED.get() {
        Some(prepared) if prepared.settings.landlock => {
            files::confine(Some(config), &[], &prepared.settings.rules)
        }
        _ => Ok(()),
    }
}

/// Starts a thread of that kind, confined before it does anything.
pub fn spawn<T: Send + 'static>(
    kind: ThreadKind,
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.to_owned()).spawn(move || {
        enter(kind);
        run()
    })
}

/// Narrows the calling thread to what its kind needs, for good. Nothing to do where the sandbox is off. Ends the process
/// where the kernel refuses: the thread must not go on.
pub fn enter(kind: ThreadKind) {
    let Some(prepared) = PREPARED.get() else {
        return;
    };
    if let Err(error) = prepared.filters.apply(kind) {
        tracing::error!(thread = kind.name(), %error, "the sandbox cannot be closed");
        process::exit(1);
    }
}

fn privileges(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Privileges { what, source }
}

impl Settings {
    /// From `--sandbox`, or Cloud Hypervisor's `--seccomp` and `--landlock`, and `--landlock-rules`.
    pub fn from_flags(
        sandbox: Option<&str>,
        seccomp: Option<&str>,
        landlock: bool,
        rules: &[String],
    ) -> Result<Self, ArgError> {
        let mode = match (sandbox, seccomp) {
            (Some(_), Some(_)) => {
                return Err(ArgError::Unsupported {
                    flag: "--seccomp",
                    what: "it is another word for --sandbox, give one of them".into(),
                });
            }
            (Some(word), None) => mode("--sandbox", word, ["on", "off", "log"])?,
            (None, Some(word)) => mode("--seccomp", word, ["true", "false", "log"])?,
            (None, None) => Mode::default(),
        };
        let rules = rules
            .iter()
            .map(|rule| FileRule::parse(rule))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            mode,
            landlock: landlock || mode == Mode::On,
            rules,
        })
    }
}

fn mode(flag: &'static str, word: &str, words: [&'static str; 3]) -> Result<Mode, ArgError> {
    let modes = [Mode::On, Mode::Off, Mode::Log];
    let found = words.iter().zip(modes).find(|(name, _)| **name == word);
    found
        .map(|(_, mode)| mode)
        .ok_or_else(|| ArgError::UnknownValue {
            flag,
            value: word.to_owned(),
            hint: format!("expected {}, {} or {}", words[0], words[1], words[2]),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(
        sandbox: Option<&str>,
        seccomp: Option<&str>,
        landlock: bool,
    ) -> Result<Settings, String> {
        Settings::from_flags(sandbox, seccomp, landlock, &[]).map_err(|error| error.to_string())
    }

    #[test]
    fn words_of_both_programs_are_understood() {
        for (sandbox, seccomp, mode) in [
            (Some("on"), None, Mode::On),
            (Some("off"), None, Mode::Off),
            (Some("log"), None, Mode::Log),
            (None, Some("true"), Mode::On),
            (None, Some("false"), Mode::Off),
            (None, Some("log"), Mode::Log),
        ] {
            let settings = flags(sandbox, seccomp, false).unwrap();
            assert_eq!((settings.mode, settings.landlock), (mode, mode == Mode::On));
        }
        assert!(flags(None, Some("false"), true).unwrap().landlock);
        let error = flags(Some("of"), None, false).unwrap_err();
        assert_eq!(
            error,
            "--sandbox: unknown value 'of' (expected on, off or log)"
        );
        assert!(flags(Some("on"), Some("true"), false).is_err());
    }
}
