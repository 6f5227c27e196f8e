//! Devices that other processes serve, one root port each.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::shared_fd::SharedFd;

/// One `--disk`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Name in `vm.info` and `vm.counters`, `_disk0` unless given.
    pub id: String,
    /// The daemon behind it.
    pub backend: VhostUserConfig,
    /// Whether the guest must not write.
    pub readonly: bool,
}

/// One `--net`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Name in `vm.info` and `vm.counters`, `_net0` unless given.
    pub id: String,
    /// The daemon behind it.
    pub backend: VhostUserConfig,
    /// Hardware address that the guest sees, else the backend's.
    pub mac: Option<[u8; 6]>,
}

/// One `--fs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsConfig {
    /// Name in `vm.info` and `vm.counters`, `_fs0` unless given.
    pub id: String,
    /// What the guest mounts it by, 1 to 36 bytes.
    pub tag: String,
    /// The daemon behind it; the queue for urgent requests is not counted.
    pub backend: VhostUserConfig,
}

/// One `--generic-vhost-user`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenericConfig {
    /// Name in `vm.info` and `vm.counters`, `_generic_vhost_user0` unless given.
    pub id: String,
    /// Virtio's number of the device type, 1 to 63.
    pub device_type: u32,
    /// The daemon behind it.
    pub link: Link,
    /// Descriptors of each queue, powers of two from 2 to 32768.
    pub queue_sizes: Vec<u16>,
    /// How it reaches guest memory.
    pub dma: Dma,
}

/// A vhost-user backend and its queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserConfig {
    /// How it is reached.
    pub link: Link,
    /// Virtqueues: of a disk 1 to 64; of a network card receive and transmit together, so even, and
    /// the control queue not counted.
    pub num_queues: u16,
    /// Descriptors of a queue, a power of two from 2 to 32768.
    pub queue_size: u16,
    /// How it reaches guest memory.
    pub dma: Dma,
}

/// How a device reaches guest memory, where that is not all shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dma {
    /// As the memory has it: by a DMA window, else by shadow queues.
    #[default]
    Auto,
    /// By a DMA window and by nothing else.
    Window,
    /// By shadow queues.
    Shadow,
}

/// How a backend is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// It listens on this socket.
    Connect(PathBuf),
    /// We listen on this socket.
    Listen(PathBuf),
    /// We start it.
    Start(Box<Daemon>),
}

impl Link {
    /// The socket, if it has a path.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Connect(path) | Self::Listen(path) => Some(path),
            Self::Start(_) => None,
        }
    }
}

/// A daemon that is started for a device and ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// The program, else ours.
    pub program: Option<PathBuf>,
    /// What it serves.
    pub serves: Serves,
}

/// What a daemon serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Serves {
    /// A disk.
    Image(Image),
    /// A network card.
    Tap(Tap),
}

/// A disk's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Raw file or block device.
    pub path: PathBuf,
    /// Whether it is read and written past the host's page cache.
    pub direct: bool,
    /// What the guest sees as the disk's serial number, at most 20 bytes.
    pub serial: Option<String>,
    /// What the disk is held to.
    pub limit: RateLimit,
}

/// A network card's other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// Which one.
    pub source: TapSource,
    /// Largest packet, else the tap's.
    pub mtu: Option<u16>,
    /// What each direction is held to.
    pub limit: RateLimit,
}

/// Which tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapSource {
    /// The one of this name; made where there is none.
    Name(String),
    /// The one behind these descriptors, one for each pair of queues.
    Fds(Vec<SharedFd>),
}

/// A limit on bytes and on requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes.
    pub bandwidth: Option<Bucket>,
    /// Requests or frames.
    pub ops: Option<Bucket>,
}

/// A bucket of tokens that fills up in a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// What it holds.
    pub size: u64,
    /// What may be spent once beyond that.
    pub one_time_burst: u64,
    /// Time in which an empty one is full again.
    pub refill_ms: u64,
}
