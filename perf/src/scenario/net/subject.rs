//! Who is measured: our daemon, DPDK's and Cloud Hypervisor's, and plain reads and writes.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{tap, testpmd};
use crate::context::Context;
use crate::scenario;

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
    /// As the engine knows it.
    pub(super) who: scenario::Subject,
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

/// All who can be measured here; plain reads and writes are the limit.
pub(super) fn all(context: &mut Context) -> Result<Vec<Subject>> {
    let new = |who, kind, program| Subject { who, kind, program };
    let limit = scenario::Subject::limit(LIMIT);
    let mut subjects = vec![new(limit, Kind::Limit, PathBuf::new())];
    let ours = context.ours("berth-net")?;
    for build in &ours {
        let kind = Kind::Berth(Vec::new());
        subjects.push(new(build.subject.clone(), kind, build.program.clone()));
    }
    for variant in &context.variants {
        let program = variant
            .program
            .clone()
            .unwrap_or_else(|| ours[0].program.clone());
        let who = scenario::Subject::variant(&variant.name);
        subjects.push(new(who, Kind::Berth(variant.flags.clone()), program));
    }
    if let Some(program) = context.peer("dpdk") {
        if testpmd::has_driver("vhost") && testpmd::has_driver("tap") {
            subjects.push(new(
                scenario::Subject::peer("dpdk-tap"),
                Kind::Dpdk,
                program,
            ));
        } else {
            context.lacks(
                "dpdk",
                "install Debian's librte-net-vhost and librte-net-tap",
            );
        }
    }
    if let Some(program) = context.peer("cloud-hypervisor-net") {
        let who = scenario::Subject::peer("cloud-hypervisor-net");
        subjects.push(new(who, Kind::CloudHypervisor, program));
    }
    Ok(subjects)
}
