//! What was changed and what was there before: a file that outlives the tuner, and the lock that keeps a second one away.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const STATE: &str = "state.json";
const LOCK: &str = "lock";

/// Why nothing can be noted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder or a file in it.
    #[error("cannot use {}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("another berth-tuner runs with {}", .0.display())]
    Taken(PathBuf),
    /// It was damaged: what it says cannot be put back.
    #[error("{} is not what a tuner wrote: put /sys/kernel/mm/ksm right by hand and remove the file", .path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
}

/// What was there before.
#[derive(Debug)]
pub struct Saved {
    path: PathBuf,
    noted: Noted,
    /// Held for as long as the tuner lives.
    _lock: File,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Noted {
    /// Files of `/sys/kernel/mm/ksm`.
    settings: BTreeMap<String, String>,
    /// Balloons in bytes by API socket.
    balloons: BTreeMap<PathBuf, u64>,
    /// Process ids of VMMs that were told to offer memory, by API socket.
    #[serde(default)]
    offers: BTreeMap<PathBuf, u32>,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

impl Saved {
    /// Takes the folder, which is made where it is not there, and reads what a tuner that was killed has left.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        let lock_path = folder.join(LOCK);
        let lock = File::create(&lock_path).map_err(failed(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Taken(folder.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed(&lock_path)(source)),
        }
        let path = folder.join(STATE);
        let noted = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|source| Error::Damaged {
                path: path.clone(),
                source,
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Noted::default(),
            Err(source) => return Err(failed(&path)(source)),
        };
        Ok(Self {
            path,
            noted,
            _lock: lock,
        })
    }

    /// Settings as they were before the first change.
    pub fn settings(&self) -> &BTreeMap<String, String> {
        &self.noted.settings
    }

    /// Balloons as they were before the first change.
    pub fn balloons(&self) -> &BTreeMap<PathBuf, u64> {
        &self.noted.balloons
    }

    pub(super) fn note_settings(
        &mut self,
        originals: impl Iterator<Item = (String, String)>,
    ) -> Result<(), Error> {
        let mut noted = self.noted.clone();
        for (name, value) in originals {
            // The first one is the original.
            noted.settings.entry(name).or_insert(value);
        }
        self.keep(noted)
    }

    /// All are put back but this one, if any.
    pub(super) fn forget_settings(&mut self, but: Option<(String, String)>) -> Result<(), Error> {
        let mut noted = self.noted.clone();
        noted.settings = but.into_iter().collect();
        self.keep(noted)
    }

    /// VMs that have memory offered by this tuner or one before it: process ids by socket.
    pub fn offers(&self) -> &BTreeMap<PathBuf, u32> {
        &self.noted.offers
    }

    /// Memory of a VM is going to be offered, or has been withdrawn (`None`).
    pub fn note_offer(&mut self, socket: &Path, pid: Option<u32>) -> Result<(), Error> {
        let mut noted = self.noted.clone();
        match pid {
            Some(pid) => noted.offers.insert(socket.to_owned(), pid),
            None => noted.offers.remove(socket),
        };
        self.keep(noted)
    }

    /// A balloon is going to be moved from `bytes`.
    pub fn note_balloon(&mut self, socket: &Path, bytes: u64) -> Result<(), Error> {
        let mut noted = self.noted.clone();
        noted.balloons.entry(socket.to_owned()).or_insert(bytes);
        self.keep(noted)
    }

    /// A balloon is as it was, or its VM has gone.
    pub fn forget_balloon(&mut self, socket: &Path) -> Result<(), Error> {
        let mut noted = self.noted.clone();
        noted.balloons.remove(socket);
        self.keep(noted)
    }

    /// Whole or not at all: a kill between two writes leaves the one that was there.
    fn keep(&mut self, noted: Noted) -> Result<(), Error> {
        if noted == self.noted {
            return Ok(());
        }
        if noted == Noted::default() {
            std::fs::remove_file(&self.path).map_err(failed(&self.path))?;
        } else {
            let new = self.path.with_extension("new");
            let text = serde_json::to_vec(&noted).map_err(|error| failed(&new)(error.into()))?;
            std::fs::write(&new, text).map_err(failed(&new))?;
            std::fs::rename(&new, &self.path).map_err(failed(&self.path))?;
        }
        self.noted = noted;
        Ok(())
    }
}
