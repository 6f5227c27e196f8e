//! Devices below root ports, as clients write and read them: `vm.create`, `vm.add-…`, `vm.info`.
//!
//! Defaults are Cloud Hypervisor's.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A disk: an image that a daemon of ours serves, or the socket of another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskConfig {
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Image or block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether writes are refused.
    pub readonly: bool,
    /// Whether the image is read and written past the host's page cache.
    pub direct: bool,
    /// Virtqueues.
    pub num_queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Whether a process that others started serves the disk.
    pub vhost_user: bool,
    /// Socket of that process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// What the guest sees as the disk's serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Format of the image; none but `Raw` is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_type: Option<String>,
    /// What the disk is held to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Daemon to start instead of `berth-blk`. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<PathBuf>,
    /// How it reaches guest memory. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dma: Option<Dma>,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            id: None,
            path: None,
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            vhost_user: false,
            vhost_socket: None,
            serial: None,
            image_type: None,
            rate_limiter_config: None,
            backend: None,
            dma: None,
        }
    }
}

/// A network card: a tap that a daemon of ours serves, or the socket of another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetConfig {
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of a tap; made where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Descriptors of a tap, one for each pair of queues; with `vm.add-net` they come with the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
    /// Its address in the guest, such as `52:54:00:12:34:56`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Largest packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Virtqueues, two for each pair.
    pub num_queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Whether a process that others started serves the card.
    pub vhost_user: bool,
    /// Socket of that process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Who listens on the socket.
    pub vhost_mode: VhostMode,
    /// What each direction is held to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Daemon to start instead of `berth-net`. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<PathBuf>,
    /// How it reaches guest memory. Ours alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dma: Option<Dma>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: None,
            tap: None,
            fds: None,
            mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::Client,
            rate_limiter_config: None,
            backend: None,
            dma: None,
        }
    }
}

/// Which end of a vhost-user socket the VMM is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// It connects.
    #[default]
    Client,
    /// It listens.
    Server,
}

/// How a device reaches guest memory that is not all shared, where it is not left to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dma {
    /// By a DMA window that the guest keeps to.
    Window,
    /// By queues that the VMM copies from and to.
    Shadow,
}

/// A folder of the host, shared by a virtiofs daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsConfig {
    /// Its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name under which the guest mounts it.
    pub tag: String,
    /// Socket of the daemon.
    pub socket: PathBuf,
    /// Request queues; one more is for urgent ones.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors of each.
    #[serde(default = "kibi")]
    pub queue_size: u16,
    /// How it reaches guest memory. Ours alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dma: Option<Dma>,
}

fn one() -> u16 {
    1
}

fn kibi() -> u16 {
    1024
}

/// A device of any type behind a vhost-user socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenericVhostUserConfig {
    /// Its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Virtio's number of the device type.
    #[serde(alias = "virtio_id")]
    pub device_type: u32,
    /// Socket of the daemon.
    pub socket: PathBuf,
    /// Descriptors of each queue.
    pub queue_sizes: Vec<u16>,
    /// How it reaches guest memory. Ours alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dma: Option<Dma>,
}

/// A limit on bytes and on requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// A bucket of tokens that fills up in a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// What it holds.
    pub size: u64,
    /// What may be spent once beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty one is full again.
    pub refill_time: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_with_cloud_hypervisor() {
        let disk: DiskConfig = serde_json::from_str(r#"{"path": "/d"}"#).unwrap();
        assert_eq!((disk.num_queues, disk.queue_size), (1, 128));
        let net: NetConfig = serde_json::from_str(r#"{"tap": "tap0"}"#).unwrap();
        assert_eq!((net.num_queues, net.queue_size), (2, 256));
        assert_eq!(net.vhost_mode, VhostMode::Client);
        let fs: FsConfig = serde_json::from_str(r#"{"tag": "t", "socket": "/s"}"#).unwrap();
        assert_eq!((fs.num_queues, fs.queue_size), (1, 1024));
        assert!(serde_json::from_str::<FsConfig>(r#"{"tag": "t"}"#).is_err());
    }

    #[test]
    fn both_names_of_a_device_type_and_a_limit_are_read() {
        let text = r#"{"virtio_id": 26, "socket": "/s", "queue_sizes": [64, 64]}"#;
        let device: GenericVhostUserConfig = serde_json::from_str(text).unwrap();
        assert_eq!(device.device_type, 26);
        let text = r#"{"path": "/d", "rate_limiter_config":
            {"bandwidth": {"size": 1000, "refill_time": 100}}}"#;
        let disk: DiskConfig = serde_json::from_str(text).unwrap();
        let limit = disk.rate_limiter_config.unwrap();
        assert_eq!(limit.bandwidth.unwrap().refill_time, 100);
        assert_eq!(limit.ops, None);
    }
}
