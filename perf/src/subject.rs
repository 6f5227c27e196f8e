//! Who is measured: our daemon, its peers, and the limit.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::backing::{Backing, Disk};
use crate::target::Load;

/// An interface of the kernel to the file, with no virtio between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    /// io_uring.
    Uring,
    /// io_submit.
    Aio,
    /// pread and pwrite.
    Sync,
}

/// How a subject is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our loop on the file itself.
    Limit(Direct),
    /// fio on the file itself, as a check on our loop.
    Fio,
    /// Our daemon, with these flags more.
    Berth(Vec<String>),
    /// qemu-storage-daemon with this `aio=`; in an I/O thread, which polls, or in its main loop.
    Qsd {
        /// io_uring, native or threads.
        aio: &'static str,
        /// In an I/O thread of its own.
        iothread: bool,
    },
    /// Cloud Hypervisor's daemon.
    CloudHypervisor,
}

/// One of those who are compared.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What `--subject` and the table call it.
    pub name: String,
    /// How it is run.
    pub kind: Kind,
    /// The program; none for the limit.
    pub program: Option<PathBuf>,
}

/// fio's io_uring engine.
const FIO: &str = "fio-io_uring";
/// Our daemon with io_uring for everything, also where it does some requests on its own thread.
pub const IO_URING_ONLY: &str = "berth-io_uring";
/// Our own loop over io_uring, which batches more than fio does.
pub const LOOP: &str = "loop-io_uring";

impl Subject {
    /// Whether it is a daemon.
    pub fn is_daemon(&self) -> bool {
        !matches!(self.kind, Kind::Limit(_) | Kind::Fio)
    }

    /// Whether it makes sense on this disk.
    pub fn fits(&self, backing: Backing) -> bool {
        match &self.kind {
            // Linux' native aio is synchronous in the page cache; qemu refuses it there.
            Kind::Qsd { aio: "native", .. } | Kind::Limit(Direct::Aio) => backing.direct(),
            Kind::Qsd { aio: "threads", .. } => !backing.direct(),
            _ => true,
        }
    }

    /// The command that serves `disk` on `socket`; none for the limit.
    pub fn command(&self, disk: &Disk, socket: &Path, queues: u16) -> Option<Command> {
        let mut command = Command::new(self.program.as_ref()?);
        let (path, socket) = (disk.path.display(), socket.display());
        match &self.kind {
            Kind::Limit(_) | Kind::Fio => return None,
            Kind::Berth(flags) => {
                let cache = if disk.backing.direct() {
                    "none"
                } else {
                    "writeback"
                };
                command
                    .arg(format!("--socket-path={socket}"))
                    .arg(format!("--blk-file={path}"))
                    .arg(format!("--cache={cache}"))
                    .arg(format!("--num-queues={queues}"))
                    .args(flags);
            }
            Kind::Qsd { aio, iothread } => {
                let driver = match disk.backing {
                    Backing::Zram => "host_device",
                    Backing::File | Backing::Cache => "file",
                };
                let direct = if disk.backing.direct() { "on" } else { "off" };
                let thread = if *iothread { ",iothread=t" } else { "" };
                if *iothread {
                    command.args(["--object", "iothread,id=t"]);
                }
                command
                    .arg("--blockdev")
                    .arg(format!(
                        "driver={driver},node-name=disk,filename={path},cache.direct={direct},aio={aio}"
                    ))
                    .arg("--export")
                    .arg(format!(
                        "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={queues},\
                         addr.type=unix,addr.path={socket}{thread}"
                    ));
            }
            Kind::CloudHypervisor => {
                let direct = disk.backing.direct();
                command.arg("--block-backend").arg(format!(
                    "path={path},socket={socket},num_queues={queues},queue_size=1024,readonly=false,direct={direct}"
                ));
            }
        }
        Some(command)
    }
}

/// A program by name, from the PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
}

/// Where programs are that were named, or are looked for.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// `--berth-blk`; beside this program without it.
    pub berth: Option<PathBuf>,
    /// `--cloud-hypervisor`.
    pub cloud_hypervisor: Option<PathBuf>,
}

/// All who can be measured here, and a line for each who cannot.
pub fn all(programs: &Programs, variants: &[Variant]) -> Result<(Vec<Subject>, Vec<String>)> {
    let mut subjects = Vec::new();
    let mut absent = Vec::new();
    let mut add = |name: &str, kind: Kind, program: Option<PathBuf>| {
        let name = name.to_owned();
        subjects.push(Subject {
            name,
            kind,
            program,
        });
    };
    add(LOOP, Kind::Limit(Direct::Uring), None);
    let berth = match &programs.berth {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("berth-blk"),
    };
    if !berth.is_file() {
        bail!(
            "no {}: build it with 'cargo build --release -p berth-blk', or name one with --berth-blk",
            berth.display()
        );
    }
    add("berth-blk", Kind::Berth(Vec::new()), Some(berth.clone()));
    for (name, flag) in [
        (IO_URING_ONLY, "--engine=io-uring"),
        ("berth-nopoll", "--poll-us=0"),
    ] {
        add(
            name,
            Kind::Berth(vec![flag.to_owned()]),
            Some(berth.clone()),
        );
    }
    for variant in variants {
        let program = variant.program.as_ref().unwrap_or(&berth).clone();
        add(
            &variant.name,
            Kind::Berth(variant.flags.clone()),
            Some(program),
        );
    }
    match on_path("qemu-storage-daemon") {
        Some(program) => {
            for (name, aio, iothread) in [
                ("qsd-io_uring", "io_uring", false),
                ("qsd-native", "native", false),
                ("qsd-threads", "threads", false),
                ("qsd-iothread", "io_uring", true),
            ] {
                add(name, Kind::Qsd { aio, iothread }, Some(program.clone()));
            }
        }
        None => absent.push("qemu-storage-daemon: install Debian's qemu-utils".to_owned()),
    }
    let program = programs.cloud_hypervisor.clone();
    match program.or_else(|| on_path("vhost_user_block")) {
        Some(program) => add("cloud-hypervisor", Kind::CloudHypervisor, Some(program)),
        None => absent.push(
            "Cloud Hypervisor's vhost_user_block: build it from its source tree (cargo build \
             --release -p vhost_user_block) and name it with --cloud-hypervisor"
                .to_owned(),
        ),
    }
    match on_path("fio") {
        Some(program) => add(FIO, Kind::Fio, Some(program)),
        None => absent.push("fio, a check on our own loop: install Debian's fio".to_owned()),
    }
    add("loop-aio", Kind::Limit(Direct::Aio), None);
    add("loop-pread", Kind::Limit(Direct::Sync), None);
    Ok((subjects, absent))
}

/// Of `subjects` those with a name in `wanted` (all without any), the limit first and always; and the
/// limit's name: `limit`, or fio, or our loop where fio is not.
pub fn select(
    subjects: Vec<Subject>,
    wanted: &[String],
    limit: Option<&str>,
) -> Result<(Vec<Subject>, String)> {
    let there = |name: &str| subjects.iter().any(|subject| subject.name == name);
    let limit = limit.unwrap_or(if there(FIO) { FIO } else { LOOP });
    for want in wanted.iter().map(String::as_str).chain([limit]) {
        if !there(want) {
            let names: Vec<&str> = subjects.iter().map(|s| s.name.as_str()).collect();
            bail!("no subject '{want}' here; there are {}", names.join(", "));
        }
    }
    let limit = limit.to_owned();
    let keep = |subject: &Subject| {
        wanted.is_empty() || subject.name == limit || wanted.contains(&subject.name)
    };
    let mut kept: Vec<Subject> = subjects.into_iter().filter(keep).collect();
    kept.sort_by_key(|subject| subject.name != limit);
    Ok((kept, limit))
}

/// Our daemon once more: other flags, or another build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// What the table calls it.
    pub name: String,
    /// Another build.
    pub program: Option<PathBuf>,
    /// Flags more.
    pub flags: Vec<String>,
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

/// What one of the limits can do with `load`: a plain system call has a depth of one, whatever was asked.
pub fn effective_depth(kind: &Kind, load: &Load) -> usize {
    match kind {
        Kind::Limit(Direct::Sync) => 1,
        _ => load.depth,
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

    #[test]
    fn the_limit_is_always_there_and_comes_first() {
        let subject = |name: &str| Subject {
            name: name.to_owned(),
            kind: Kind::Fio,
            program: None,
        };
        let all = || vec![subject(LOOP), subject("peer"), subject(FIO)];
        let names = |(kept, limit): (Vec<Subject>, String)| {
            let kept: Vec<String> = kept.into_iter().map(|subject| subject.name).collect();
            format!("{limit}: {}", kept.join(" "))
        };
        let kept = select(all(), &["peer".to_owned()], None).unwrap();
        assert_eq!(names(kept), "fio-io_uring: fio-io_uring peer");
        let kept = select(all(), &[], Some(LOOP)).unwrap();
        assert_eq!(
            names(kept),
            "loop-io_uring: loop-io_uring peer fio-io_uring"
        );
        let kept = select(vec![subject(LOOP)], &[], None).unwrap();
        assert_eq!(names(kept), "loop-io_uring: loop-io_uring");
        assert!(select(all(), &["qsd".to_owned()], None).is_err());
        assert!(select(all(), &[], Some("qsd")).is_err());
    }

    #[test]
    fn only_what_makes_sense_is_run_in_the_page_cache() {
        let qsd = |aio| Subject {
            name: String::new(),
            kind: Kind::Qsd {
                aio,
                iothread: false,
            },
            program: None,
        };
        assert!(qsd("native").fits(Backing::File) && !qsd("native").fits(Backing::Cache));
        assert!(!qsd("threads").fits(Backing::Zram) && qsd("threads").fits(Backing::Cache));
        assert!(qsd("io_uring").fits(Backing::Cache));
    }
}
