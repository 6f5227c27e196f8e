//! What the guest is offered of what backends say.

use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED};

use super::*;
use crate::config::{Dma, VhostUserConfig};

fn backend(num_queues: u16) -> VhostUserConfig {
    VhostUserConfig {
        link: Link::Connect("/run/test.sock".into()),
        num_queues,
        queue_size: 128,
        dma: Dma::Auto,
    }
}

fn disk(num_queues: u16, readonly: bool) -> Kind {
    Kind::Blk(DiskConfig {
        id: "_disk0".to_owned(),
        backend: backend(num_queues),
        readonly,
    })
}

fn net(num_queues: u16, mac: Option<[u8; 6]>) -> Kind {
    Kind::Net(NetConfig {
        id: "_net0".to_owned(),
        backend: backend(num_queues),
        mac,
    })
}

fn found(features: &[u32], config: Option<Vec<u8>>, queues: Option<u16>) -> Found {
    Found {
        features: bits(features) | VERSION_1 | 1 << 30,
        config,
        queues,
    }
}

fn blk_config(queues: u16) -> Option<Vec<u8>> {
    let mut config = vec![0; BLK_CONFIG_LEN];
    put(&mut config, BLK_NUM_QUEUES, queues);
    Some(config)
}

fn net_config(pairs: u16) -> Option<Vec<u8>> {
    let mut config = vec![2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    put(&mut config, NET_PAIRS, pairs);
    Some(config)
}

#[test]
fn what_the_frontend_would_take_part_in_does_not_pass() {
    let features = [
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_F_RING_PACKED,
        26,
        VIRTIO_BLK_F_FLUSH,
    ];
    let offer = disk(1, false)
        .offer(&found(&features, blk_config(1), Some(1)))
        .unwrap();
    assert_eq!(offer.features, VERSION_1 | bits(&[VIRTIO_BLK_F_FLUSH]));
}

#[test]
fn a_disk_has_the_least_of_the_three_queue_counts() {
    let queues = |configured, in_config, said| {
        let found = found(&[VIRTIO_BLK_F_MQ], blk_config(in_config), said);
        let offer = disk(configured, false).offer(&found).unwrap();
        assert_eq!(get(&offer.config, BLK_NUM_QUEUES), offer.queues);
        let multi = offer.features & bits(&[VIRTIO_BLK_F_MQ]) != 0;
        assert_eq!(multi, offer.queues > 1);
        offer.queues
    };
    assert_eq!(queues(4, 8, Some(8)), 4);
    assert_eq!(queues(4, 2, Some(8)), 2);
    assert_eq!(queues(4, 8, Some(3)), 3);
    assert_eq!(queues(4, 8, None), 1);
    assert_eq!(queues(4, 0, Some(0)), 1);
}

#[test]
fn read_only_is_the_guests_view_alone() {
    let offer = disk(1, true)
        .offer(&found(&[], blk_config(1), None))
        .unwrap();
    let read_only = bits(&[VIRTIO_BLK_F_RO]);
    assert_eq!(offer.features & read_only, read_only);
    assert_eq!(offer.acknowledge(offer.features) & read_only, 0);
}

#[test]
fn a_disk_without_configuration_and_a_legacy_backend_are_refused() {
    let error = disk(1, false).offer(&found(&[], None, None)).unwrap_err();
    assert!(error.contains("configuration space"), "{error}");
    let legacy = Found {
        features: 0,
        config: blk_config(1),
        queues: None,
    };
    let error = disk(1, false).offer(&legacy).unwrap_err();
    assert!(error.contains("VERSION_1"), "{error}");
}

#[test]
fn only_the_cache_mode_of_a_disk_is_writable_and_only_if_offered() {
    let wce = bits(&[VIRTIO_BLK_F_CONFIG_WCE]);
    let offered = |features| Offer {
        features,
        backend_features: features,
        config: vec![0; 60],
        queues: 1,
        control: None,
    };
    assert!(disk(1, false).config_writable(32, 1, &offered(wce)));
    assert!(!disk(1, false).config_writable(32, 1, &offered(0)));
    assert!(!disk(1, false).config_writable(32, 2, &offered(wce)));
    assert!(!disk(1, false).config_writable(0, 1, &offered(wce)));
    assert!(!net(2, None).config_writable(32, 1, &offered(wce)));
}

#[test]
fn a_mac_that_is_given_hides_the_backends() {
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    let offer = net(2, Some(mac))
        .offer(&found(&[], net_config(1), None))
        .unwrap();
    assert_eq!(offer.config[..6], mac);
    let feature = bits(&[VIRTIO_NET_F_MAC]);
    assert_eq!(offer.features & feature, feature);
    assert_eq!(offer.acknowledge(offer.features) & feature, 0);
}

#[test]
fn a_backend_that_knows_another_mac_does_not_filter_addresses() {
    let filters = bits(&[VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_MAC_ADDR]);
    let offered = |mac, features: &[u32]| {
        let mut all = vec![VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX];
        all.extend([VIRTIO_NET_F_CTRL_MAC_ADDR].iter().chain(features));
        let offer = net(2, Some(mac)).offer(&found(&all, net_config(1), None));
        offer.unwrap().features & filters
    };
    let (same, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    assert_eq!(offered(same, &[VIRTIO_NET_F_MAC]), filters);
    assert_eq!(offered(other, &[VIRTIO_NET_F_MAC]), 0);
    // One that does not know the address cannot filter for a wrong one.
    assert_eq!(offered(other, &[]), filters);
}

#[test]
fn the_control_queue_is_the_last_for_guest_and_backend_alike() {
    let features = [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ];
    let found = found(&features, net_config(4), None);
    let offer = net(4, None).offer(&found).unwrap();
    assert_eq!((offer.queues, get(&offer.config, NET_PAIRS)), (5, 2));
    assert_eq!(offer.backend_index(4, offer.features), 8);
    assert_eq!(offer.backend_index(3, offer.features), 3);
    // Without MQ it is the third, here and there.
    let one = net(2, None).offer(&found).unwrap();
    assert_eq!(one.queues, 3);
    assert_eq!(one.features & bits(&[VIRTIO_NET_F_MQ]), 0);
    assert_eq!(one.backend_index(2, one.features), 2);
}

#[test]
fn a_card_without_configuration_gets_one_and_no_control_queue() {
    let features = [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, 15];
    let offer = net(4, None).offer(&found(&features, None, None)).unwrap();
    assert_eq!(offer.queues, 2);
    assert_eq!(
        offer.features,
        VERSION_1 | 1 << 15 | bits(&[VIRTIO_NET_F_STATUS])
    );
    assert_eq!(get(&offer.config, NET_STATUS), NET_LINK_UP);
}

fn fs(num_queues: u16) -> Kind {
    Kind::Fs(FsConfig {
        id: "_fs0".to_owned(),
        tag: "home".to_owned(),
        backend: backend(num_queues),
    })
}

#[test]
fn a_shared_folder_gets_its_tag_and_queues_from_here() {
    assert_eq!(fs(2).queue_sizes(), [128; 3]);
    let mut offered = Found {
        features: VERSION_1 | 1 | 1 << 28,
        config: None,
        queues: Some(3),
    };
    let offer = fs(2).offer(&offered).unwrap();
    // Notifications need a queue that is not there.
    assert_eq!(offer.features, VERSION_1 | 1 << 28);
    assert_eq!(&offer.config[..5], b"home\0");
    assert_eq!(offer.config[36..], [2, 0, 0, 0]);
    assert_eq!(offer.queues, 3);
    offered.queues = Some(2);
    let offer = fs(2).offer(&offered).unwrap();
    assert_eq!((offer.config[36], offer.queues), (1, 2));
    offered.queues = Some(1);
    assert!(fs(2).offer(&offered).is_err());
}

#[test]
fn a_device_of_any_type_is_shown_as_its_backend_has_it() {
    let kind = Kind::Generic(GenericConfig {
        id: "_generic_vhost_user0".to_owned(),
        device_type: 19,
        link: Link::Connect("/run/test.sock".into()),
        queue_sizes: vec![64, 64, 16],
        dma: Dma::Auto,
    });
    assert_eq!((kind.device_type(), kind.queue_sizes().len()), (19, 3));
    let of_the_type = 1 | 1 << 23 | 1 << 50;
    let found = Found {
        features: VERSION_1 | of_the_type | 1 << VIRTIO_F_RING_PACKED | 1 << 30 | 1 << 26,
        config: Some(vec![3, 0, 0, 0, 0, 0, 0, 0]),
        queues: Some(2),
    };
    let offer = kind.offer(&found).unwrap();
    assert_eq!(offer.features, VERSION_1 | of_the_type);
    assert_eq!(offer.config, [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(offer.queues, 2);
    assert!(kind.config_writable(4, 4, &offer));
    assert!(!kind.config_writable(6, 4, &offer));
}
