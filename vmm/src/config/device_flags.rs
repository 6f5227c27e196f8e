//! From the text of `--disk`, `--net`, `--fs` and `--generic-vhost-user` to a device.
//!
//! The text becomes the API's wire type first, so that flags and requests are held to the same rules
//! ([`super::device_wire`]).

#![forbid(unsafe_code)]

use berth_vmm_api_types::v1 as wire;
use virtio_bindings::virtio_ids::{self, *};

use super::device_wire;
use super::keys::{Keys, hint};
use super::shared_fd::SharedFd;
use super::{ArgError, DiskConfig, FsConfig, GenericConfig, NetConfig};

const RATE_LIMIT: [&str; 6] = [
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
];

/// One `--disk`; `index` counts them.
pub fn disk(text: &str, index: usize) -> Result<DiskConfig, ArgError> {
    let flag = "--disk";
    let mut known = vec![
        "path",
        "readonly",
        "direct",
        "num_queues",
        "queue_size",
        "vhost_user",
        "socket",
        "id",
        "serial",
        "image_type",
        "backend",
        "dma",
    ];
    known.extend(RATE_LIMIT);
    let keys = Keys::parse(flag, text, &known)?;
    keys.no_bare()?;
    let defaults = wire::DiskConfig::default();
    let disk = wire::DiskConfig {
        id: owned(&keys, "id"),
        path: path(&keys, "path")?,
        readonly: keys.on_off("readonly")?.unwrap_or(false),
        direct: keys.on_off("direct")?.unwrap_or(false),
        num_queues: keys.number("num_queues")?.unwrap_or(defaults.num_queues),
        queue_size: keys.number("queue_size")?.unwrap_or(defaults.queue_size),
        vhost_user: vhost_user(&keys)?,
        vhost_socket: path(&keys, "socket")?,
        serial: owned(&keys, "serial"),
        image_type: owned(&keys, "image_type"),
        rate_limiter_config: rate_limit(flag, &keys)?,
        backend: path(&keys, "backend")?,
        dma: dma(&keys)?,
    };
    device_wire::disk(&disk, &format!("_disk{index}"), flag)
}

/// One `--net`; `index` counts them.
pub fn net(text: &str, index: usize) -> Result<NetConfig, ArgError> {
    let flag = "--net";
    let mut known = vec![
        "tap",
        "fd",
        "mac",
        "mtu",
        "num_queues",
        "queue_size",
        "vhost_user",
        "socket",
        "vhost_mode",
        "id",
        "backend",
        "dma",
    ];
    known.extend(RATE_LIMIT);
    let keys = Keys::parse(flag, text, &known)?;
    keys.no_bare()?;
    let defaults = wire::NetConfig::default();
    let numbers: Option<Vec<i32>> = keys.list("fd")?;
    let num_queues = match &numbers {
        Some(numbers) => u16::try_from(2 * numbers.len()).unwrap_or(u16::MAX),
        None => defaults.num_queues,
    };
    let net = wire::NetConfig {
        id: owned(&keys, "id"),
        tap: owned(&keys, "tap"),
        mac: owned(&keys, "mac"),
        mtu: keys.number("mtu")?,
        num_queues: keys.number("num_queues")?.unwrap_or(num_queues),
        queue_size: keys.number("queue_size")?.unwrap_or(defaults.queue_size),
        vhost_user: vhost_user(&keys)?,
        vhost_socket: path(&keys, "socket")?,
        vhost_mode: match keys.text("vhost_mode") {
            None | Some("client") => wire::VhostMode::Client,
            Some("server") => wire::VhostMode::Server,
            Some(other) => return Err(keys.bad("vhost_mode", other, "client or server")),
        },
        rate_limiter_config: rate_limit(flag, &keys)?,
        backend: path(&keys, "backend")?,
        dma: dma(&keys)?,
        fds: numbers,
    };
    let fds = net.fds.iter().flatten().map(|&number| {
        let absent = || keys.bad("fd", &number.to_string(), "a file descriptor above 2");
        match number {
            ..=2 => Err(absent()),
            number => SharedFd::inherited(number).map_err(|_| absent()),
        }
    });
    let fds = fds.collect::<Result<_, _>>()?;
    device_wire::net(&net, &format!("_net{index}"), flag, fds)
}

/// One `--fs`; `index` counts them.
pub fn fs(text: &str, index: usize) -> Result<FsConfig, ArgError> {
    let flag = "--fs";
    let known = ["tag", "socket", "num_queues", "queue_size", "id", "dma"];
    let keys = Keys::parse(flag, text, &known)?;
    keys.no_bare()?;
    let fs = wire::FsConfig {
        id: owned(&keys, "id"),
        tag: keys.required("tag")?.to_owned(),
        socket: keys.required("socket")?.into(),
        num_queues: keys.number("num_queues")?.unwrap_or(1),
        queue_size: keys.number("queue_size")?.unwrap_or(1024),
        dma: dma(&keys)?,
    };
    device_wire::fs(&fs, &format!("_fs{index}"), flag)
}

/// One `--generic-vhost-user`; `index` counts them.
pub fn generic(text: &str, index: usize) -> Result<GenericConfig, ArgError> {
    let flag = "--generic-vhost-user";
    let known = [
        "device_type",
        "virtio_id",
        "socket",
        "queue_sizes",
        "id",
        "dma",
    ];
    let keys = Keys::parse(flag, text, &known)?;
    keys.no_bare()?;
    // The older name.
    let key = match keys.text("virtio_id") {
        Some(_) if keys.text("device_type").is_some() => {
            return Err(ArgError::Excluding {
                flag,
                first: "device_type",
                second: "virtio_id",
            });
        }
        Some(_) => "virtio_id",
        None => "device_type",
    };
    let generic = wire::GenericVhostUserConfig {
        id: owned(&keys, "id"),
        device_type: device_type(flag, keys.required(key)?)?,
        socket: keys.required("socket")?.into(),
        queue_sizes: keys.list("queue_sizes")?.ok_or(ArgError::Missing {
            flag,
            key: "queue_sizes",
        })?,
        dma: dma(&keys)?,
    };
    device_wire::generic(&generic, &format!("_generic_vhost_user{index}"), flag)
}

/// Names of device types, as Cloud Hypervisor has them.
const DEVICE_TYPES: [(&str, u32); 42] = [
    ("9p", VIRTIO_ID_9P),
    ("audio_policy", VIRTIO_ID_AUDIO_POLICY),
    ("balloon", VIRTIO_ID_BALLOON),
    ("block", VIRTIO_ID_BLOCK),
    ("bt", VIRTIO_ID_BT),
    ("caif", VIRTIO_ID_CAIF),
    ("camera", 43),
    ("can", VIRTIO_ID_CAN),
    ("clock", VIRTIO_ID_CLOCK),
    ("console", VIRTIO_ID_CONSOLE),
    ("cpu_balloon", 47),
    ("crypto", VIRTIO_ID_CRYPTO),
    ("dmabuf", VIRTIO_ID_DMABUF),
    ("fs", VIRTIO_ID_FS),
    ("gpio", VIRTIO_ID_GPIO),
    ("gpu", VIRTIO_ID_GPU),
    ("i2c", VIRTIO_ID_I2C_ADAPTER),
    ("input", VIRTIO_ID_INPUT),
    ("iomem", VIRTIO_ID_IOMEM),
    ("ism", 44),
    ("mac80211_hwsim", VIRTIO_ID_MAC80211_HWSIM),
    ("mac80211_wlan", VIRTIO_ID_MAC80211_WLAN),
    ("media", 48),
    ("mem", VIRTIO_ID_MEM),
    ("memory_balloon", VIRTIO_ID_MEMORY_BALLOON),
    ("net", VIRTIO_ID_NET),
    ("nitro_sec_mod", virtio_ids::VIRTIO_ID_NITRO_SEC_MOD),
    ("param_serv", VIRTIO_ID_PARAM_SERV),
    ("pmem", VIRTIO_ID_PMEM),
    ("pstore", VIRTIO_ID_PSTORE),
    ("rdma", 42),
    ("rng", VIRTIO_ID_RNG),
    ("rpmb", VIRTIO_ID_RPMB),
    ("rpmsg", VIRTIO_ID_RPMSG),
    ("scmi", VIRTIO_ID_SCMI),
    ("scsi", VIRTIO_ID_SCSI),
    ("signal_dist", VIRTIO_ID_SIGNAL_DIST),
    ("sound", VIRTIO_ID_SOUND),
    ("spi", 45),
    ("video_decoder", VIRTIO_ID_VIDEO_DECODER),
    ("video_encoder", VIRTIO_ID_VIDEO_ENCODER),
    ("vsock", VIRTIO_ID_VSOCK),
];

fn device_type(flag: &'static str, text: &str) -> Result<u32, ArgError> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let named = DEVICE_TYPES.iter().find(|(name, _)| *name == text);
    named.map(|&(_, number)| number).ok_or_else(|| {
        let names = DEVICE_TYPES.map(|(name, _)| name);
        ArgError::UnknownValue {
            flag,
            value: text.to_owned(),
            hint: hint(text, &names),
        }
    })
}

fn owned(keys: &Keys, key: &'static str) -> Option<String> {
    keys.text(key).map(str::to_owned)
}

fn dma(keys: &Keys) -> Result<Option<wire::Dma>, ArgError> {
    match keys.text("dma") {
        None => Ok(None),
        Some("window") => Ok(Some(wire::Dma::Window)),
        Some("shadow") => Ok(Some(wire::Dma::Shadow)),
        Some(other) => Err(keys.bad("dma", other, "window or shadow")),
    }
}

/// A path; one that is given may not be empty.
fn path<T: for<'a> From<&'a str>>(keys: &Keys, key: &'static str) -> Result<Option<T>, ArgError> {
    keys.text(key)
        .map(|_| keys.required(key).map(T::from))
        .transpose()
}

/// `socket=` alone says it too.
fn vhost_user(keys: &Keys) -> Result<bool, ArgError> {
    let has_socket = keys.text("socket").is_some();
    match keys.on_off("vhost_user")? {
        Some(false) if has_socket => Err(keys.bad("vhost_user", "off", "on, and socket= wants it")),
        said => Ok(said.unwrap_or(has_socket)),
    }
}

fn rate_limit(
    flag: &'static str,
    keys: &Keys,
) -> Result<Option<wire::RateLimiterConfig>, ArgError> {
    let bucket = |size_key, burst_key, refill_key| {
        let burst = keys.size(burst_key)?;
        match (keys.size(size_key)?, keys.number(refill_key)?) {
            (Some(size), Some(refill_time)) => Ok(Some(wire::TokenBucketConfig {
                size,
                one_time_burst: burst,
                refill_time,
            })),
            (None, None) if burst.is_none() => Ok(None),
            (None, _) => Err(ArgError::Missing {
                flag,
                key: size_key,
            }),
            (_, None) => Err(ArgError::Missing {
                flag,
                key: refill_key,
            }),
        }
    };
    let [
        bw_size,
        bw_burst,
        bw_refill,
        ops_size,
        ops_burst,
        ops_refill,
    ] = RATE_LIMIT;
    let bandwidth = bucket(bw_size, bw_burst, bw_refill)?;
    let ops = bucket(ops_size, ops_burst, ops_refill)?;
    let limited = bandwidth.is_some() || ops.is_some();
    Ok(limited.then_some(wire::RateLimiterConfig { bandwidth, ops }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dma, Link, Serves, TapSource};

    #[test]
    fn a_disk_has_cloud_hypervisors_defaults() {
        let disk = disk("vhost_user=on,socket=/run/d.sock", 3).unwrap();
        assert_eq!(disk.id, "_disk3");
        assert_eq!(disk.backend.num_queues, 1);
        assert_eq!(disk.backend.queue_size, 128);
        assert_eq!(disk.backend.link, Link::Connect("/run/d.sock".into()));
        assert!(!disk.readonly);
    }

    #[test]
    fn an_image_is_served_by_a_daemon_of_our_own() {
        let text = "path=/a.raw,direct=on,readonly=on,serial=abc,bw_size=10M,bw_refill_time=100";
        let disk = disk(text, 0).unwrap();
        let Link::Start(daemon) = disk.backend.link else {
            panic!("nothing to start");
        };
        assert_eq!(daemon.program, None);
        let Serves::Image(image) = daemon.serves else {
            panic!("not an image");
        };
        assert_eq!(image.path.to_str(), Some("/a.raw"));
        assert!(image.direct && disk.readonly);
        assert_eq!(image.serial.as_deref(), Some("abc"));
        let bandwidth = image.limit.bandwidth.unwrap();
        assert_eq!((bandwidth.size, bandwidth.refill_ms), (10 << 20, 100));
        assert_eq!(image.limit.ops, None);
    }

    #[test]
    fn a_net_takes_a_mac_and_pairs_of_queues() {
        let net = net("socket=/n,mac=52:54:00:12:34:56,num_queues=4,id=lan", 0).unwrap();
        assert_eq!(net.mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!((net.id.as_str(), net.backend.num_queues), ("lan", 4));
        let net = self::net("vhost_user=on,vhost_mode=server,socket=/n", 0).unwrap();
        assert_eq!(net.backend.link, Link::Listen("/n".into()));
    }

    #[test]
    fn a_tap_is_a_name_or_descriptors() {
        let source = |text: &str| match net(text, 0).unwrap().backend.link {
            Link::Start(daemon) => match daemon.serves {
                Serves::Tap(tap) => tap.source,
                Serves::Image(_) => panic!("not a tap"),
            },
            _ => panic!("nothing to start"),
        };
        assert_eq!(source("tap=tap0"), TapSource::Name("tap0".into()));
        let file = std::fs::File::open("/dev/null").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        let TapSource::Fds(fds) = source(&format!("fd=[{number},{number}],num_queues=4")) else {
            panic!("no descriptors");
        };
        assert_eq!(fds.len(), 2);
        let one = net(&format!("fd={number}"), 0).unwrap();
        assert_eq!(one.backend.num_queues, 2);
        for text in [
            "fd=1".to_owned(),
            "fd=[]".to_owned(),
            "fd=99999".to_owned(),
            format!("fd={number},num_queues=4"),
            format!("fd={number},tap=tap0"),
            "tap=".to_owned(),
            "tap=0123456789abcdef".to_owned(),
            "tap=a/b".to_owned(),
            String::new(),
        ] {
            assert!(net(&text, 0).is_err(), "{text}");
        }
    }

    #[test]
    fn a_device_may_say_how_it_reaches_memory() {
        let text = "socket=/s,dma=shadow";
        assert_eq!(disk(text, 0).unwrap().backend.dma, Dma::Shadow);
        assert_eq!(
            net("socket=/s,dma=window", 0).unwrap().backend.dma,
            Dma::Window
        );
        assert_eq!(disk("socket=/s", 0).unwrap().backend.dma, Dma::Auto);
        let fs = fs(&format!("tag=t,{text}"), 0).unwrap();
        assert_eq!(fs.backend.dma, Dma::Shadow);
        let rng = format!("device_type=rng,queue_sizes=[64],{text}");
        assert_eq!(generic(&rng, 0).unwrap().dma, Dma::Shadow);
        let line = disk("socket=/s,dma=bounce", 0).unwrap_err().to_string();
        assert_eq!(line, "--disk: dma=bounce is not window or shadow");
    }

    #[test]
    fn macs_that_no_card_may_have_are_refused() {
        for text in [
            "52:54:00:12:34",
            "5254:00:12:34:56",
            "01:00:00:00:00:01",
            "0g:00:00:00:00:01",
            "00:00:00:00:00:00",
            "52:54:00:12:34:56:78",
            "+2:54:00:12:34:56",
        ] {
            assert!(net(&format!("socket=/n,mac={text}"), 0).is_err(), "{text}");
        }
    }

    #[test]
    fn what_contradicts_itself_says_so() {
        for (text, message) in [
            ("readonly=on", "--disk: path= is missing"),
            (
                "path=/a,socket=/b",
                "--disk: path= and socket= exclude each other",
            ),
            ("vhost_user=on,path=/a", "--disk: socket= is missing"),
            (
                "vhost_user=off,socket=/b",
                "--disk: vhost_user=off is not on, and socket= wants it",
            ),
            (
                "socket=/b,direct=on",
                "--disk: direct= is for the daemon behind the socket to know",
            ),
            (
                "path=/a,image_type=qcow2",
                "--disk: image_type=qcow2 is not raw, the only format that is served",
            ),
            ("path=/a,bw_size=1M", "--disk: bw_refill_time= is missing"),
            (
                "path=/a,ops_one_time_burst=1",
                "--disk: ops_size= is missing",
            ),
            (
                "path=/a,serial=123456789012345678901",
                "--disk: serial=123456789012345678901 is not 1 to 20 printable ASCII characters",
            ),
        ] {
            assert_eq!(disk(text, 0).unwrap_err().to_string(), message, "{text}");
        }
        assert!(net("tap=t,vhost_mode=server", 0).is_err());
        assert!(net("socket=/n,mtu=9000", 0).is_err());
        assert!(net("socket=/n,vhost_mode=both", 0).is_err());
    }

    #[test]
    fn a_shared_folder_has_a_tag_and_a_socket() {
        let fs = fs("tag=home,socket=/s", 1).unwrap();
        assert_eq!((fs.id.as_str(), fs.tag.as_str()), ("_fs1", "home"));
        assert_eq!((fs.backend.num_queues, fs.backend.queue_size), (1, 1024));
        let long = "x".repeat(37);
        for text in ["socket=/s", "tag=t", &format!("tag={long},socket=/s")] {
            assert!(self::fs(text, 0).is_err(), "{text}");
        }
    }

    #[test]
    fn a_device_of_any_type_has_a_name_or_a_number() {
        let generic = |text: &str| generic(text, 0);
        let rng = generic("device_type=rng,socket=/s,queue_sizes=[64]").unwrap();
        assert_eq!((rng.device_type, rng.queue_sizes), (4, vec![64]));
        let fs = generic("virtio_id=26,socket=/s,queue_sizes=[128,256]").unwrap();
        assert_eq!((fs.device_type, fs.queue_sizes), (26, vec![128, 256]));
        for (text, message) in [
            (
                "device_type=vsocks,socket=/s,queue_sizes=[1]",
                "unknown value 'vsocks' (nearest: 'vsock')",
            ),
            ("device_type=0,socket=/s,queue_sizes=[64]", "1 to 63"),
            ("device_type=64,socket=/s,queue_sizes=[64]", "1 to 63"),
            ("device_type=input,socket=/s,queue_sizes=[64]", "input"),
            ("device_type=rng,socket=/s", "queue_sizes= is missing"),
            (
                "device_type=rng,socket=/s,queue_sizes=[64,x]",
                "queue_sizes=[64,x] is not",
            ),
            ("device_type=rng,queue_sizes=[64]", "socket= is missing"),
            (
                "device_type=rng,virtio_id=4,socket=/s,queue_sizes=[64]",
                "exclude each other",
            ),
        ] {
            let error = generic(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
