//! What the device says about itself: feature bits and configuration space.
//!
//! Everything offered here works: a bit appears only if the port can do it (segmentation of UDP)
//! or what it needs is known (an address, an MTU, more than one pair).
//!
//! Spec: virtio 1.3, 5.1.3 (feature bits), 5.1.4 (configuration layout).

#![forbid(unsafe_code)]

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use crate::mac::Mac;

/// VIRTIO_F_VERSION_1; queue-worker offers it for every device.
pub const VIRTIO_F_VERSION_1: u32 = 32;

/// Least MTU that a guest may be told (virtio 1.3, 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// Most queue pairs of one device.
pub const MAX_PAIRS: u16 = 8;

/// Offloads of the receive direction, which CTRL_GUEST_OFFLOADS switches.
pub const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Offloads with which a frame may be much longer than the MTU.
pub const GUEST_SEGMENTATION: u64 =
    GUEST_OFFLOADS & !(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN);

const USO: u64 =
    1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6 | 1 << VIRTIO_NET_F_HOST_USO;

/// Whether bit number `feature` is set in `features`.
#[must_use]
pub fn has(features: u64, feature: u32) -> bool {
    features & (1 << feature) != 0
}

/// What the operator fixed about the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The guest's address, if we are to tell it.
    pub mac: Option<Mac>,
    /// The MTU, if we are to tell the guest.
    pub mtu: Option<u16>,
    /// Queue pairs.
    pub pairs: u16,
}

impl Identity {
    /// Feature bits of the network device; `uso` says whether the port segments UDP.
    #[must_use]
    pub fn features(&self, uso: bool) -> u64 {
        let mut bits = GUEST_OFFLOADS & !USO
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_RX
            | 1 << VIRTIO_NET_F_CTRL_VLAN
            | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
            | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
        if uso {
            bits |= USO;
        }
        if self.mac.is_some() {
            bits |= 1 << VIRTIO_NET_F_MAC;
        }
        if self.mtu.is_some() {
            bits |= 1 << VIRTIO_NET_F_MTU;
        }
        if self.pairs > 1 {
            bits |= 1 << VIRTIO_NET_F_MQ;
        }
        bits
    }

    /// Number of virtqueues: two a pair, and the control queue.
    #[must_use]
    pub fn num_queues(&self) -> u16 {
        2 * self.pairs + 1
    }
}

/// Bytes of the configuration space: up to and with `mtu`; what follows belongs to features that
/// are not offered.
pub const CONFIG_LEN: usize = 12;

/// What the configuration space says.
#[derive(Debug, Clone, Copy)]
pub struct ConfigSpace {
    /// The device's address, if it has one.
    pub mac: Option<Mac>,
    /// VIRTIO_NET_S_* bits.
    pub status: u16,
    /// Queue pairs.
    pub pairs: u16,
    /// The MTU, if the guest is told.
    pub mtu: Option<u16>,
}

/// The bytes of it.
#[must_use]
pub fn config_space(space: &ConfigSpace) -> [u8; CONFIG_LEN] {
    let mut bytes = [0; CONFIG_LEN];
    if let Some(mac) = space.mac {
        bytes[..6].copy_from_slice(&mac.0);
    }
    bytes[6..8].copy_from_slice(&space.status.to_le_bytes());
    bytes[8..10].copy_from_slice(&space.pairs.to_le_bytes());
    bytes[10..].copy_from_slice(&space.mtu.unwrap_or(0).to_le_bytes());
    bytes
}

/// What a virtqueue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Frames to the guest, of this pair.
    Receive(u16),
    /// Frames from the guest, of this pair.
    Transmit(u16),
    /// Commands.
    Control,
}

impl Role {
    /// Role of virtqueue `queue` (virtio 1.3, 5.1.2): the control queue comes behind all pairs if
    /// MQ was negotiated, else behind the first. None: there is no such queue.
    #[must_use]
    pub fn of(queue: u16, features: u64, max_pairs: u16) -> Option<Self> {
        let pairs = if has(features, VIRTIO_NET_F_MQ) {
            max_pairs
        } else {
            1
        };
        let control = has(features, VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs);
        if control == Some(queue) {
            Some(Self::Control)
        } else if queue >= 2 * max_pairs {
            None
        } else if queue.is_multiple_of(2) {
            Some(Self::Receive(queue / 2))
        } else {
            Some(Self::Transmit(queue / 2))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Identity = Identity {
        mac: None,
        mtu: None,
        pairs: 1,
    };
    const FULL: Identity = Identity {
        mac: Some(Mac([2, 0, 0, 0, 0, 1])),
        mtu: Some(9000),
        pairs: 4,
    };
    const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
    const CTRL_VQ: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;

    #[test]
    fn offers_only_what_there_is() {
        let conditional = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MQ,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ];
        for bit in conditional {
            assert!(!has(PLAIN.features(false), bit), "bit {bit}");
            assert!(has(FULL.features(true), bit), "bit {bit}");
        }
        assert!(has(PLAIN.features(false), VIRTIO_NET_F_GUEST_TSO4));
        // UFO is deprecated, hash reports and RSS are not implemented
        for bit in [10, 14, 57, 60] {
            assert!(!has(FULL.features(true), bit), "bit {bit}");
        }
    }

    #[test]
    fn config_space_layout() {
        let full = ConfigSpace {
            mac: FULL.mac,
            status: 3,
            pairs: 4,
            mtu: Some(9000),
        };
        let space = config_space(&full);
        assert_eq!(space, [2, 0, 0, 0, 0, 1, 3, 0, 4, 0, 0x28, 0x23]);
        let plain = ConfigSpace {
            mac: None,
            status: 0,
            pairs: 1,
            mtu: None,
        };
        assert_eq!(config_space(&plain), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn control_queue_moves_with_mq() {
        assert_eq!(Role::of(0, MQ | CTRL_VQ, 4), Some(Role::Receive(0)));
        assert_eq!(Role::of(7, MQ | CTRL_VQ, 4), Some(Role::Transmit(3)));
        assert_eq!(Role::of(8, MQ | CTRL_VQ, 4), Some(Role::Control));
        assert_eq!(Role::of(2, CTRL_VQ, 4), Some(Role::Control));
        assert_eq!(Role::of(2, CTRL_VQ, 1), Some(Role::Control));
        assert_eq!(Role::of(2, 0, 1), None);
        // QEMU keeps the control queue, yet uses every pair
        assert_eq!(Role::of(2, MQ, 2), Some(Role::Receive(1)));
        assert_eq!(Role::of(4, MQ, 2), None);
        assert_eq!(Role::of(9, MQ | CTRL_VQ, 4), None);
    }
}
