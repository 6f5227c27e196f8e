//! What a scenario is told and given when it is prepared.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::awake::How;
use crate::clock::Window;
use crate::janitor::Janitor;
use crate::peers::{self, Peer};
use crate::results::Absent;
use crate::scenario::{Cell, Ours, Subject};

/// One of `--builds`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// What is added to its subjects' names; empty for the only one.
    pub label: String,
    /// Where its programs are.
    pub folder: PathBuf,
}

/// Our daemon once more: other flags, or another build of it (`--variant`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// What the table calls it.
    pub name: String,
    /// Another build.
    pub program: Option<PathBuf>,
    /// Flags more.
    pub flags: Vec<String>,
}

/// What was asked for, and what it is made with.
pub struct Context {
    /// Those that were chosen.
    pub cells: Vec<Cell>,
    /// Short windows.
    pub quick: bool,
    /// When a run is measured.
    pub window: Window,
    /// CPU of the client.
    pub client_cpu: usize,
    /// CPU of daemon and limit.
    pub daemon_cpu: usize,
    /// How cores are kept awake.
    pub awake: How,
    /// For sockets, logs and images: a folder that the janitor removes.
    pub directory: PathBuf,
    /// We are in the lab.
    pub in_lab: bool,
    /// What must not outlive the run.
    pub janitor: Janitor,
    /// Ours once more.
    pub variants: Vec<Variant>,
    /// Whether runs that count are wanted.
    pub count: bool,
    /// At least one: where our programs are.
    pub builds: Vec<Build>,
    /// Only these peers.
    pub against: Option<Vec<String>>,
    /// Peers whose place was named.
    pub named: Vec<(String, PathBuf)>,
    /// Kernel and initramfs, if named.
    pub assets: Option<PathBuf>,
    /// Size of the zram device.
    pub zram_mib: u64,
    /// Size of the file that is a disk.
    pub file_mib: u64,
    /// Who was not there so far.
    pub absent: Vec<Absent>,
}

impl Context {
    /// A program of ours, once for each of `--builds`. The first one's subjects are [`Role::Ours`].
    ///
    /// [`Role::Ours`]: crate::results::Role::Ours
    pub fn ours(&self, program: &str) -> Result<Vec<Ours>> {
        let several = self.builds.len() > 1;
        let of = |(index, build): (usize, &Build)| {
            let path = build.folder.join(program);
            if !path.is_file() {
                bail!(
                    "no {}: build it with 'cargo build --release -p {program}', or name a folder with --builds",
                    path.display()
                );
            }
            let mut subject = Subject::ours(program);
            if several {
                subject.name = format!("{program}:{}", build.label);
                subject.build = Some(index);
            }
            Ok(Ours {
                subject,
                program: path,
            })
        };
        self.builds.iter().enumerate().map(of).collect()
    }

    /// Where a peer is. None where it is not there, which is noted, or not wanted.
    pub fn peer(&mut self, name: &str) -> Option<PathBuf> {
        let wanted = |against: &Vec<String>| against.iter().any(|other| other == name);
        if !self.against.as_ref().is_none_or(wanted) {
            return None;
        }
        let peer = Peer::find(name)?;
        let named = self.named.iter().find(|(other, _)| other == name);
        let found = named
            .map(|(_, path)| path.clone())
            .or_else(|| peer.program());
        if found.is_none() {
            self.lacks(name, peer.how);
        }
        found
    }

    /// A program that is no peer, and what is missing without it.
    pub fn tool(&mut self, program: &str, without: &str) -> Option<PathBuf> {
        let found = peers::on_path(program);
        if found.is_none() {
            self.lacks(program, without);
        }
        found
    }

    /// Notes that somebody is not there.
    pub fn lacks(&mut self, name: &str, why: &str) {
        let absent = Absent {
            name: name.to_owned(),
            why: why.to_owned(),
        };
        if !self.absent.contains(&absent) {
            self.absent.push(absent);
        }
    }

    /// Whether a cell was chosen.
    pub fn wants(&self, cell: &str) -> bool {
        self.cells.iter().any(|chosen| chosen.name == cell)
    }

    /// A new folder of its own for something.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// The folder with `vmlinux`, `vmlinuz` and `guest-initramfs.cpio`.
    pub fn assets(&self) -> Result<PathBuf> {
        const FILE: &str = "guest-initramfs.cpio";
        if let Some(folder) = &self.assets {
            if !folder.join(FILE).is_file() {
                bail!("--assets {}: there is no {FILE} in it", folder.display());
            }
            return Ok(folder.clone());
        }
        let lab = Path::new("/lab/assets").to_owned();
        let tree = source_tree().map(|tree| tree.join("target/lab/assets"));
        let places = self.in_lab.then_some(lab).into_iter().chain(tree);
        places
            .into_iter()
            .find(|folder| folder.join(FILE).is_file())
            .context("no kernel and initramfs for guests: make them with tests/lab/assets, or name their folder with --assets")
    }
}

/// The source tree that the program was built in or is run in.
pub fn source_tree() -> Option<PathBuf> {
    let program = std::env::current_exe().ok();
    let here = std::env::current_dir().ok();
    [program, here].into_iter().flatten().find_map(|start| {
        let mut above = start.ancestors();
        above
            .find(|folder| folder.join("tests/lab/run").is_file())
            .map(Path::to_owned)
    })
}

impl Variant {
    /// From `NAME=[PROGRAM] [FLAG]…`.
    pub fn parse(text: &str) -> Result<Variant, String> {
        let Some((name, rest)) = text.split_once('=') else {
            return Err("expected NAME=[PROGRAM] [FLAG]…".to_owned());
        };
        if name.is_empty() || name.starts_with('-') {
            return Err("expected a name before the first '='".to_owned());
        }
        let mut words = rest.split_whitespace().peekable();
        let program = words.next_if(|word| !word.starts_with('-'));
        Ok(Variant {
            name: name.to_owned(),
            program: program.map(PathBuf::from),
            flags: words.map(str::to_owned).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_has_a_name_perhaps_a_program_and_flags() {
        let variant = Variant::parse("nopoll=--poll-us 0").unwrap();
        assert_eq!(variant.name, "nopoll");
        assert_eq!((variant.program, variant.flags.len()), (None, 2));
        let variant = Variant::parse("old=/tmp/berth-blk").unwrap();
        assert_eq!(variant.program, Some(PathBuf::from("/tmp/berth-blk")));
        assert!(Variant::parse("--poll-us=0").is_err());
        assert!(Variant::parse("nopoll").is_err());
    }
}
