//! The header in front of every frame, `struct virtio_net_hdr_v1`.
//!
//! The same bytes travel between guest and device and between device and tap (IFF_VNET_HDR), so
//! a frame needs no translation. What is left to do here: know the header's length, decide which
//! transmit headers the guest may use given the features it negotiated, and name the two fields
//! that we write on receive.
//!
//! A transmit header is copied once out of guest memory, judged in that copy, and the copy is
//! what the tap sees. Offsets and sizes inside it (`csum_start`, `gso_size`, ...) are judged by
//! the kernel, which treats them as hostile anyway and answers EINVAL.
//!
//! Spec: virtio 1.3, 5.1.6 (layout), 5.1.6.2 (transmit), 5.1.6.4 (receive).

#![forbid(unsafe_code)]

use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::device::{VIRTIO_F_VERSION_1, has};

/// Length of the header of virtio 1.x, and of a legacy device with MRG_RXBUF.
pub const HDR_LEN: usize = 12;
/// Length of the header of a legacy device without MRG_RXBUF: no `num_buffers`.
pub const HDR_LEN_LEGACY: usize = 10;
/// Where `flags` is in the header.
pub const FLAGS_OFFSET: usize = 0;
/// Where `num_buffers` is in the header.
pub const NUM_BUFFERS_OFFSET: usize = 10;
/// So much of the header means something on transmit: all but `num_buffers`.
pub const MEANT_ON_TRANSMIT: usize = NUM_BUFFERS_OFFSET;

/// Longest thing a tap with segmentation offload hands over: header and a 64 KiB frame
/// (virtio 1.3, 5.1.6.3.1).
pub const MAX_FRAME_WITH_HDR: usize = HDR_LEN + 65550;

/// Length of the header that the negotiated features ask for.
#[must_use]
pub fn header_len(features: u64) -> usize {
    if has(features, VIRTIO_F_VERSION_1) || has(features, VIRTIO_NET_F_MRG_RXBUF) {
        HDR_LEN
    } else {
        HDR_LEN_LEGACY
    }
}

/// Why a transmit header is refused; its frame is dropped and counted.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum HeaderError {
    /// The guest asks for a checksum that it did not negotiate.
    #[error("checksum offload was not negotiated")]
    Checksum,
    /// The guest asks for a segmentation that it did not negotiate, or that does not exist.
    #[error("segmentation type {0:#x} was not negotiated")]
    Segmentation(u8),
}

/// Which transmit headers the negotiated features allow.
#[derive(Debug, Clone, Copy)]
pub struct TxPolicy {
    features: u64,
}

impl TxPolicy {
    /// Policy for a device whose driver acknowledged `features`.
    #[must_use]
    pub fn new(features: u64) -> Self {
        Self { features }
    }

    /// Judges the header `hdr` (our copy) and clears what has no meaning on transmit, so that
    /// nothing else of the guest's choice reaches the tap.
    ///
    /// # Errors
    /// An offload that was not negotiated.
    pub fn admit(&self, hdr: &mut [u8; HDR_LEN]) -> Result<(), HeaderError> {
        let needs_csum = hdr[FLAGS_OFFSET] & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        if needs_csum != 0 && !has(self.features, VIRTIO_NET_F_CSUM) {
            return Err(HeaderError::Checksum);
        }
        hdr[FLAGS_OFFSET] = needs_csum;

        let gso_type = hdr[1];
        let ecn = gso_type & VIRTIO_NET_HDR_GSO_ECN as u8 != 0;
        let allowed = match u32::from(gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => !ecn,
            VIRTIO_NET_HDR_GSO_TCPV4 => self.allows(VIRTIO_NET_F_HOST_TSO4, ecn),
            VIRTIO_NET_HDR_GSO_TCPV6 => self.allows(VIRTIO_NET_F_HOST_TSO6, ecn),
            VIRTIO_NET_HDR_GSO_UDP_L4 => !ecn && has(self.features, VIRTIO_NET_F_HOST_USO),
            _ => false,
        };
        if !allowed {
            return Err(HeaderError::Segmentation(gso_type));
        }
        hdr[NUM_BUFFERS_OFFSET..].fill(0);
        Ok(())
    }

    fn allows(&self, tso: u32, ecn: bool) -> bool {
        has(self.features, tso) && (!ecn || has(self.features, VIRTIO_NET_F_HOST_ECN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
    const TSO4: u64 = 1 << VIRTIO_NET_F_HOST_TSO4;
    const ECN: u64 = 1 << VIRTIO_NET_F_HOST_ECN;
    const USO: u64 = 1 << VIRTIO_NET_F_HOST_USO;

    fn hdr(flags: u8, gso_type: u8) -> [u8; HDR_LEN] {
        let mut h = [0xab; HDR_LEN];
        h[0] = flags;
        h[1] = gso_type;
        h
    }

    #[test]
    fn header_length_follows_version_1_and_mergeable_buffers() {
        assert_eq!(header_len(1 << VIRTIO_F_VERSION_1), 12);
        assert_eq!(header_len(1 << VIRTIO_NET_F_MRG_RXBUF), 12);
        assert_eq!(header_len(0), 10);
    }

    #[test]
    fn plain_frame_passes_and_meaningless_fields_are_cleared() {
        // Arrange: DATA_VALID and RSC_INFO are receive flags; num_buffers is receive only
        let mut h = hdr(0b110, 0);
        // Act
        TxPolicy::new(0).admit(&mut h).unwrap();
        // Assert
        assert_eq!(h[0], 0);
        assert_eq!(h[10..], [0, 0]);
        assert_eq!(h[2..10], [0xab; 8], "the kernel judges these");
    }

    #[test]
    fn checksum_only_when_negotiated() {
        assert_eq!(
            TxPolicy::new(0).admit(&mut hdr(1, 0)),
            Err(HeaderError::Checksum)
        );
        let mut h = hdr(1, 0);
        TxPolicy::new(CSUM).admit(&mut h).unwrap();
        assert_eq!(h[0], 1, "NEEDS_CSUM is kept");
    }

    #[test]
    fn segmentation_only_when_negotiated() {
        let segmentation = |features, gso| TxPolicy::new(features).admit(&mut hdr(1, gso));
        assert_eq!(segmentation(CSUM, 1), Err(HeaderError::Segmentation(1)));
        assert_eq!(segmentation(CSUM | TSO4, 1), Ok(()));
        assert_eq!(
            segmentation(CSUM | TSO4, 4),
            Err(HeaderError::Segmentation(4))
        );
        assert_eq!(
            segmentation(CSUM | TSO4, 0x81),
            Err(HeaderError::Segmentation(0x81))
        );
        assert_eq!(segmentation(CSUM | TSO4 | ECN, 0x81), Ok(()));
        assert_eq!(segmentation(CSUM, 5), Err(HeaderError::Segmentation(5)));
        assert_eq!(segmentation(CSUM | USO, 5), Ok(()));
        assert_eq!(
            segmentation(CSUM | USO | ECN, 0x85),
            Err(HeaderError::Segmentation(0x85))
        );
        // UFO and unknown types exist for nobody
        assert_eq!(segmentation(u64::MAX, 3), Err(HeaderError::Segmentation(3)));
        assert_eq!(segmentation(u64::MAX, 2), Err(HeaderError::Segmentation(2)));
        assert_eq!(
            segmentation(u64::MAX, 0x80),
            Err(HeaderError::Segmentation(0x80))
        );
    }
}
