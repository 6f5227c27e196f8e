//! Who else can be measured: each with the program that it is found by, and how to get it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// What `--against` and `--peer` call it.
    pub name: &'static str,
    /// What it is found by.
    pub found_by: FoundBy,
    /// What it is measured in.
    pub scenarios: &'static [&'static str],
    /// How to get it.
    pub how: &'static str,
}

/// What a peer is found by.
#[derive(Clone, Copy, Debug)]
pub enum FoundBy {
    /// One of these programs, on the PATH.
    Program(&'static [&'static str]),
    /// A file: a device of the kernel, or a setting.
    File(&'static str),
}

const QEMU: &str = "install Debian's qemu-system-x86";
const CLOUD_HYPERVISOR: &str = "build it from its source tree (cargo build --release), and put it on the PATH or name it with --peer";

/// All that we know.
pub const PEERS: &[Peer] = &[
    Peer {
        name: "qemu-q35",
        found_by: FoundBy::Program(&["qemu-system-x86_64"]),
        scenarios: &["boot", "overhead", "exits"],
        how: QEMU,
    },
    Peer {
        name: "qemu-storage-daemon",
        found_by: FoundBy::Program(&["qemu-storage-daemon"]),
        scenarios: &["blk", "overhead", "exits", "crash"],
        how: "install Debian's qemu-utils (qemu-system-common before trixie)",
    },
    Peer {
        name: "vhost-net",
        found_by: FoundBy::File("/dev/vhost-net"),
        scenarios: &["tcp"],
        how: "load the module vhost_net",
    },
    Peer {
        name: "dpdk",
        found_by: FoundBy::Program(&["dpdk-testpmd"]),
        scenarios: &["net"],
        how: "install Debian's dpdk-dev, librte-net-vhost and librte-net-tap (their names end in DPDK's ABI)",
    },
    Peer {
        name: "fio",
        found_by: FoundBy::Program(&["fio"]),
        scenarios: &["blk"],
        how: "install Debian's fio",
    },
    Peer {
        name: "cloud-hypervisor",
        found_by: FoundBy::Program(&["cloud-hypervisor"]),
        scenarios: &["boot", "overhead", "exits"],
        how: CLOUD_HYPERVISOR,
    },
    Peer {
        name: "cloud-hypervisor-blk",
        found_by: FoundBy::Program(&["vhost_user_block"]),
        scenarios: &["blk", "overhead", "crash"],
        how: CLOUD_HYPERVISOR,
    },
    Peer {
        name: "cloud-hypervisor-net",
        found_by: FoundBy::Program(&["vhost_user_net"]),
        scenarios: &["net", "overhead"],
        how: CLOUD_HYPERVISOR,
    },
    Peer {
        name: "firecracker",
        found_by: FoundBy::Program(&["firecracker"]),
        scenarios: &["boot", "overhead", "exits"],
        how: "put a release's binary on the PATH as firecracker, or name it with --peer",
    },
    Peer {
        name: "spdk",
        found_by: FoundBy::Program(&["spdk_vhost", "spdk_tgt"]),
        scenarios: &["blk"],
        how: "build SPDK's vhost target, and put it on the PATH as spdk_vhost or name it with --peer",
    },
    Peer {
        name: "ksmtuned",
        found_by: FoundBy::Program(&["ksmtuned"]),
        scenarios: &["memory"],
        how: "install Debian's ksmtuned",
    },
];

impl Peer {
    /// By its name.
    pub fn find(name: &str) -> Option<&'static Peer> {
        PEERS.iter().find(|peer| peer.name == name)
    }

    /// Where it is, if it is there.
    pub fn program(&self) -> Option<PathBuf> {
        match self.found_by {
            FoundBy::Program(names) => names.iter().find_map(|name| on_path(name)),
            FoundBy::File(path) => Some(PathBuf::from(path)).filter(|path| path.exists()),
        }
    }
}

/// A program by name, from the PATH; Debian has some that only the superuser runs.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// The name among `known` that is meant by one that is not there.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let like = |other| {
        let swapped = strsim::normalized_damerau_levenshtein(name, other);
        strsim::jaro_winkler(name, other).max(swapped)
    };
    let close = known
        .into_iter()
        .map(|other| (like(other), other))
        .max_by(|one, other| one.0.total_cmp(&other.0))?;
    (close.0 > 0.6).then_some(close.1)
}

/// "no KIND 'NAME'", with the nearest one or all of them.
pub fn unknown(kind: &str, name: &str, known: &[&str]) -> String {
    match nearest(name, known.iter().copied()) {
        Some(near) => format!("no {kind} '{name}': did you mean '{near}'?"),
        None => format!("no {kind} '{name}'; there are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_nearly_right_is_recognised() {
        let known = ["boot", "overhead", "exits"];
        assert_eq!(
            unknown("scenario", "overhaed", &known),
            "no scenario 'overhaed': did you mean 'overhead'?"
        );
        assert_eq!(nearest("bkl", ["net", "blk"]), Some("blk"));
        assert!(unknown("scenario", "zzz", &known).ends_with("boot, overhead, exits"));
    }

    #[test]
    fn programs_are_found_on_the_path_and_peers_by_name() {
        assert!(on_path("sh").is_some() && on_path("berth-no-such-program").is_none());
        assert!(Peer::find("firecracker").is_some() && Peer::find("fire").is_none());
    }
}
