//! The VMs of this host: a folder of API sockets, and what is asked of each.
//!
//! ```text
//!   FOLDER/*.sock ─▶ vmm.ping (pid), vm.info (state, domain, balloon), vm.memory-sample (what is offered) ─▶ sample::Vm
//!   actions ──────▶ vm.memory-advice, vm.resize {desired_balloon}
//!   compare ──────▶ PUT vm.memory-sample of all VMs of the domain, on a thread of its own
//! ```
//!
//! A VM that does not answer is left alone for a time that doubles, so that it holds up nobody else. The key of the hashes
//! is random for each start of the tuner and leaves it only to VMMs of the domain.
//!
//! A VMM says its process id itself; its cgroup is touched only where the kernel names the same process for the socket.

mod client;
pub mod compare;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;

use berth_vmm_api_types::v1 as wire;
use serde_json::{Value, json};

pub use client::{Api, Error};

use crate::sample::{self, Balloon, GuestMemory, Roots, Vm};

/// How long a VM may take for one of the questions that are asked every second.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long it may take to advise or to hash.
const LONG_PATIENCE: Duration = Duration::from_secs(60);
/// First and longest time for which a VM that does not answer is left alone.
const REST_MS: (u64, u64) = (1_000, 60_000);
/// Age from which a guest's figures are none.
const STALE_MS: u64 = 10_000;
/// Bytes of which hashes are asked for at a time.
const PIECE: u64 = 1 << 30;

/// The folder.
#[derive(Debug)]
pub struct Directory {
    folder: PathBuf,
    silent: BTreeMap<String, Silent>,
    /// Sockets of the VMs of the last look.
    sockets: BTreeMap<String, PathBuf>,
}

/// A VM that did not answer.
#[derive(Debug)]
struct Silent {
    until_ms: u64,
    rest_ms: u64,
}

impl Directory {
    /// A folder, which need not be there yet.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            silent: BTreeMap::new(),
            sockets: BTreeMap::new(),
        }
    }

    /// The socket of a VM of the last look.
    pub fn socket(&self, vm: &str) -> Option<&Path> {
        self.sockets.get(vm).map(PathBuf::as_path)
    }

    /// All VMs that answer.
    pub fn look(&mut self, roots: &Roots, now_ms: u64) -> BTreeMap<String, Vm> {
        self.sockets = sockets(&self.folder);
        let sockets = &self.sockets;
        self.silent.retain(|name, _| sockets.contains_key(name));
        let mut vms = BTreeMap::new();
        for (name, socket) in &self.sockets {
            if self
                .silent
                .get(name)
                .is_some_and(|silent| now_ms < silent.until_ms)
            {
                continue;
            }
            match ask(socket, roots) {
                Ok(vm) => {
                    self.silent.remove(name);
                    vms.extend(vm.map(|vm| (name.clone(), vm)));
                }
                Err(error) => {
                    let silent = self.silent.entry(name.clone()).or_insert(Silent {
                        until_ms: 0,
                        rest_ms: REST_MS.0 / 2,
                    });
                    silent.rest_ms = (2 * silent.rest_ms).min(REST_MS.1);
                    silent.until_ms = now_ms + silent.rest_ms;
                    tracing::debug!(vm = name, error = crate::chain(&error), "does not answer");
                }
            }
        }
        vms
    }
}

/// Sockets of a folder by name, `NAME.sock` or `NAME`.
fn sockets(folder: &Path) -> BTreeMap<String, PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(entries) = std::fs::read_dir(folder) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let name = name.strip_suffix(".sock").unwrap_or(&name);
            Some((name.to_owned(), entry.path()))
        })
        .collect()
}

/// Asks one VM; `None` for a VMM without a guest.
fn ask(socket: &Path, roots: &Roots) -> Result<Option<Vm>, Error> {
    let api = Api::new(socket, PATIENCE);
    let ping: wire::VmmPing = api.get("vmm.ping")?;
    // Whole, for what is newer than our types.
    let whole: Value = match api.get("vm.info") {
        Ok(info) => info,
        Err(Error::Refused { status: 404, .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let info: wire::VmInfo =
        serde_json::from_value(whole.clone()).map_err(|error| Error::Answer {
            request: "GET vm.info".to_owned(),
            reason: error.to_string(),
        })?;
    let pid = u32::try_from(ping.pid).unwrap_or(0);
    let memory: wire::MemoryMergeable = match api.get("vm.memory-sample") {
        Ok(memory) => memory,
        // Without a machine, or a VMM of somebody else's.
        Err(Error::Refused { .. }) => wire::MemoryMergeable::default(),
        Err(error) => return Err(error),
    };
    let bytes = |ranges: &[wire::MemoryRange]| ranges.iter().map(|range| range.len).sum();
    let (ksm, cgroup) = sample::of_process(roots, pid);
    Ok(Some(Vm {
        pid,
        running: info.state == wire::VmState::Running,
        size_bytes: info.config.memory.size,
        mergeable_bytes: bytes(&memory.mergeable),
        advised_bytes: bytes(&memory.offered),
        domain: memory.trust_domain,
        ksm,
        balloon: balloon(&whole["balloon"]),
        cgroup: cgroup.filter(|_| api.peer_pid() == Some(pid)),
        compared: None,
    }))
}

/// `balloon` of `vm.info`: `{target, actual, stats: {name: number}}`.
fn balloon(value: &Value) -> Option<Balloon> {
    let stats = &value["stats"];
    // What a guest said long ago is not to be relied on.
    let fresh = value["stats_age_ms"]
        .as_u64()
        .is_none_or(|age| age <= STALE_MS);
    let number = |name: &str| stats[name].as_u64().filter(|_| fresh);
    let guest = number("total_memory").zip(number("available_memory"));
    Some(Balloon {
        target_bytes: value["target"].as_u64()?,
        actual_bytes: value["actual"].as_u64()?,
        guest: guest.map(|(total_bytes, available_bytes)| GuestMemory {
            total_bytes,
            available_bytes,
            oom_kills: number("oom_kill"),
            alloc_stalls: number("alloc_stall"),
            direct_scans: number("direct_scan"),
            swap_in: number("swap_in"),
        }),
    })
}

/// Has a VM offer memory or withdraw it.
pub fn advise(
    socket: &Path,
    trust_domain: &str,
    merge: bool,
    ranges: &[(u64, u64)],
) -> Result<(), Error> {
    let ranges = joined(ranges);
    let advice = match merge {
        true => wire::Advice::Mergeable,
        false => wire::Advice::Unmergeable,
    };
    let api = Api::new(socket, LONG_PATIENCE);
    // A request has to fit the VMM's limit on bodies, and none at all means everything.
    let whole: [&[wire::MemoryRange]; 1] = [&[]];
    let pieces: Vec<&[wire::MemoryRange]> = match ranges.is_empty() {
        true => whole.to_vec(),
        false => ranges.chunks(512).collect(),
    };
    for ranges in pieces {
        let advice = wire::MemoryAdvice {
            trust_domain: trust_domain.to_owned(),
            advice,
            ranges: ranges.to_vec(),
        };
        api.tell("vm.memory-advice", &advice)?;
    }
    Ok(())
}

/// Ranges that touch become one.
fn joined(ranges: &[(u64, u64)]) -> Vec<wire::MemoryRange> {
    let mut joined: Vec<wire::MemoryRange> = Vec::new();
    for (start, len) in ranges {
        match joined.last_mut() {
            Some(last) if last.start + last.len == *start => last.len += len,
            _ => joined.push(wire::MemoryRange {
                start: *start,
                len: *len,
            }),
        }
    }
    joined
}

/// Has a balloon hold so much.
pub fn resize(socket: &Path, bytes: u64) -> Result<(), Error> {
    Api::new(socket, PATIENCE).tell("vm.resize", &json!({ "desired_balloon": bytes }))
}

/// Name of a VM and hashes of its pages.
pub type Hashes = (String, Result<compare::Pages, Error>);

/// Asks these VMs for hashes, one after the other, on a thread of its own; what they say goes to `to`.
pub fn hash<T: Send + 'static>(
    vms: Vec<(String, PathBuf)>,
    trust_domain: String,
    key: Key,
    to: Sender<T>,
    wrap: fn(Hashes) -> T,
) -> io::Result<()> {
    let work = move || {
        for (name, socket) in vms {
            let hashes = hashes(&socket, &trust_domain, &key);
            if to.send(wrap((name, hashes))).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("compare".to_owned())
        .spawn(work)
        .map(drop)
}

fn hashes(socket: &Path, trust_domain: &str, key: &Key) -> Result<compare::Pages, Error> {
    let api = Api::new(socket, LONG_PATIENCE);
    let memory: wire::MemoryMergeable = api.get("vm.memory-sample")?;
    let mut extents = Vec::new();
    for range in compare::without(&memory.mergeable, &[], PIECE) {
        let request = wire::MemorySample {
            trust_domain: trust_domain.to_owned(),
            key: key.hex(),
            one_of: compare::ONE_OF,
            range,
        };
        let answer: wire::MemoryHashes = api.put("vm.memory-sample", &request)?;
        extents.extend(answer.extents);
    }
    Ok(compare::Pages {
        extents,
        offered: memory.offered,
    })
}

/// Key of the hashes.
#[derive(Clone)]
pub struct Key([u8; 16]);

impl Key {
    /// A new one.
    pub fn random() -> io::Result<Self> {
        let mut key = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
        Ok(Self(key))
    }

    fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

#[cfg(test)]
mod tests;
