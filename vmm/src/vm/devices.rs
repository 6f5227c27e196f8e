//! Devices that come and go in the configuration. Pure.

#![forbid(unsafe_code)]

use crate::config::VmConfig;
use crate::vhost_user::Kind;

/// Adds a device; one whose id is empty gets the first free one of its kind, such as `_disk2`. `in_use`
/// says which ids the machine still knows although the configuration no longer does. Returns the device as
/// it was added.
pub fn add(config: &mut VmConfig, mut kind: Kind, in_use: impl Fn(&str) -> bool) -> Kind {
    if kind.id().is_empty() {
        let prefix = kind.id_prefix();
        let free = (0..)
            .map(|number: u32| format!("{prefix}{number}"))
            .find(|id| !in_use(id) && !ids(config).any(|other| other == id));
        if let Some(id) = free {
            kind.set_id(id);
        }
    }
    match kind.clone() {
        Kind::Blk(disk) => config.disks.push(disk),
        Kind::Net(net) => config.nets.push(net),
        Kind::Fs(fs) => config.fs.push(fs),
        Kind::Generic(generic) => config.generics.push(generic),
    }
    kind
}

/// Takes the device with that id out; returns whether it was there.
pub fn remove(config: &mut VmConfig, id: &str) -> bool {
    let before = ids(config).count();
    config.disks.retain(|disk| disk.id != id);
    config.nets.retain(|net| net.id != id);
    config.fs.retain(|fs| fs.id != id);
    config.generics.retain(|generic| generic.id != id);
    ids(config).count() < before
}

/// Ids of all devices that other processes serve.
pub fn ids(config: &VmConfig) -> impl Iterator<Item = &str> {
    let disks = config.disks.iter().map(|disk| disk.id.as_str());
    let nets = config.nets.iter().map(|net| net.id.as_str());
    let fs = config.fs.iter().map(|fs| fs.id.as_str());
    let generics = config.generics.iter().map(|generic| generic.id.as_str());
    disks.chain(nets).chain(fs).chain(generics)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{device_flags, testing};

    fn disk(text: &str) -> Kind {
        Kind::Blk(device_flags::disk(text, 0).unwrap())
    }

    fn nameless() -> Kind {
        let mut kind = disk("socket=/d");
        kind.set_id(String::new());
        kind
    }

    #[test]
    fn a_device_without_an_id_gets_the_first_free_one() {
        let mut config = testing::config();
        let added = |config: &mut VmConfig, in_use: &str| {
            let kind = add(config, nameless(), |id| id == in_use);
            kind.id().to_owned()
        };
        assert_eq!(added(&mut config, "_disk1"), "_disk0");
        assert_eq!(added(&mut config, "_disk1"), "_disk2");
        assert_eq!(added(&mut config, ""), "_disk1");
        let kind = add(&mut config, disk("socket=/e,id=data"), |_| true);
        assert_eq!(kind.id(), "data");
        let ids: Vec<_> = ids(&config).collect();
        assert_eq!(ids, ["_disk0", "_disk2", "_disk1", "data"]);
    }

    #[test]
    fn a_device_is_removed_once() {
        let mut config = testing::config();
        add(&mut config, disk("socket=/d,id=data"), |_| false);
        assert!(!remove(&mut config, "other"));
        assert!(remove(&mut config, "data"));
        assert!(!remove(&mut config, "data"));
        assert!(config.disks.is_empty());
    }
}
