//! Feature bits that the library itself offers and understands.

use virtio_bindings::{virtio_config, virtio_ring};

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u32 = virtio_config::VIRTIO_F_VERSION_1;
/// VIRTIO_F_EVENT_IDX.
pub const RING_EVENT_IDX: u32 = virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_F_INDIRECT_DESC.
pub const RING_INDIRECT_DESC: u32 = virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u32 = 30;
/// VHOST_F_LOG_ALL: not the driver's, but the frontend's switch for the dirty log of a migration.
pub const LOG_ALL: u32 = 26;

/// What every device offers: the five above.
pub const COMMON: u64 = 1 << VERSION_1
    | 1 << RING_EVENT_IDX
    | 1 << RING_INDIRECT_DESC
    | 1 << PROTOCOL_FEATURES
    | 1 << LOG_ALL;
