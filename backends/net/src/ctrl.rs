//! Commands of the control queue: bytes in, one [`Command`] out.
//!
//! A command is a readable part `class, command, data` and one writable byte for the answer. The
//! whole readable part is copied out of guest memory before it comes here. Parsing knows the
//! negotiated features: a command that needs a feature which was not negotiated is refused, so
//! whoever applies a [`Command`] need not ask again.
//!
//! Spec: virtio 1.3, 5.1.6.5.

#![forbid(unsafe_code)]

use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
};

use crate::device::{GUEST_OFFLOADS, has};
use crate::mac::Mac;

/// Longest command that is read. A table of addresses is the only one without a fixed length;
/// this is room for ten thousand.
pub const MAX_COMMAND_LEN: usize = 64 << 10;

/// A table with more addresses of a kind than this passes every address of that kind, which the
/// specification allows.
pub const MAX_LISTED: usize = 64;

/// Set of addresses of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MacSet {
    /// Exactly these.
    Listed(Vec<Mac>),
    /// More than we keep: all of them.
    Everything,
}

impl MacSet {
    /// Whether `mac` is in the set.
    #[must_use]
    pub fn contains(&self, mac: Mac) -> bool {
        match self {
            Self::Listed(list) => list.contains(&mac),
            Self::Everything => true,
        }
    }
}

/// Addresses that the guest wants besides its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MacTable {
    /// Unicast addresses.
    pub unicast: MacSet,
    /// Multicast addresses.
    pub multicast: MacSet,
}

impl Default for MacTable {
    fn default() -> Self {
        Self {
            unicast: MacSet::Listed(Vec::new()),
            multicast: MacSet::Listed(Vec::new()),
        }
    }
}

/// What the driver asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Promiscuous mode.
    Promisc(bool),
    /// Receive every multicast frame.
    AllMulticast(bool),
    /// Replace the table of addresses.
    SetMacTable(MacTable),
    /// Change the device's own address.
    SetMac(Mac),
    /// Let a VLAN pass.
    AddVlan(u16),
    /// Stop a VLAN.
    DelVlan(u16),
    /// The announcement was made.
    AnnounceAck,
    /// Use this many queue pairs; between 1 and the device's number of pairs.
    SetPairs(u16),
    /// Receive with these offloads: a subset of the negotiated [`GUEST_OFFLOADS`].
    SetGuestOffloads(u64),
}

/// Why a command is answered with VIRTIO_NET_ERR.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum CtrlError {
    /// Too short for what it says it is.
    #[error("command is too short ({0} bytes)")]
    Short(usize),
    /// Bytes left over behind a command of fixed length, or a table that does not add up.
    #[error("command has the wrong length ({0} bytes)")]
    Length(usize),
    /// Unknown, or its feature was not negotiated.
    #[error("command {0}.{1} is unknown or was not negotiated")]
    Unsupported(u8, u8),
    /// A value that is out of range.
    #[error("value {0:#x} is out of range")]
    Value(u64),
}

/// What parsing must know about the device.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Negotiated features.
    pub features: u64,
    /// Number of queue pairs of the device.
    pub max_pairs: u16,
}

/// Parses one command.
///
/// # Errors
/// See [`CtrlError`]; each is answered with VIRTIO_NET_ERR and changes nothing.
pub fn parse(bytes: &[u8], limits: Limits) -> Result<Command, CtrlError> {
    let [class, command, data @ ..] = bytes else {
        return Err(CtrlError::Short(bytes.len()));
    };
    let (class, command) = (*class, *command);
    let unsupported = CtrlError::Unsupported(class, command);
    let need = |feature: u32| {
        if has(limits.features, feature) {
            Ok(())
        } else {
            Err(unsupported)
        }
    };
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_RX, mode) => {
            need(VIRTIO_NET_F_CTRL_RX)?;
            let on = fixed::<1>(data)? != [0];
            match mode {
                VIRTIO_NET_CTRL_RX_PROMISC => Ok(Command::Promisc(on)),
                VIRTIO_NET_CTRL_RX_ALLMULTI => Ok(Command::AllMulticast(on)),
                _ => Err(unsupported),
            }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            need(VIRTIO_NET_F_CTRL_RX)?;
            parse_mac_table(data)
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            need(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
            Ok(Command::SetMac(Mac(fixed(data)?)))
        }
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD) => {
            need(VIRTIO_NET_F_CTRL_VLAN)?;
            parse_vid(data).map(Command::AddVlan)
        }
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL) => {
            need(VIRTIO_NET_F_CTRL_VLAN)?;
            parse_vid(data).map(Command::DelVlan)
        }
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
            need(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
            fixed::<0>(data)?;
            Ok(Command::AnnounceAck)
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            need(VIRTIO_NET_F_MQ)?;
            parse_pairs(data, limits.max_pairs)
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            need(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
            parse_offloads(data, limits.features)
        }
        _ => Err(unsupported),
    }
}

fn fixed<const N: usize>(data: &[u8]) -> Result<[u8; N], CtrlError> {
    data.try_into().map_err(|_| {
        if data.len() < N {
            CtrlError::Short(data.len())
        } else {
            CtrlError::Length(data.len())
        }
    })
}

fn parse_vid(data: &[u8]) -> Result<u16, CtrlError> {
    let vid = u16::from_le_bytes(fixed(data)?);
    if vid < 4096 {
        Ok(vid)
    } else {
        Err(CtrlError::Value(vid.into()))
    }
}

fn parse_pairs(data: &[u8], max_pairs: u16) -> Result<Command, CtrlError> {
    let pairs = u16::from_le_bytes(fixed(data)?);
    if (1..=max_pairs).contains(&pairs) {
        Ok(Command::SetPairs(pairs))
    } else {
        Err(CtrlError::Value(pairs.into()))
    }
}

fn parse_offloads(data: &[u8], features: u64) -> Result<Command, CtrlError> {
    let wanted = u64::from_le_bytes(fixed(data)?);
    if wanted & !(features & GUEST_OFFLOADS) == 0 {
        Ok(Command::SetGuestOffloads(wanted))
    } else {
        Err(CtrlError::Value(wanted))
    }
}

fn parse_mac_table(data: &[u8]) -> Result<Command, CtrlError> {
    let (unicast, rest) = split_mac_list(data)?;
    let (multicast, rest) = split_mac_list(rest)?;
    if rest.is_empty() {
        Ok(Command::SetMacTable(MacTable { unicast, multicast }))
    } else {
        Err(CtrlError::Length(data.len()))
    }
}

/// Takes one `le32 entries; u8 macs[entries][6]` off the front.
fn split_mac_list(data: &[u8]) -> Result<(MacSet, &[u8]), CtrlError> {
    let short = CtrlError::Short(data.len());
    let (count, rest) = data.split_first_chunk::<4>().ok_or(short)?;
    let count = usize::try_from(u32::from_le_bytes(*count)).map_err(|_| short)?;
    let len = count.checked_mul(6).ok_or(short)?;
    let (list, rest) = rest.split_at_checked(len).ok_or(short)?;
    if count > MAX_LISTED {
        return Ok((MacSet::Everything, rest));
    }
    let (macs, _) = list.as_chunks::<6>();
    Ok((
        MacSet::Listed(macs.iter().copied().map(Mac).collect()),
        rest,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Limits = Limits {
        features: u64::MAX,
        max_pairs: 4,
    };
    const NONE: Limits = Limits {
        features: 0,
        max_pairs: 4,
    };

    fn list(macs: &[[u8; 6]]) -> Vec<u8> {
        let mut bytes = (macs.len() as u32).to_le_bytes().to_vec();
        bytes.extend(macs.concat());
        bytes
    }

    #[test]
    fn parses_every_command() {
        let cases: Vec<(Vec<u8>, Command)> = vec![
            (vec![0, 0, 1], Command::Promisc(true)),
            (vec![0, 1, 0], Command::AllMulticast(false)),
            (
                vec![1, 1, 2, 0, 0, 0, 0, 9],
                Command::SetMac(Mac([2, 0, 0, 0, 0, 9])),
            ),
            (vec![2, 0, 0xff, 0x0f], Command::AddVlan(4095)),
            (vec![2, 1, 5, 0], Command::DelVlan(5)),
            (vec![3, 0], Command::AnnounceAck),
            (vec![4, 0, 4, 0], Command::SetPairs(4)),
            (
                vec![5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0],
                Command::SetGuestOffloads(0x82),
            ),
        ];
        for (bytes, command) in cases {
            assert_eq!(parse(&bytes, ALL), Ok(command), "{bytes:?}");
            assert_eq!(
                parse(&bytes, NONE),
                Err(CtrlError::Unsupported(bytes[0], bytes[1])),
                "nothing works without its feature"
            );
            assert!(
                parse(&bytes[..bytes.len() - 1], ALL).is_err(),
                "short {bytes:?}"
            );
            let long = [&bytes[..], &[0]].concat();
            assert!(parse(&long, ALL).is_err(), "long {bytes:?}");
        }
    }

    #[test]
    fn refuses_unknown_commands_and_bad_values() {
        assert_eq!(parse(&[], ALL), Err(CtrlError::Short(0)));
        assert_eq!(parse(&[0], ALL), Err(CtrlError::Short(1)));
        for (class, command) in [
            (0, 2),
            (0, 6),
            (1, 2),
            (2, 2),
            (3, 1),
            (4, 1),
            (5, 1),
            (6, 0),
            (255, 255),
        ] {
            assert_eq!(
                parse(&[class, command, 0], ALL),
                Err(CtrlError::Unsupported(class, command))
            );
        }
        assert_eq!(parse(&[2, 0, 0, 0x10], ALL), Err(CtrlError::Value(4096)));
        assert_eq!(parse(&[4, 0, 0, 0], ALL), Err(CtrlError::Value(0)));
        assert_eq!(parse(&[4, 0, 5, 0], ALL), Err(CtrlError::Value(5)));
        let not_negotiated = [5, 0, 0x80, 0, 0, 0, 0, 0, 0, 0];
        let limits = Limits {
            features: 0b110,
            max_pairs: 1,
        };
        assert_eq!(parse(&not_negotiated, limits), Err(CtrlError::Value(0x80)));
        let no_offload_at_all = [5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80];
        assert_eq!(
            parse(&no_offload_at_all, ALL),
            Err(CtrlError::Value(1 << 63))
        );
    }

    #[test]
    fn mac_tables() {
        // Arrange
        let one = [2, 0, 0, 0, 0, 1];
        let group = [1, 0, 0x5e, 0, 0, 1];
        let table = |unicast: &[[u8; 6]], multicast: &[[u8; 6]]| {
            [vec![1, 0], list(unicast), list(multicast)].concat()
        };
        // Act, assert
        assert_eq!(
            parse(&table(&[], &[]), ALL),
            Ok(Command::SetMacTable(MacTable::default()))
        );
        assert_eq!(
            parse(&table(&[one], &[group]), ALL),
            Ok(Command::SetMacTable(MacTable {
                unicast: MacSet::Listed(vec![Mac(one)]),
                multicast: MacSet::Listed(vec![Mac(group)]),
            }))
        );
        let Ok(Command::SetMacTable(full)) = parse(&table(&[one; 65], &[group; 64]), ALL) else {
            panic!("a long table is a table");
        };
        assert_eq!(full.unicast, MacSet::Everything);
        assert!(matches!(full.multicast, MacSet::Listed(list) if list.len() == 64));
    }

    #[test]
    fn mac_tables_whose_counts_lie() {
        let short = |bytes: &[u8]| assert!(matches!(parse(bytes, ALL), Err(CtrlError::Short(_))));
        short(&[1, 0]);
        short(&[1, 0, 0, 0, 0]);
        short(&[1, 0, 0, 0, 0, 0]);
        short(&[1, 0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]);
        short(&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5]);
        assert_eq!(
            parse(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7], ALL),
            Err(CtrlError::Length(9))
        );
    }
}
