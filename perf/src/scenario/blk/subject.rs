//! Who is measured: our daemon, its peers, and the limit.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::backing::{Backing, Disk};
use super::target::Load;
use crate::context::Context;
use crate::scenario;

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
    /// As the engine knows it.
    pub who: scenario::Subject,
    /// How it is run.
    pub kind: Kind,
    /// The program; none for the limit.
    pub program: Option<PathBuf>,
}

/// fio's io_uring engine.
const FIO: &str = "fio-io_uring";
/// Our daemon with io_uring for everything, also where it does some requests on its own thread.
const IO_URING_ONLY: &str = "berth-io_uring";
/// Our own loop over io_uring, which batches more than fio does.
const LOOP: &str = "loop-io_uring";

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

/// All who can be measured here. fio, where it is, is the limit.
pub fn all(context: &mut Context) -> Result<Vec<Subject>> {
    let new = |who, kind, program: Option<PathBuf>| Subject { who, kind, program };
    let limit = |name: &str, kind| new(scenario::Subject::limit(name), kind, None);
    let mut subjects = Vec::new();
    if let Some(program) = context.peer("fio") {
        subjects.push(new(scenario::Subject::limit(FIO), Kind::Fio, Some(program)));
    }
    subjects.push(limit(LOOP, Kind::Limit(Direct::Uring)));
    let ours = context.ours("berth-blk")?;
    for build in &ours {
        let program = Some(build.program.clone());
        subjects.push(new(build.subject.clone(), Kind::Berth(Vec::new()), program));
    }
    for (name, flag) in [
        (IO_URING_ONLY, "--engine=io-uring"),
        ("berth-nopoll", "--poll-us=0"),
    ] {
        let kind = Kind::Berth(vec![flag.to_owned()]);
        let program = Some(ours[0].program.clone());
        subjects.push(new(scenario::Subject::variant(name), kind, program));
    }
    for variant in &context.variants {
        let program = variant
            .program
            .clone()
            .unwrap_or_else(|| ours[0].program.clone());
        let kind = Kind::Berth(variant.flags.clone());
        let who = scenario::Subject::variant(&variant.name);
        subjects.push(new(who, kind, Some(program)));
    }
    if let Some(program) = context.peer("qemu-storage-daemon") {
        for (name, aio, iothread) in [
            ("qsd-io_uring", "io_uring", false),
            ("qsd-native", "native", false),
            ("qsd-threads", "threads", false),
            ("qsd-iothread", "io_uring", true),
        ] {
            let who = scenario::Subject::peer(name);
            subjects.push(new(who, Kind::Qsd { aio, iothread }, Some(program.clone())));
        }
    }
    if let Some(program) = context.peer("cloud-hypervisor-blk") {
        let who = scenario::Subject::peer("cloud-hypervisor-blk");
        subjects.push(new(who, Kind::CloudHypervisor, Some(program)));
    }
    subjects.push(limit("loop-aio", Kind::Limit(Direct::Aio)));
    subjects.push(limit("loop-pread", Kind::Limit(Direct::Sync)));
    Ok(subjects)
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
    fn only_what_makes_sense_is_run_in_the_page_cache() {
        let qsd = |aio| Subject {
            who: scenario::Subject::peer("qsd"),
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
