//! Small files of the kernel: one number, or a name and a number on each line.

use std::io;
use std::path::{Path, PathBuf};

/// Why something cannot be known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that every kernel we run on has.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It says something else than a number.
    #[error("{} says {text:?}, which is not a number", .path.display())]
    Number {
        /// Which.
        path: PathBuf,
        /// What it says.
        text: String,
    },
}

/// The whole file.
pub(super) fn text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

/// The number in a file.
pub(super) fn number(path: &Path) -> Result<u64, Error> {
    let text = text(path)?;
    text.trim().parse().map_err(|_| Error::Number {
        path: path.to_owned(),
        text: text.trim().to_owned(),
    })
}

/// The number in a file that need not be there.
pub(super) fn optional(path: &Path) -> Option<u64> {
    number(path).ok()
}

/// The number behind a name at the start of a line: `name 12`, `name: 12 kB`.
pub(super) fn named(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix(':').unwrap_or(rest);
        rest.starts_with([' ', '\t'])
            .then(|| rest.split_whitespace().next()?.parse().ok())?
    })
}
