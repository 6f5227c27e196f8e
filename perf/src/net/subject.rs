//! Who is measured: our daemon, DPDK's and Cloud Hypervisor's, and plain reads and writes.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::{tap, testpmd};
use crate::args::{Common, NetArgs};
use crate::subject::on_path;

/// Whose goals the cells have.
pub(super) const OURS: &str = "berth-net";
/// Plain reads and writes on a tap.
const LIMIT: &str = "tap";

/// How a subject is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// read and write on the tap.
    Limit,
    /// Our daemon with these flags more.
    Berth(Vec<String>),
    /// testpmd between net_vhost and net_tap.
    Dpdk,
    /// Cloud Hypervisor's daemon.
    CloudHypervisor,
}

/// One of those who are compared.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    /// What `--subject` and the table call it.
    pub(super) name: String,
    /// How it is run.
    pub(super) kind: Kind,
    program: PathBuf,
}

impl Subject {
    /// The daemon's command; it makes the tap.
    pub(super) fn command(&self, socket: &Path, cpu: usize) -> Option<Command> {
        let socket = socket.display();
        let mut command = Command::new(&self.program);
        match &self.kind {
            Kind::Limit => return None,
            Kind::Berth(flags) => {
                command
                    .arg(format!("--socket-path={socket}"))
                    .arg(format!("--tap={}", tap::NAME))
                    .arg("--create")
                    .args(flags);
            }
            Kind::Dpdk => {
                command
                    .args(testpmd::environment(cpu, "peer"))
                    .arg(format!("--vdev=net_vhost0,iface={socket},queues=1"))
                    .arg(format!("--vdev=net_tap0,iface={}", tap::NAME))
                    .arg("--")
                    .args(testpmd::memory())
                    .args(["--forward-mode=io", "--auto-start"]);
            }
            Kind::CloudHypervisor => {
                command.arg("--net-backend").arg(format!(
                    "ip=192.0.2.1,mask=255.255.255.0,socket={socket},tap={},num_queues=2,queue_size=1024",
                    tap::NAME
                ));
            }
        }
        Some(command)
    }
}

/// All who can be measured here, and a line for each who cannot.
pub(super) fn all(args: &NetArgs) -> Result<(Vec<Subject>, Vec<String>)> {
    let berth = match &args.berth_net {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("berth-net"),
    };
    if !berth.is_file() {
        bail!(
            "no {}: build it with 'cargo build --release -p berth-net', or name one with --berth-net",
            berth.display()
        );
    }
    let mut subjects = Vec::new();
    let mut absent = Vec::new();
    let mut add = |name: &str, kind: Kind, program: PathBuf| {
        let name = name.to_owned();
        subjects.push(Subject {
            name,
            kind,
            program,
        });
    };
    add(LIMIT, Kind::Limit, PathBuf::new());
    add(OURS, Kind::Berth(Vec::new()), berth.clone());
    for variant in &args.common.variant {
        let program = variant.program.as_ref().unwrap_or(&berth).clone();
        add(&variant.name, Kind::Berth(variant.flags.clone()), program);
    }
    match testpmd::find() {
        Ok(program) if testpmd::has_driver("vhost") && testpmd::has_driver("tap") => {
            add("dpdk-tap", Kind::Dpdk, program);
        }
        Ok(_) => absent.push(
            "DPDK as a daemon: install Debian's librte-net-vhost and librte-net-tap".to_owned(),
        ),
        Err(error) => absent.push(format!("{error:#}")),
    }
    let program = args.cloud_hypervisor.clone();
    match program.or_else(|| on_path("vhost_user_net")) {
        Some(program) => add("cloud-hypervisor", Kind::CloudHypervisor, program),
        None => absent.push(
            "Cloud Hypervisor's vhost_user_net: build it from its source tree (cargo build --release \
             -p vhost_user_net) and name it with --cloud-hypervisor"
                .to_owned(),
        ),
    }
    Ok((subjects, absent))
}

/// Those that were asked for, the limit first and always; and its name.
pub(super) fn select(subjects: Vec<Subject>, common: &Common) -> Result<(Vec<Subject>, String)> {
    let limit = common.limit.as_deref().unwrap_or(LIMIT).to_owned();
    let mut wanted = common.subject.clone();
    if !wanted.is_empty() {
        wanted.extend(common.variant.iter().map(|variant| variant.name.clone()));
    }
    for want in wanted.iter().chain([&limit]) {
        if !subjects.iter().any(|subject| subject.name == *want) {
            let names: Vec<&str> = subjects.iter().map(|s| s.name.as_str()).collect();
            bail!("no subject '{want}' here; there are {}", names.join(", "));
        }
    }
    let keep = |subject: &Subject| {
        wanted.is_empty() || subject.name == limit || wanted.contains(&subject.name)
    };
    let mut kept: Vec<Subject> = subjects.into_iter().filter(keep).collect();
    kept.sort_by_key(|subject| subject.name != limit);
    Ok((kept, limit))
}
