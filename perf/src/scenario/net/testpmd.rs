//! DPDK's testpmd: the guest's side of every run, and one of the peers.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::cells::{Cell, Way};
use super::tap;
use crate::peers::on_path;
use crate::sys;

pub(super) const PROGRAM: &str = "dpdk-testpmd";
/// How to get it.
pub(super) const HOW: &str = "it is the frontend: install Debian's dpdk-dev, librte-net-virtio and librte-net-af-packet \
                              (their names end in DPDK's ABI, as in librte-net-virtio23)";
/// Where Debian has DPDK's drivers.
const DRIVERS: &str = "/usr/lib";

/// The program.
pub(super) fn find() -> Result<PathBuf> {
    on_path(PROGRAM).with_context(|| format!("no {PROGRAM}: {HOW}"))
}

/// Whether DPDK has the driver `librte_net_NAME`.
pub(super) fn has_driver(name: &str) -> bool {
    let wanted = format!("librte_net_{name}.so");
    let places = fs::read_dir(DRIVERS).into_iter().flatten().flatten();
    places
        .flat_map(|place| {
            fs::read_dir(place.path().join("dpdk"))
                .into_iter()
                .flatten()
        })
        .flatten()
        .flat_map(|pmds| fs::read_dir(pmds.path()).into_iter().flatten())
        .flatten()
        .any(|file| file.file_name().to_string_lossy().starts_with(&wanted))
}

/// One working thread on `cpu`, no huge pages, no devices of the machine.
pub(super) fn environment(cpu: usize, prefix: &str) -> Vec<String> {
    vec![
        format!("--lcores=0@{cpu},1@{cpu}"),
        "--no-huge".to_owned(),
        "-m".to_owned(),
        "256".to_owned(),
        "--no-pci".to_owned(),
        "--no-telemetry".to_owned(),
        // Unlike others that run now, and others of ours that did not clear up.
        format!("--file-prefix=berth-perf-{prefix}-{}", std::process::id()),
    ]
}

/// As many buffers as fit into that.
pub(super) fn memory() -> [&'static str; 1] {
    ["--total-num-mbufs=16384"]
}

/// The guest's side of a run; gone when dropped.
pub(super) struct Guest {
    child: Child,
}

impl Guest {
    /// Starts it on `cpu`; it is not ready yet.
    pub(super) fn start(cell: &Cell, socket: &Path, cpu: usize, log: &Path) -> Result<Guest> {
        let mut command = Command::new(find()?);
        command.args(environment(cpu, "guest")).arg(format!(
            "--vdev=net_virtio_user0,path={},queues=1,queue_size=1024",
            socket.display()
        ));
        if cell.way == Way::FromTap {
            command.arg(format!(
                "--vdev=net_af_packet0,iface={},qdisc_bypass=1",
                tap::NAME
            ));
        }
        command.arg("--").args(memory()).arg("--auto-start");
        match cell.way {
            Way::ToTap => command
                .arg("--forward-mode=txonly")
                .arg(format!("--txpkts={}", cell.frame)),
            Way::FromTap => command.arg("--forward-mode=io"),
        };
        let out = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        // It runs until its standard input ends.
        command
            .stdin(Stdio::piped())
            .stdout(out.try_clone()?)
            .stderr(out);
        sys::tie_child(&mut command, &[]);
        let child = command.spawn().context("cannot start dpdk-testpmd")?;
        Ok(Guest { child })
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub(super) fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Nothing it could still do is of use to anybody.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
