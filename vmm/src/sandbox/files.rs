//! Landlock: which files can still be opened by path.
//!
//! Files that are open stay as usable as they were. A rule holds for the file that was there when it was made: one that
//! replaces it under its name is another file, unless the rule names its folder.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::Error;
use crate::config::keys::Keys;
use crate::config::{ArgError, Link, SerialConfig, VmConfig};
use crate::vhost_user::Kind;

/// What may be done with a file, or with all below a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Read files, list folders.
    pub read: bool,
    /// Write, make and remove files and sockets.
    pub write: bool,
}

/// One `--landlock-rules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRule {
    /// File or folder.
    pub path: PathBuf,
    /// What is allowed.
    pub access: Access,
}

impl FileRule {
    /// `path=PATH,access=r|w|rw`.
    pub fn parse(text: &str) -> Result<Self, ArgError> {
        let keys = Keys::parse("--landlock-rules", text, &["path", "access"])?;
        keys.no_bare()?;
        let (read, write) = match keys.required("access")? {
            "r" => (true, false),
            "w" => (false, true),
            "rw" | "wr" => (true, true),
            other => return Err(keys.bad("access", other, "r, w or rw")),
        };
        Ok(Self {
            path: keys.required("path")?.into(),
            access: Access { read, write },
        })
    }
}

/// What no configuration needs to name: the host's limits, and the source of entropy of a guest that is created
/// later and names none.
const ALWAYS_READ: [&str; 3] = ["/proc/cpuinfo", "/proc/meminfo", "/dev/urandom"];

/// Confines the calling thread and those it starts later to the files of the guest and of the rules.
pub(super) fn confine(
    config: Option<&VmConfig>,
    sockets: &[PathBuf],
    rules: &[FileRule],
) -> Result<(), Error> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V4)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(Error::Files)?;
    for rule in rules {
        let fd = PathFd::new(&rule.path).map_err(|source| Error::Rule {
            path: rule.path.clone(),
            source,
        })?;
        ruleset = add(ruleset, fd, rights(rule.access))?;
    }
    for (path, rights) in known(config, sockets) {
        // What is not there cannot be opened anyway, and the opener says so.
        if let Ok(fd) = PathFd::new(path) {
            ruleset = add(ruleset, fd, rights)?;
        }
    }
    let status = ruleset.restrict_self().map_err(Error::Files)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => {
            tracing::debug!("this kernel's Landlock is an old one: part of it is used");
        }
        RulesetStatus::NotEnforced => {
            tracing::info!(
                "no Landlock in this kernel: files that this user may open stay open to the VMM"
            );
        }
    }
    Ok(())
}

/// The files that a guest of this configuration needs from its boot on.
fn known(config: Option<&VmConfig>, sockets: &[PathBuf]) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let read = AccessFs::ReadFile.into();
    let mut files: Vec<(PathBuf, BitFlags<AccessFs>)> = Vec::new();
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    files.push(("/dev/kvm".into(), device));
    files.extend(ALWAYS_READ.map(|path| (PathBuf::from(path), read)));
    for socket in sockets {
        files.push((folder_of(socket), AccessFs::RemoveFile.into()));
    }
    let Some(config) = config else {
        return files;
    };
    files.push((config.payload.kernel.clone(), read));
    files.extend(
        config
            .payload
            .initramfs
            .iter()
            .map(|path| (path.clone(), read)),
    );
    files.push((config.rng.src.clone(), read));
    // Sockets that backends connect to.
    for kind in Kind::all(config) {
        if let Link::Listen(path) = kind.link() {
            let both = AccessFs::MakeSock | AccessFs::RemoveFile;
            files.push((folder_of(path), both));
        }
    }
    if let SerialConfig::Socket(path) = &config.serial {
        files.push((folder_of(path), AccessFs::RemoveFile.into()));
    }
    files
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    let read = AccessFs::from_read(ABI::V5) & !AccessFs::Execute;
    let write = AccessFs::from_write(ABI::V5)
        & !(AccessFs::MakeBlock | AccessFs::MakeChar | AccessFs::MakeSym | AccessFs::Refer);
    match (access.read, access.write) {
        (true, true) => read | write,
        (true, false) => read,
        (false, _) => write,
    }
}

/// A rule for a file may have rights of files only, or the kernel refuses it.
fn add(
    ruleset: RulesetCreated,
    fd: PathFd,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Error> {
    let is_folder = std::os::fd::AsFd::as_fd(&fd)
        .try_clone_to_owned()
        .and_then(|fd| std::fs::File::from(fd).metadata())
        .is_ok_and(|metadata| metadata.is_dir());
    let rights = match is_folder {
        true => rights,
        false => rights & AccessFs::from_file(ABI::V5),
    };
    ruleset
        .add_rule(PathBeneath::new(fd, rights))
        .map_err(Error::Files)
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        let rule = FileRule::parse("path=/srv/guests,access=rw").unwrap();
        assert_eq!(rule.path, Path::new("/srv/guests"));
        assert!(rule.access.read && rule.access.write);
        assert!(!FileRule::parse("path=/a,access=r").unwrap().access.write);
        for wrong in [
            "path=/a",
            "access=r",
            "path=/a,access=x",
            "/a",
            "path=,access=r",
        ] {
            let error = FileRule::parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--landlock-rules: "), "{error}");
        }
    }

    #[test]
    fn no_rule_lets_a_program_be_run_or_a_device_be_made() {
        let all = rights(Access {
            read: true,
            write: true,
        });
        assert!(!all.intersects(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock));
        assert!(all.contains(AccessFs::MakeSock | AccessFs::ReadFile | AccessFs::WriteFile));
    }
}
