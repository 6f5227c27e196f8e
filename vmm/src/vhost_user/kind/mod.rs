//! What is particular to a device type: which features pass, and what the guest sees of the backend's
//! configuration space.
//!
//! The guest is offered the backend's features, less those that the frontend would have to take part
//! in, plus those that are the configuration's wish. Pure functions; [`super::session`] asks them after
//! each handshake.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::shadow;
use super::shared::Rings;
use crate::config::{
    DiskConfig, Dma, FsConfig, GenericConfig, Link, NetConfig, VhostUserConfig, VmConfig,
};

mod other;
#[cfg(test)]
mod tests;

/// A set of feature bits from their numbers.
pub(super) const fn bits(numbers: &[u32]) -> u64 {
    let (mut set, mut i) = (0, 0);
    while i < numbers.len() {
        set |= 1 << numbers[i];
        i += 1;
    }
    set
}

const VERSION_1: u64 = bits(&[VIRTIO_F_VERSION_1]);
/// Features of the ring that a backend may have of its own. Not ACCESS_PLATFORM, which to a backend
/// means an IOTLB; not RING_PACKED or NOTIFICATION_DATA, which change what a doorbell and a ring are.
const RING: u64 = bits(&[
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_ORDER_PLATFORM,
]) | VERSION_1;
const IN_ORDER: u64 = bits(&[VIRTIO_F_IN_ORDER]);
/// Features of a disk whose registers are in the first 60 bytes of its configuration.
const BLK: u64 = bits(&[
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_WRITE_ZEROES,
]);
/// Features of a network card: the offloads, 0 to 23, and USO, 54 to 56. Those in between and above are
/// the ring's, or need more configuration than is read.
const NET: u64 = 0x00ff_ffff | 0x7 << 54;
/// Features of a network card that only a backend with a configuration space, which is a whole device,
/// sees to itself. Backends without one expect them of their frontend.
const NET_WHOLE: u64 = bits(&[
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
]);

/// Offsets in `struct virtio_blk_config` (virtio 1.3, 5.2.4), and how much of it is read.
const BLK_SIZE_MAX: usize = 8;
const BLK_SEG_MAX: usize = 12;
const BLK_WRITEBACK: usize = 32;
const BLK_NUM_QUEUES: usize = 34;
const BLK_CONFIG_LEN: usize = 60;
/// Offsets in `struct virtio_net_config` (virtio 1.3, 5.1.4), and how much of it is read.
const NET_STATUS: usize = 6;
const NET_PAIRS: usize = 8;
const NET_CONFIG_LEN: usize = 12;
const NET_LINK_UP: u16 = 1;

/// A device behind a vhost-user socket.
#[derive(Debug, Clone)]
pub enum Kind {
    /// A disk.
    Blk(DiskConfig),
    /// A network card.
    Net(NetConfig),
    /// A shared folder.
    Fs(FsConfig),
    /// A device of any other type.
    Generic(GenericConfig),
}

/// How much configuration space a backend is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConfigLen {
    /// So many bytes; 0: it is not asked.
    Exactly(usize),
    /// As many as it gives, up to this number.
    UpTo(usize),
}

/// What a backend said of itself in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Feature bits, PROTOCOL_FEATURES among them.
    pub(super) features: u64,
    /// Its configuration space, if it has one.
    pub(super) config: Option<Vec<u8>>,
    /// How many queues it says it has, if it says so.
    pub(super) queues: Option<u16>,
}

/// What the guest is offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    /// Feature bits for the guest.
    pub(super) features: u64,
    /// Feature bits of the backend.
    pub(super) backend_features: u64,
    /// Configuration space for the guest.
    pub(super) config: Vec<u8>,
    /// Queues that the backend serves, as the guest counts them.
    pub(super) queues: u16,
    /// The backend's index of the control queue where it is not the guest's: guest's, backend's.
    control: Option<(u16, u16)>,
}

impl Offer {
    /// The feature bits to acknowledge to the backend for those that the guest chose.
    pub(super) fn acknowledge(&self, chosen: u64) -> u64 {
        chosen & self.backend_features
    }

    /// Whether rings that a driver set up earlier can run here, or why not.
    pub(super) fn fits(&self, rings: &Rings) -> Result<(), String> {
        let missing = rings.features & !self.features;
        if missing != 0 {
            return Err(format!(
                "features {missing:#x}, which the driver uses, are not offered"
            ));
        }
        match rings.rings.iter().find(|ring| ring.index >= self.queues) {
            Some(ring) => Err(format!("it does not serve queue {}", ring.index)),
            None => Ok(()),
        }
    }

    /// The backend's index of a queue of the guest.
    pub(super) fn backend_index(&self, queue: u16, chosen: u64) -> u16 {
        match self.control {
            Some((guest, backend)) if queue == guest && chosen >> VIRTIO_NET_F_MQ & 1 == 1 => {
                backend
            }
            _ => queue,
        }
    }
}

/// A device of one kind or another; for the fuzz targets.
pub(super) fn fuzz(pick: u8) -> Kind {
    let backend = VhostUserConfig {
        link: Link::Connect("/nowhere".into()),
        num_queues: 2 + 2 * u16::from(pick >> 6),
        queue_size: 64,
        dma: Dma::Auto,
    };
    let id = "_fuzz0".to_owned();
    match pick % 4 {
        0 => Kind::Blk(DiskConfig {
            id,
            backend,
            readonly: pick & 4 != 0,
        }),
        1 => Kind::Net(NetConfig {
            id,
            backend,
            mac: None,
        }),
        2 => Kind::Fs(FsConfig {
            id,
            tag: "tag".to_owned(),
            backend,
        }),
        _ => Kind::Generic(GenericConfig {
            id,
            device_type: 1 + u32::from(pick >> 2),
            link: backend.link,
            queue_sizes: vec![64, 128],
            dma: Dma::Auto,
        }),
    }
}

impl Kind {
    /// All devices of a guest, in the order in which it finds them.
    pub fn all(config: &VmConfig) -> impl Iterator<Item = Self> {
        let disks = config.disks.iter().cloned().map(Self::Blk);
        let nets = config.nets.iter().cloned().map(Self::Net);
        let fs = config.fs.iter().cloned().map(Self::Fs);
        let generics = config.generics.iter().cloned().map(Self::Generic);
        disks.chain(nets).chain(fs).chain(generics)
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        match self {
            Self::Blk(disk) => &disk.id,
            Self::Net(net) => &net.id,
            Self::Fs(fs) => &fs.id,
            Self::Generic(generic) => &generic.id,
        }
    }

    /// What ids of this kind begin with where none was given.
    pub fn id_prefix(&self) -> &'static str {
        match self {
            Self::Blk(_) => "_disk",
            Self::Net(_) => "_net",
            Self::Fs(_) => "_fs",
            Self::Generic(_) => "_generic_vhost_user",
        }
    }

    /// Gives the device another name.
    pub fn set_id(&mut self, id: String) {
        match self {
            Self::Blk(disk) => disk.id = id,
            Self::Net(net) => net.id = id,
            Self::Fs(fs) => fs.id = id,
            Self::Generic(generic) => generic.id = id,
        }
    }

    /// How its backend is reached.
    pub fn link(&self) -> &Link {
        match self {
            Self::Blk(disk) => &disk.backend.link,
            Self::Net(net) => &net.backend.link,
            Self::Fs(fs) => &fs.backend.link,
            Self::Generic(generic) => &generic.link,
        }
    }

    /// How it is to reach guest memory.
    pub fn dma(&self) -> Dma {
        match self {
            Self::Blk(disk) => disk.backend.dma,
            Self::Net(net) => net.backend.dma,
            Self::Fs(fs) => fs.backend.dma,
            Self::Generic(generic) => generic.dma,
        }
    }

    pub(super) fn device_type(&self) -> u32 {
        match self {
            Self::Blk(_) => VIRTIO_ID_BLOCK,
            Self::Net(_) => VIRTIO_ID_NET,
            Self::Fs(_) => VIRTIO_ID_FS,
            Self::Generic(generic) => generic.device_type,
        }
    }

    /// Sizes of all queues that the guest may find: those configured, a card's control queue, and a
    /// shared folder's for urgent requests.
    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        let (backend, more) = match self {
            Self::Blk(disk) => (&disk.backend, 0),
            Self::Net(net) => (&net.backend, 1),
            Self::Fs(fs) => (&fs.backend, other::FS_MORE_QUEUES),
            Self::Generic(generic) => return generic.queue_sizes.clone(),
        };
        vec![backend.queue_size; usize::from(backend.num_queues + more)]
    }

    /// Queues that were asked for: more of them than a backend has are worth a word.
    pub fn configured_queues(&self) -> u16 {
        match self {
            Self::Net(net) => net.backend.num_queues,
            // As many as are shown.
            _ => u16::try_from(self.queue_sizes().len()).unwrap_or(u16::MAX),
        }
    }

    /// Bytes of configuration space to ask the backend for; none where it is not asked.
    pub(super) fn config_len(&self) -> ConfigLen {
        match self {
            Self::Blk(_) => ConfigLen::Exactly(BLK_CONFIG_LEN),
            Self::Net(_) => ConfigLen::Exactly(NET_CONFIG_LEN),
            Self::Fs(_) => ConfigLen::Exactly(0),
            Self::Generic(generic) => other::config_len(generic.device_type),
        }
    }

    /// Whether the backend's answer to GET_QUEUE_NUM counts queues. For network cards it may count pairs
    /// (QEMU reads it so), and their configuration space says it better.
    pub(super) fn asks_queue_num(&self) -> bool {
        !matches!(self, Self::Net(_))
    }

    /// Whether the guest may write these bytes of configuration space.
    pub(super) fn config_writable(&self, offset: usize, len: usize, offer: &Offer) -> bool {
        match self {
            Self::Blk(_) => {
                let wce = offer.features >> VIRTIO_BLK_F_CONFIG_WCE & 1 == 1;
                wce && (offset, len) == (BLK_WRITEBACK, 1)
            }
            Self::Net(_) | Self::Fs(_) => false,
            // What its driver may write only the backend knows.
            Self::Generic(_) => offset
                .checked_add(len)
                .is_some_and(|end| end <= offer.config.len()),
        }
    }

    /// The same offer where there may be shadow queues: these give used entries back one by one, and a disk's largest
    /// request fits them.
    pub(super) fn for_shadow(&self, mut offer: Offer) -> Offer {
        offer.features &= !IN_ORDER;
        offer.backend_features &= !IN_ORDER;
        if let Self::Blk(_) = self {
            let known = |feature| offer.features >> feature & 1 == 1;
            let number = |at: usize| {
                let bytes = offer.config[at..].first_chunk();
                bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
            };
            let segments = match known(VIRTIO_BLK_F_SEG_MAX) {
                true => number(BLK_SEG_MAX),
                false => 1,
            };
            let mut most = shadow::size_max(segments);
            if known(VIRTIO_BLK_F_SIZE_MAX) {
                most = most.min(number(BLK_SIZE_MAX));
            }
            offer.features |= bits(&[VIRTIO_BLK_F_SIZE_MAX]);
            offer.config[BLK_SIZE_MAX..][..4].copy_from_slice(&most.to_le_bytes());
        }
        offer
    }

    /// What the guest is offered of what was found, or why the backend will not do.
    pub(super) fn offer(&self, found: &Found) -> Result<Offer, String> {
        if found.features & VERSION_1 == 0 {
            return Err("it does not offer VIRTIO_F_VERSION_1".to_owned());
        }
        match self {
            Self::Blk(disk) => offer_blk(disk, found),
            Self::Net(net) => Ok(offer_net(net, found)),
            Self::Fs(fs) => other::offer_fs(fs, found),
            Self::Generic(generic) => other::offer_generic(generic, found),
        }
    }
}

fn offer_blk(disk: &DiskConfig, found: &Found) -> Result<Offer, String> {
    let mut config = found
        .config
        .clone()
        .ok_or("it has no configuration space (VHOST_USER_PROTOCOL_F_CONFIG), so no capacity")?;
    config.resize(BLK_CONFIG_LEN, 0);
    let mut features = found.features & (BLK | RING);
    let multi = features & bits(&[VIRTIO_BLK_F_MQ]) != 0;
    let served = if multi {
        get(&config, BLK_NUM_QUEUES).max(1)
    } else {
        1
    };
    let served = served.min(found.queues.unwrap_or(1).max(1));
    let queues = served.min(disk.backend.num_queues);
    if queues == 1 {
        features &= !bits(&[VIRTIO_BLK_F_MQ]);
    }
    put(&mut config, BLK_NUM_QUEUES, queues);
    if disk.readonly {
        features |= bits(&[VIRTIO_BLK_F_RO]);
    }
    Ok(Offer {
        features,
        backend_features: found.features & (BLK | RING),
        config,
        queues,
        control: None,
    })
}

fn offer_net(net: &NetConfig, found: &Found) -> Offer {
    let mut backend_features = found.features & (NET | RING);
    if found.config.is_none() {
        backend_features &= !NET_WHOLE;
    }
    let mut features = backend_features;
    let mut config = found.config.clone().unwrap_or_default();
    config.resize(NET_CONFIG_LEN, 0);
    if found.config.is_none() {
        put(&mut config, NET_STATUS, NET_LINK_UP);
        features |= bits(&[VIRTIO_NET_F_STATUS]);
    }
    let multi = features & bits(&[VIRTIO_NET_F_MQ]) != 0;
    let served = if multi {
        get(&config, NET_PAIRS).clamp(1, 0x7fff)
    } else {
        1
    };
    let pairs = served.min(net.backend.num_queues / 2).max(1);
    if pairs == 1 {
        features &= !bits(&[VIRTIO_NET_F_MQ]);
    }
    put(&mut config, NET_PAIRS, pairs);
    if let Some(mac) = net.mac {
        // A backend that knows the card by another address would filter for that one.
        if features & bits(&[VIRTIO_NET_F_MAC]) != 0 && config[..6] != mac {
            features &= !bits(&[VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_MAC_ADDR]);
        }
        config[..6].copy_from_slice(&mac);
        features |= bits(&[VIRTIO_NET_F_MAC]);
    }
    let has_control = features & bits(&[VIRTIO_NET_F_CTRL_VQ]) != 0;
    Offer {
        features,
        backend_features,
        config,
        queues: 2 * pairs + u16::from(has_control),
        control: has_control.then_some((2 * pairs, 2 * served)),
    }
}

fn get(config: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([config[offset], config[offset + 1]])
}

fn put(config: &mut [u8], offset: usize, value: u16) {
    config[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
}
