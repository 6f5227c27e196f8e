//! Landlock: no file can be opened, made or changed by path any more, no TCP port, no abstract
//! socket, and no process outside can be signalled.
//!
//! Files that are open stay as usable as they were. The one right left is to remove a file from the
//! directories of our sockets, which the control thread needs at the end (the filter keeps unlink
//! from all other threads). Landlock cannot name a single file to be removed.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::SandboxError;

/// How much of Landlock this kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilesConfined {
    /// All that is asked for.
    Fully,
    /// An older version.
    Partly,
    /// None.
    Not,
}

/// Confines the calling thread and those it starts later; `sockets` may be removed.
///
/// # Errors
/// The directory of a socket cannot be opened, or the kernel refuses for another reason than that
/// it has no Landlock.
pub fn confine_files(sockets: &[PathBuf]) -> Result<FilesConfined, SandboxError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V4)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(SandboxError::Files)?;
    for socket in sockets {
        let directory = PathFd::new(directory_of(socket));
        let directory = directory.map_err(|source| SandboxError::Directory {
            path: socket.clone(),
            source,
        })?;
        let rule = PathBeneath::new(directory, AccessFs::RemoveFile);
        ruleset = ruleset.add_rule(rule).map_err(SandboxError::Files)?;
    }
    let status = ruleset.restrict_self().map_err(SandboxError::Files)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => FilesConfined::Fully,
        RulesetStatus::PartiallyEnforced => FilesConfined::Partly,
        RulesetStatus::NotEnforced => FilesConfined::Not,
    })
}

fn directory_of(socket: &Path) -> &Path {
    match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
