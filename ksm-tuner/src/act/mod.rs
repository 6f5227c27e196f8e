//! The tuner's hands on the host: files of the kernel. What it changes is noted first, and put back.
//!
//! ```text
//!   Action::Scanner ─▶ note the value that was there (Saved, a file under /run) ─▶ write /sys/kernel/mm/ksm/NAME
//!   end, or the next start after a kill ─▶ write back what was noted, forget it
//! ```
//!
//! Writes go in an order that the kernel takes: the scanner stands still before anything else changes and starts
//! last, and the kernel's advisor is off before `pages_to_scan`, which it would refuse.
//! `run=2`, which takes all merged pages of the host apart at once, is never written.

mod saved;

use std::io;
use std::path::{Path, PathBuf};

pub use saved::{Error as SavedError, Saved};

use crate::sample::{Cgroup, Roots, Settings};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel did not take a value.
    #[error("cannot write {value} to {}", .path.display())]
    Write {
        /// File.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// The system's answer.
        source: io::Error,
    },
    /// What was there could not be noted, so nothing was changed.
    #[error(transparent)]
    Saved(#[from] SavedError),
}

/// The kernel's side.
#[derive(Debug)]
pub struct Kernel {
    ksm: PathBuf,
}

impl Kernel {
    /// That of these roots.
    pub fn new(roots: &Roots) -> Self {
        Self { ksm: roots.ksm() }
    }

    /// Tells the scanner `wanted`, where it was told `now`.
    pub fn set(&self, saved: &mut Saved, now: &Settings, wanted: &Settings) -> Result<(), Error> {
        let (now, wanted) = (values(now), values(wanted));
        let is_new = |of: &(&'static str, String)| !now.contains(of);
        let changed: Vec<_> = wanted.into_iter().filter(is_new).collect();
        let originals = changed
            .iter()
            .filter_map(|(name, _)| now.iter().find(|of| of.0 == *name))
            .map(|(name, value)| ((*name).to_owned(), value.clone()));
        saved.note_settings(originals)?;
        let starts = |of: &&(&'static str, String)| of.0 == "run" && of.1 != "0";
        let (last, first): (Vec<_>, Vec<_>) = changed.iter().partition(starts);
        for (name, value) in first.into_iter().chain(last) {
            self.write(name, value)?;
        }
        Ok(())
    }

    /// Puts back what was noted. What the kernel refuses is said, and the rest is put back all the same.
    pub fn restore(&self, saved: &mut Saved) -> Result<usize, Error> {
        let noted = saved.settings().clone();
        if noted.is_empty() {
            return Ok(0);
        }
        let advised = noted.contains_key("pages_to_scan") && self.ksm.join("advisor_mode").exists();
        let (mut failed, mut waits) = (None, None);
        let stop = [("run", "0")]
            .into_iter()
            .filter(|_| noted.contains_key("run"));
        let unlock = [("advisor_mode", "none")].into_iter().filter(|_| advised);
        let rest = noted
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let is_late = |name: &str| name == "run" || name == "advisor_mode";
        let middle = rest.clone().filter(|of| !is_late(of.0));
        // "advisor_mode" is before "run" in the map.
        let late = rest.filter(|of| is_late(of.0));
        for (name, value) in stop.chain(unlock).chain(middle).chain(late) {
            match self.write(name, value) {
                Err(error) if name == SHARING && is_busy(&error) => {
                    tracing::info!(
                        "{SHARING} cannot be put back to {value} while pages are merged"
                    );
                    waits = Some((name.to_owned(), value.to_owned()));
                }
                Err(error) => {
                    tracing::warn!("{}", crate::chain(&error));
                    failed = Some(error);
                }
                Ok(()) => {}
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                let left = usize::from(waits.is_some());
                saved.forget_settings(waits)?;
                Ok(noted.len() - left)
            }
        }
    }

    fn write(&self, name: &str, value: &str) -> Result<(), Error> {
        write(&self.ksm.join(name), value)
    }
}

/// Has the kernel swap out so much of a cgroup. Less is no error: the kernel does what it finds.
pub fn reclaim(cgroup: &Cgroup, bytes: u64) -> Result<(), Error> {
    match write(&cgroup.path.join("memory.reclaim"), &bytes.to_string()) {
        Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

/// What the kernel takes only while no page is merged.
const SHARING: &str = "max_page_sharing";

fn is_busy(error: &Error) -> bool {
    matches!(error, Error::Write { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
}

fn write(path: &Path, value: &str) -> Result<(), Error> {
    // Not created where it is not there.
    let written = std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    written.map_err(|source| Error::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// Names and values in the order in which they are written.
fn values(settings: &Settings) -> Vec<(&'static str, String)> {
    let number = |name, value: Option<u64>| value.map(|value| (name, value.to_string()));
    [
        number("run", Some(settings.run)),
        settings
            .advisor_mode
            .clone()
            .map(|mode| ("advisor_mode", mode)),
        number("pages_to_scan", Some(settings.pages_to_scan)),
        number("sleep_millisecs", Some(settings.sleep_millisecs)),
        number("smart_scan", settings.smart_scan),
        number("use_zero_pages", settings.use_zero_pages),
        number("max_page_sharing", settings.max_page_sharing),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests;
