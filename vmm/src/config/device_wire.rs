//! Devices between the API's wire types and ours, both ways.
//!
//! Clients and flags say what they want by leaving fields out; here it becomes one of the alternatives,
//! or an error that names the field. `flag` is what an error begins with: a flag, or the name of a list.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use berth_vmm_api_types::v1 as wire;
use virtio_bindings::virtio_ids::{VIRTIO_ID_INPUT, VIRTIO_ID_IOMMU};

use super::shared_fd::SharedFd;
use super::{
    ArgError, Bucket, Daemon, DiskConfig, Dma, FsConfig, GenericConfig, Image, Link, NetConfig,
    RateLimit, Serves, Tap, TapSource, VhostUserConfig,
};

/// Longest name of a network device, its NUL not counted.
const MAX_TAP_NAME: usize = 15;
/// Length of a file system's tag, and of a disk's serial number.
const MAX_TAG: usize = 36;
const MAX_SERIAL: usize = 20;
/// Device types whose PCI ids are set aside for them.
const MAX_DEVICE_TYPE: u32 = 63;

/// A disk; `id` is its name unless the client gave one.
pub fn disk(disk: &wire::DiskConfig, id: &str, flag: &'static str) -> Result<DiskConfig, ArgError> {
    let link = match socket(
        disk.vhost_user,
        &disk.vhost_socket,
        disk.path.is_some(),
        flag,
    )? {
        Some(socket) => {
            excluding(flag, ("path", disk.path.is_some()))?;
            let limited = disk.rate_limiter_config.is_some();
            for_the_daemon(flag, "direct", disk.direct)?;
            for_the_daemon(flag, "serial", disk.serial.is_some())?;
            for_the_daemon(flag, "bw_size or ops_size", limited)?;
            for_the_daemon(flag, "backend", disk.backend.is_some())?;
            Link::Connect(socket.into())
        }
        None => start(&disk.backend, Serves::Image(image(disk, flag)?)),
    };
    Ok(DiskConfig {
        id: name(&disk.id, id),
        backend: VhostUserConfig {
            link,
            num_queues: disk.num_queues,
            queue_size: disk.queue_size,
            dma: dma(disk.dma),
        },
        readonly: disk.readonly,
    })
}

fn image(disk: &wire::DiskConfig, flag: &'static str) -> Result<Image, ArgError> {
    // Clients send an empty path for none.
    let path = disk
        .path
        .clone()
        .filter(|path| !path.as_os_str().is_empty());
    let bad = |key, value: &str, expected| Err(bad(flag, key, value, expected));
    match disk.image_type.as_deref() {
        Some(other) if !other.eq_ignore_ascii_case("raw") => {
            return bad("image_type", other, "raw, the only format that is served");
        }
        _ => {}
    }
    if let Some(serial) = &disk.serial
        && (serial.is_empty() || serial.len() > MAX_SERIAL || !is_printable(serial))
    {
        return bad("serial", serial, "1 to 20 printable ASCII characters");
    }
    Ok(Image {
        path: path.ok_or(ArgError::Missing { flag, key: "path" })?,
        direct: disk.direct,
        serial: disk.serial.clone(),
        limit: limit(disk.rate_limiter_config),
    })
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
}

/// A network card; `fds` are the descriptors that its `fds` name.
pub fn net(
    net: &wire::NetConfig,
    id: &str,
    flag: &'static str,
    fds: Vec<SharedFd>,
) -> Result<NetConfig, ArgError> {
    let has_fds = net.fds.is_some() || !fds.is_empty();
    let link = match socket(
        net.vhost_user,
        &net.vhost_socket,
        has_fds || net.tap.is_some(),
        flag,
    )? {
        Some(socket) => {
            excluding(flag, ("tap", net.tap.is_some()))?;
            excluding(flag, ("fd", has_fds))?;
            let limited = net.rate_limiter_config.is_some();
            for_the_daemon(flag, "mtu", net.mtu.is_some())?;
            for_the_daemon(flag, "bw_size or ops_size", limited)?;
            for_the_daemon(flag, "backend", net.backend.is_some())?;
            match net.vhost_mode {
                wire::VhostMode::Client => Link::Connect(socket.into()),
                wire::VhostMode::Server => Link::Listen(socket.into()),
            }
        }
        None if net.vhost_mode == wire::VhostMode::Server => {
            let key = "socket";
            return Err(ArgError::Missing { flag, key });
        }
        None => {
            let tap = Tap {
                source: tap_source(net, flag, has_fds, fds)?,
                mtu: net.mtu,
                limit: limit(net.rate_limiter_config),
            };
            start(&net.backend, Serves::Tap(tap))
        }
    };
    let mac = net.mac.as_deref().filter(|mac| !mac.is_empty());
    let mac = mac.map(|text| {
        unicast(text).ok_or_else(|| bad(flag, "mac", text, "a unicast address xx:xx:xx:xx:xx:xx"))
    });
    Ok(NetConfig {
        id: name(&net.id, id),
        backend: VhostUserConfig {
            link,
            num_queues: net.num_queues,
            queue_size: net.queue_size,
            dma: dma(net.dma),
        },
        mac: mac.transpose()?,
    })
}

fn tap_source(
    net: &wire::NetConfig,
    flag: &'static str,
    has_fds: bool,
    fds: Vec<SharedFd>,
) -> Result<TapSource, ArgError> {
    if has_fds {
        if net.tap.is_some() {
            let (first, second) = ("tap", "fd");
            return Err(ArgError::Excluding {
                flag,
                first,
                second,
            });
        }
        if fds.is_empty() || 2 * fds.len() != usize::from(net.num_queues) {
            let value = format!("{} descriptors", fds.len());
            return Err(bad(flag, "fd", &value, "one for each pair of num_queues"));
        }
        return Ok(TapSource::Fds(fds));
    }
    let key = "tap";
    let name = net.tap.as_deref().ok_or(ArgError::Missing { flag, key })?;
    let fits = (1..=MAX_TAP_NAME).contains(&name.len()) && name != "." && name != "..";
    let plain = |b: u8| b.is_ascii_graphic() && !b"/:%".contains(&b);
    if !fits || !name.bytes().all(plain) {
        return Err(bad(flag, key, name, "the name of a network device"));
    }
    Ok(TapSource::Name(name.to_owned()))
}

/// A shared folder.
pub fn fs(fs: &wire::FsConfig, id: &str, flag: &'static str) -> Result<FsConfig, ArgError> {
    if fs.tag.is_empty() || fs.tag.len() > MAX_TAG || fs.tag.contains('\0') {
        return Err(bad(flag, "tag", &fs.tag, "1 to 36 bytes"));
    }
    Ok(FsConfig {
        id: name(&fs.id, id),
        tag: fs.tag.clone(),
        backend: VhostUserConfig {
            link: Link::Connect(fs.socket.clone()),
            num_queues: fs.num_queues,
            queue_size: fs.queue_size,
            dma: dma(fs.dma),
        },
    })
}

/// A device of any type.
pub fn generic(
    generic: &wire::GenericVhostUserConfig,
    id: &str,
    flag: &'static str,
) -> Result<GenericConfig, ArgError> {
    let key = "device_type";
    if !(1..=MAX_DEVICE_TYPE).contains(&generic.device_type) {
        let value = generic.device_type.to_string();
        let expected = "a known name or a number from 1 to 63";
        return Err(bad(flag, key, &value, expected));
    }
    match generic.device_type {
        VIRTIO_ID_IOMMU => {
            let what = "an iommu is for the VMM to take part in, not for a daemon alone".to_owned();
            return Err(ArgError::Unsupported { flag, what });
        }
        VIRTIO_ID_INPUT => {
            let what = "input devices answer in their configuration space what was just asked \
                        there, which is not passed on in time"
                .to_owned();
            return Err(ArgError::Unsupported { flag, what });
        }
        _ => {}
    }
    Ok(GenericConfig {
        id: name(&generic.id, id),
        device_type: generic.device_type,
        link: Link::Connect(generic.socket.clone()),
        queue_sizes: generic.queue_sizes.clone(),
        dma: dma(generic.dma),
    })
}

/// A disk as the API shows it.
pub fn disk_to_wire(disk: &DiskConfig) -> wire::DiskConfig {
    let mut shown = wire::DiskConfig {
        id: Some(disk.id.clone()),
        readonly: disk.readonly,
        num_queues: disk.backend.num_queues,
        queue_size: disk.backend.queue_size,
        dma: dma_to_wire(disk.backend.dma),
        vhost_user: disk.backend.link.socket().is_some(),
        vhost_socket: disk.backend.link.socket().map(Into::into),
        ..wire::DiskConfig::default()
    };
    if let Link::Start(daemon) = &disk.backend.link {
        shown.backend = daemon.program.clone();
        if let Serves::Image(image) = &daemon.serves {
            shown.path = Some(image.path.clone());
            shown.direct = image.direct;
            shown.serial = image.serial.clone();
            shown.rate_limiter_config = limit_to_wire(&image.limit);
        }
    }
    shown
}

/// A network card as the API shows it. Descriptors are not shown: their numbers mean nothing elsewhere.
pub fn net_to_wire(net: &NetConfig) -> wire::NetConfig {
    let mac = net
        .mac
        .map(|mac| mac.map(|octet| format!("{octet:02x}")).join(":"));
    let mut shown = wire::NetConfig {
        id: Some(net.id.clone()),
        mac,
        num_queues: net.backend.num_queues,
        queue_size: net.backend.queue_size,
        dma: dma_to_wire(net.backend.dma),
        vhost_user: net.backend.link.socket().is_some(),
        vhost_socket: net.backend.link.socket().map(Into::into),
        ..wire::NetConfig::default()
    };
    match &net.backend.link {
        Link::Connect(_) => {}
        Link::Listen(_) => shown.vhost_mode = wire::VhostMode::Server,
        Link::Start(daemon) => {
            shown.backend = daemon.program.clone();
            if let Serves::Tap(tap) = &daemon.serves {
                shown.mtu = tap.mtu;
                shown.rate_limiter_config = limit_to_wire(&tap.limit);
                if let TapSource::Name(name) = &tap.source {
                    shown.tap = Some(name.clone());
                }
            }
        }
    }
    shown
}

/// A shared folder as the API shows it.
pub fn fs_to_wire(fs: &FsConfig) -> wire::FsConfig {
    wire::FsConfig {
        id: Some(fs.id.clone()),
        tag: fs.tag.clone(),
        socket: fs.backend.link.socket().map(Into::into).unwrap_or_default(),
        num_queues: fs.backend.num_queues,
        queue_size: fs.backend.queue_size,
        dma: dma_to_wire(fs.backend.dma),
    }
}

/// A device of any type as the API shows it.
pub fn generic_to_wire(generic: &GenericConfig) -> wire::GenericVhostUserConfig {
    wire::GenericVhostUserConfig {
        id: Some(generic.id.clone()),
        device_type: generic.device_type,
        socket: generic.link.socket().map(Into::into).unwrap_or_default(),
        queue_sizes: generic.queue_sizes.clone(),
        dma: dma_to_wire(generic.dma),
    }
}

fn dma(asked: Option<wire::Dma>) -> Dma {
    match asked {
        None => Dma::Auto,
        Some(wire::Dma::Window) => Dma::Window,
        Some(wire::Dma::Shadow) => Dma::Shadow,
    }
}

fn dma_to_wire(dma: Dma) -> Option<wire::Dma> {
    match dma {
        Dma::Auto => None,
        Dma::Window => Some(wire::Dma::Window),
        Dma::Shadow => Some(wire::Dma::Shadow),
    }
}

/// Clients send an empty text for none.
fn name(given: &Option<String>, otherwise: &str) -> String {
    let given = given.as_deref().filter(|id| !id.is_empty());
    given.unwrap_or(otherwise).to_owned()
}

/// The socket, where a process that others started is asked for: in so many words, or by nothing else.
fn socket<'a>(
    vhost_user: bool,
    socket: &'a Option<PathBuf>,
    otherwise: bool,
    flag: &'static str,
) -> Result<Option<&'a Path>, ArgError> {
    let key = "socket";
    match socket {
        Some(socket) if vhost_user || !otherwise => Ok(Some(socket)),
        None if vhost_user => Err(ArgError::Missing { flag, key }),
        _ => Ok(None),
    }
}

fn excluding(flag: &'static str, (first, given): (&'static str, bool)) -> Result<(), ArgError> {
    match given {
        true => Err(ArgError::Excluding {
            flag,
            first,
            second: "socket",
        }),
        false => Ok(()),
    }
}

/// What only whoever starts the daemon can have it do.
fn for_the_daemon(flag: &'static str, key: &str, given: bool) -> Result<(), ArgError> {
    match given {
        true => Err(ArgError::Unsupported {
            flag,
            what: format!("{key}= is for the daemon behind the socket to know"),
        }),
        false => Ok(()),
    }
}

fn start(program: &Option<PathBuf>, serves: Serves) -> Link {
    Link::Start(Box::new(Daemon {
        program: program.clone(),
        serves,
    }))
}

fn limit(limit: Option<wire::RateLimiterConfig>) -> RateLimit {
    let bucket = |bucket: wire::TokenBucketConfig| Bucket {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_ms: bucket.refill_time,
    };
    let limit = limit.unwrap_or_default();
    RateLimit {
        bandwidth: limit.bandwidth.map(bucket),
        ops: limit.ops.map(bucket),
    }
}

fn limit_to_wire(limit: &RateLimit) -> Option<wire::RateLimiterConfig> {
    let bucket = |bucket: Bucket| wire::TokenBucketConfig {
        size: bucket.size,
        one_time_burst: (bucket.one_time_burst != 0).then_some(bucket.one_time_burst),
        refill_time: bucket.refill_ms,
    };
    (*limit != RateLimit::default()).then(|| wire::RateLimiterConfig {
        bandwidth: limit.bandwidth.map(bucket),
        ops: limit.ops.map(bucket),
    })
}

fn unicast(text: &str) -> Option<[u8; 6]> {
    let mut octets = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut octets {
        let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(hex)?;
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    let multicast = octets[0] & 1 != 0;
    (parts.next().is_none() && !multicast && octets != [0; 6]).then_some(octets)
}

fn bad(flag: &'static str, key: &'static str, value: &str, expected: &'static str) -> ArgError {
    ArgError::BadValue {
        flag,
        key,
        value: value.to_owned(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::device_flags;

    #[test]
    fn what_the_api_shows_makes_the_same_device_again() {
        for text in [
            "path=/a,direct=on,serial=x,num_queues=4,readonly=on,bw_size=9,bw_refill_time=7",
            "vhost_user=on,socket=/s,id=root",
            "path=/a,backend=/opt/daemon,ops_size=1,ops_one_time_burst=2,ops_refill_time=3",
        ] {
            let before = device_flags::disk(text, 0).unwrap();
            assert_eq!(disk(&disk_to_wire(&before), "x", "disk").unwrap(), before);
        }
        for text in [
            "tap=tap0,mac=52:54:00:12:34:56,mtu=9000,num_queues=4",
            "vhost_user=on,socket=/s,vhost_mode=server",
        ] {
            let before = device_flags::net(text, 0).unwrap();
            let shown = net_to_wire(&before);
            assert_eq!(net(&shown, "x", "net", Vec::new()).unwrap(), before);
        }
        let before = device_flags::fs("tag=t,socket=/s,num_queues=2", 0).unwrap();
        assert_eq!(fs(&fs_to_wire(&before), "x", "fs").unwrap(), before);
        let text = "device_type=rng,socket=/s,queue_sizes=[64,128]";
        let before = device_flags::generic(text, 0).unwrap();
        assert_eq!(
            generic(&generic_to_wire(&before), "x", "g").unwrap(),
            before
        );
    }

    #[test]
    fn what_clients_send_is_understood() {
        // libvirt's and Kata's.
        let text = r#"{"path": "/d.raw", "readonly": false, "direct": false, "image_type": "Raw",
            "vhost_user": false, "num_queues": 2, "queue_size": 1024, "iommu": false}"#;
        let sent = serde_json::from_str(text).unwrap();
        let disk = disk(&sent, "x", "disks").unwrap();
        assert_eq!(
            (disk.backend.num_queues, disk.backend.queue_size),
            (2, 1024)
        );
        let text = r#"{"mac": "52:54:00:12:34:56", "num_queues": 2, "queue_size": 256}"#;
        let sent = serde_json::from_str(text).unwrap();
        let fd = SharedFd::inherited(0).unwrap();
        let net = self::net(&sent, "x", "net", vec![fd]).unwrap();
        assert!(matches!(net.backend.link, Link::Start(_)));
    }
}
