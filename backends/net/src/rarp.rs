//! The frame that tells a network where an address has gone: after a migration switches learn the
//! guest's new place from it.
//!
//! Sent for a guest that cannot announce itself. Spec: vhost-user, VHOST_USER_SEND_RARP; RFC 903.

#![forbid(unsafe_code)]

use crate::mac::Mac;

const ETH_P_RARP: u16 = 0x8035;
/// Shortest frame of Ethernet, without checksum.
pub const FRAME_LEN: usize = 60;

/// A broadcast "reverse request" of `mac` about itself.
#[must_use]
pub fn announcement(mac: Mac) -> [u8; FRAME_LEN] {
    let address = mac.0;
    let parts: [&[u8]; 10] = [
        &Mac::BROADCAST.0,
        &address,
        &ETH_P_RARP.to_be_bytes(),
        // Hardware type Ethernet, protocol type IPv4
        &1_u16.to_be_bytes(),
        &0x0800_u16.to_be_bytes(),
        // Lengths of their addresses, operation "request reverse"
        &[6, 4, 0, 3],
        &address,
        &[0; 4],
        &address,
        &[0; 4],
    ];
    let mut frame = [0; FRAME_LEN];
    for (to, from) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let frame = announcement(Mac(mac));
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], mac);
        assert_eq!(frame[32..38], mac);
        assert_eq!(frame[38..], [0; 22]);
    }
}
