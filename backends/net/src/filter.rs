//! Which frames from the tap the guest wants: the receive filter.
//!
//! The driver describes it through the control queue: receive mode, table of addresses, VLANs.
//! Untrusted only in the sense that the guest may filter away its own frames.
//!
//! State after reset: everything passes. With CTRL_RX the device starts promiscuous until the
//! driver says otherwise; with CTRL_VLAN tagged frames pass once their VLAN was added, except in
//! promiscuous mode, where a guest that bridges must see them all.
//!
//! Spec: virtio 1.3, 5.1.6.5.1 (receive mode), 5.1.6.5.2 (addresses), 5.1.6.5.3 (VLAN).

#![forbid(unsafe_code)]

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN};

use crate::ctrl::{MAX_LISTED, MacSet, MacTable};
use crate::device::has;
use crate::mac::Mac;

/// How much of a frame the filter looks at: two addresses and a VLAN tag.
pub const PEEK_LEN: usize = 16;

const ETH_P_8021Q: [u8; 2] = [0x81, 0x00];
const VLAN_WORDS: usize = 4096 / 64;

/// The receive filter of one device. Cloned on change; workers hold it in an `Arc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RxFilter {
    /// The guest's own address; unicast is not filtered while it is unknown.
    own: Option<Mac>,
    /// Whether the driver can set the receive mode at all.
    by_address: bool,
    promisc: bool,
    all_multicast: bool,
    table: MacTable,
    /// One bit a VLAN id; none: VLANs are not filtered.
    vlans: Option<Box<[u64; VLAN_WORDS]>>,
}

impl RxFilter {
    /// The filter of a freshly reset device with these negotiated features.
    #[must_use]
    pub fn new(features: u64, own: Option<Mac>) -> Self {
        let by_address = has(features, VIRTIO_NET_F_CTRL_RX);
        Self {
            own,
            by_address,
            promisc: by_address,
            all_multicast: false,
            table: MacTable::default(),
            vlans: has(features, VIRTIO_NET_F_CTRL_VLAN).then(|| Box::new([0; VLAN_WORDS])),
        }
    }

    /// Promiscuous mode on or off.
    pub fn set_promisc(&mut self, on: bool) {
        self.promisc = on;
    }

    /// Every multicast frame, or only those of the table.
    pub fn set_all_multicast(&mut self, on: bool) {
        self.all_multicast = on;
    }

    /// Replaces the table of further addresses.
    pub fn set_table(&mut self, table: MacTable) {
        self.table = table;
    }

    /// The guest's own address.
    pub fn set_own(&mut self, own: Mac) {
        self.own = Some(own);
    }

    /// The filter as bytes, for a successor of this process; without the guest's own address.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        let sets = [&self.table.unicast, &self.table.multicast];
        let all = |set| matches!(set, &MacSet::Everything);
        let flags = [
            self.promisc,
            self.all_multicast,
            all(sets[0]),
            all(sets[1]),
            self.vlans.is_some(),
        ];
        let bits = flags.iter().enumerate();
        bytes.push(bits.fold(0, |byte, (bit, on)| byte | u8::from(*on) << bit));
        for set in sets {
            let list = match set {
                MacSet::Listed(list) => &list[..],
                MacSet::Everything => &[],
            };
            // At most MAX_LISTED.
            bytes.push(list.len() as u8);
            bytes.extend(list.iter().flat_map(|mac| mac.0));
        }
        for word in self.vlans.iter().flat_map(|words| words.iter()) {
            bytes.extend(word.to_le_bytes());
        }
    }

    /// A filter for these features from such bytes; none if they are not what `encode` makes.
    #[must_use]
    pub fn decode(features: u64, own: Option<Mac>, bytes: &[u8]) -> Option<Self> {
        let mut filter = Self::new(features, own);
        let (&flags, rest) = bytes.split_first()?;
        let flag = |bit: u8| flags & 1 << bit != 0;
        let (unicast, rest) = decode_set(flag(2), rest)?;
        let (multicast, rest) = decode_set(flag(3), rest)?;
        filter.promisc = flag(0) && filter.by_address;
        filter.all_multicast = flag(1);
        filter.table = MacTable { unicast, multicast };
        if flag(4) != filter.vlans.is_some() {
            return None;
        }
        let words = filter.vlans.iter_mut().flat_map(|words| words.iter_mut());
        let mut rest = rest;
        for word in words {
            let (bytes, after) = rest.split_first_chunk()?;
            *word = u64::from_le_bytes(*bytes);
            rest = after;
        }
        rest.is_empty().then_some(filter)
    }

    /// Lets frames of VLAN `vid` (below 4096) pass, or stops them.
    pub fn set_vlan(&mut self, vid: u16, on: bool) {
        let Some(vlans) = &mut self.vlans else { return };
        let Some(word) = vlans.get_mut(usize::from(vid / 64)) else {
            return;
        };
        let bit = 1_u64 << (vid % 64);
        if on {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }

    /// True if no frame is ever refused, so that none needs to be looked at.
    #[must_use]
    pub fn passes_all(&self) -> bool {
        self.promisc || (!self.by_address && self.vlans.is_none())
    }

    /// Whether the frame that starts with `start` is for the guest.
    #[must_use]
    pub fn accepts(&self, start: &[u8; PEEK_LEN]) -> bool {
        self.passes_all() || (self.accepts_vlan(start) && self.accepts_address(start))
    }

    fn accepts_vlan(&self, start: &[u8; PEEK_LEN]) -> bool {
        let Some(vlans) = &self.vlans else {
            return true;
        };
        if start[12..14] != ETH_P_8021Q {
            return true;
        }
        let vid = u16::from_be_bytes([start[14], start[15]]) & 0xfff;
        vlans[usize::from(vid / 64)] & (1 << (vid % 64)) != 0
    }

    fn accepts_address(&self, start: &[u8; PEEK_LEN]) -> bool {
        if !self.by_address {
            return true;
        }
        let mut destination = Mac([0; 6]);
        destination.0.copy_from_slice(&start[..6]);
        if destination == Mac::BROADCAST {
            true
        } else if destination.is_multicast() {
            self.all_multicast || self.table.multicast.contains(destination)
        } else {
            self.own.is_none_or(|own| own == destination)
                || self.table.unicast.contains(destination)
        }
    }
}

fn decode_set(everything: bool, bytes: &[u8]) -> Option<(MacSet, &[u8])> {
    let (&count, rest) = bytes.split_first()?;
    let count = usize::from(count);
    let (list, rest) = rest.split_at_checked(6 * count)?;
    if count > MAX_LISTED {
        return None;
    }
    if everything {
        return Some((MacSet::Everything, rest));
    }
    let (macs, _) = list.as_chunks::<6>();
    Some((
        MacSet::Listed(macs.iter().copied().map(Mac).collect()),
        rest,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([0x52, 0x54, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([0x01, 0, 0x5e, 0, 0, 1]);
    const RX: u64 = 1 << VIRTIO_NET_F_CTRL_RX;
    const VLAN: u64 = 1 << VIRTIO_NET_F_CTRL_VLAN;

    fn frame(to: Mac, vid: Option<u16>) -> [u8; PEEK_LEN] {
        let mut start = [0; PEEK_LEN];
        start[..6].copy_from_slice(&to.0);
        if let Some(vid) = vid {
            start[12..14].copy_from_slice(&ETH_P_8021Q);
            // Priority bits are not part of the id
            start[14..].copy_from_slice(&(vid | 0xe000).to_be_bytes());
        }
        start
    }

    fn strict(features: u64) -> RxFilter {
        let mut filter = RxFilter::new(features, Some(OWN));
        filter.set_promisc(false);
        filter
    }

    #[test]
    fn everything_passes_until_the_driver_says_otherwise() {
        for features in [0, RX, RX | VLAN] {
            let filter = RxFilter::new(features, Some(OWN));
            assert!(filter.passes_all());
            assert!(filter.accepts(&frame(OTHER, Some(7))));
        }
    }

    #[test]
    fn unicast_for_others_is_refused_and_broadcast_passes() {
        let mut filter = strict(RX);
        assert!(!filter.passes_all());
        assert!(filter.accepts(&frame(OWN, None)));
        assert!(filter.accepts(&frame(Mac::BROADCAST, None)));
        assert!(!filter.accepts(&frame(OTHER, None)));
        filter.set_own(OTHER);
        assert!(filter.accepts(&frame(OTHER, None)));
        assert!(!filter.accepts(&frame(OWN, None)));
    }

    #[test]
    fn unknown_own_address_means_no_unicast_filter() {
        let mut filter = RxFilter::new(RX, None);
        filter.set_promisc(false);
        assert!(filter.accepts(&frame(OTHER, None)));
        assert!(!filter.accepts(&frame(GROUP, None)));
    }

    #[test]
    fn table_and_all_multicast() {
        let mut filter = strict(RX);
        assert!(!filter.accepts(&frame(GROUP, None)));
        filter.set_all_multicast(true);
        assert!(filter.accepts(&frame(GROUP, None)));
        filter.set_all_multicast(false);
        filter.set_table(MacTable {
            unicast: MacSet::Listed(vec![OTHER]),
            multicast: MacSet::Listed(vec![GROUP]),
        });
        assert!(filter.accepts(&frame(GROUP, None)));
        assert!(filter.accepts(&frame(OTHER, None)));
        filter.set_table(MacTable {
            unicast: MacSet::Everything,
            multicast: MacSet::Everything,
        });
        assert!(filter.accepts(&frame(Mac([0x52, 9, 9, 9, 9, 9]), None)));
    }

    #[test]
    fn vlans_pass_once_added() {
        let mut filter = strict(VLAN);
        assert!(
            filter.accepts(&frame(OTHER, None)),
            "no address filter without CTRL_RX"
        );
        assert!(!filter.accepts(&frame(OWN, Some(4095))));
        filter.set_vlan(4095, true);
        assert!(filter.accepts(&frame(OWN, Some(4095))));
        assert!(!filter.accepts(&frame(OWN, Some(4094))));
        filter.set_vlan(4095, false);
        assert!(!filter.accepts(&frame(OWN, Some(4095))));
    }

    #[test]
    fn promiscuous_mode_passes_every_vlan() {
        let mut filter = strict(RX | VLAN);
        assert!(!filter.accepts(&frame(OWN, Some(5))));
        filter.set_promisc(true);
        assert!(filter.accepts(&frame(OTHER, Some(5))));
    }

    #[test]
    fn a_filter_survives_as_bytes() {
        let mut filter = strict(RX | VLAN);
        filter.set_all_multicast(true);
        filter.set_vlan(4095, true);
        filter.set_table(MacTable {
            unicast: MacSet::Listed(vec![OTHER; MAX_LISTED]),
            multicast: MacSet::Listed(vec![GROUP; MAX_LISTED]),
        });
        let decode = |features, bytes: &[u8]| RxFilter::decode(features, Some(OWN), bytes);
        let mut bytes = Vec::new();
        filter.encode(&mut bytes);
        assert_eq!(decode(RX | VLAN, &bytes), Some(filter.clone()));
        assert_eq!(decode(RX, &bytes), None, "VLANs were not negotiated");
        for len in 0..bytes.len() {
            assert_eq!(decode(RX | VLAN, &bytes[..len]), None, "{len}");
        }
        filter.set_table(MacTable {
            unicast: MacSet::Everything,
            multicast: MacSet::Everything,
        });
        let mut bytes = Vec::new();
        filter.encode(&mut bytes);
        assert_eq!(decode(RX | VLAN, &bytes), Some(filter));
        assert_eq!(decode(RX, &[0, 65]), None);
    }
}
