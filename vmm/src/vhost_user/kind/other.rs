//! Shared folders, and devices of which nothing is known but their type.
//!
//! A shared folder's configuration space is made here: daemons leave it to the frontend. Of any other
//! device everything is the backend's: its own feature bits pass, and its configuration space as it is.
//! References: virtio 1.3, 5.11 (file system device), 2.2 (feature bits), 5 (device types).

use virtio_bindings::virtio_ids::*;

use super::{ConfigLen, Found, Offer, RING};
use crate::config::{FsConfig, GenericConfig};

/// Queues of a shared folder beside those for requests: the first, for urgent ones.
pub(super) const FS_MORE_QUEUES: u16 = 1;
/// `struct virtio_fs_config`: a tag, and how many request queues there are.
const FS_TAG_LEN: usize = 36;
/// Feature bits that are a device type's own: 0 to 23 and 50 to 63.
const OWN: u64 = 0x00ff_ffff | !0 << 50;
/// The most that GET_CONFIG can carry.
const MAX_CONFIG_LEN: usize = 256;

pub(super) fn offer_fs(fs: &FsConfig, found: &Found) -> Result<Offer, String> {
    let configured = fs.backend.num_queues + FS_MORE_QUEUES;
    let queues = found.queues.map_or(configured, |said| said.min(configured));
    if queues <= FS_MORE_QUEUES {
        return Err(format!("it has {queues} queues, and a file system needs 2"));
    }
    let mut config = fs.tag.clone().into_bytes();
    config.resize(FS_TAG_LEN, 0);
    config.extend(u32::from(queues - FS_MORE_QUEUES).to_le_bytes());
    Ok(Offer {
        features: found.features & RING,
        backend_features: found.features & RING,
        config,
        queues,
        control: None,
    })
}

pub(super) fn offer_generic(generic: &GenericConfig, found: &Found) -> Result<Offer, String> {
    let configured = u16::try_from(generic.queue_sizes.len()).unwrap_or(u16::MAX);
    let queues = found.queues.map_or(configured, |said| said.min(configured));
    if queues == 0 {
        return Err("it has no queue".to_owned());
    }
    let features = found.features & (OWN | RING);
    Ok(Offer {
        features,
        backend_features: features,
        config: found.config.clone().unwrap_or_default(),
        queues,
        control: None,
    })
}

/// Bytes of a device type's configuration space (virtio 1.3, section 5, and the kernel's headers). Of a
/// type that is not here the backend is asked for less and less until it answers.
pub(super) fn config_len(device_type: u32) -> ConfigLen {
    let len = match device_type {
        VIRTIO_ID_RNG | VIRTIO_ID_I2C_ADAPTER | VIRTIO_ID_SCMI => 0,
        VIRTIO_ID_CAN => 2,
        VIRTIO_ID_VSOCK | VIRTIO_ID_GPIO => 8,
        VIRTIO_ID_CONSOLE => 12,
        VIRTIO_ID_GPU | VIRTIO_ID_SOUND => 16,
        VIRTIO_ID_SCSI => 36,
        VIRTIO_ID_FS => 40,
        VIRTIO_ID_CRYPTO => 56,
        VIRTIO_ID_BLOCK => 60,
        _ => return ConfigLen::UpTo(MAX_CONFIG_LEN),
    };
    ConfigLen::Exactly(len)
}
