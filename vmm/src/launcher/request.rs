//! What may be asked of the launcher, and the arguments that it comes to.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::shared_fd::SharedFd;
use crate::config::{Bucket, DiskConfig, Link, NetConfig, RateLimit, Serves, TapSource};
use crate::vhost_user::Kind;

/// A daemon for a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The program, else ours.
    pub program: Option<PathBuf>,
    /// Queues, as the daemon counts them.
    pub num_queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// What it serves.
    pub serve: Serve,
}

/// What a daemon serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Serve {
    /// An image.
    Disk {
        /// Raw file or block device.
        path: PathBuf,
        /// Whether it must not be written.
        readonly: bool,
        /// Whether it is read and written past the host's page cache.
        direct: bool,
        /// The disk's serial number.
        serial: Option<String>,
        /// As the daemon's flag has it.
        rate_limit: Option<String>,
    },
    /// A tap.
    Net {
        /// Its name; none, the descriptors that come along.
        tap: Option<String>,
        /// The card's address.
        mac: Option<[u8; 6]>,
        /// Largest packet.
        mtu: Option<u16>,
        /// As the daemon's flags have it.
        rate_limit: Option<String>,
    },
}

impl Request {
    /// What starts that device's daemon, if it is one of those that are started.
    pub fn of(kind: &Kind) -> Option<Self> {
        match kind {
            Kind::Blk(disk) => Self::of_disk(disk),
            Kind::Net(net) => Self::of_net(net),
            Kind::Fs(_) | Kind::Generic(_) => None,
        }
    }

    fn of_disk(disk: &DiskConfig) -> Option<Self> {
        let Link::Start(daemon) = &disk.backend.link else {
            return None;
        };
        let Serves::Image(image) = &daemon.serves else {
            return None;
        };
        Some(Self {
            program: daemon.program.clone(),
            num_queues: disk.backend.num_queues,
            queue_size: disk.backend.queue_size,
            serve: Serve::Disk {
                path: image.path.clone(),
                readonly: disk.readonly,
                direct: image.direct,
                serial: image.serial.clone(),
                rate_limit: rate_limit(&image.limit),
            },
        })
    }

    fn of_net(net: &NetConfig) -> Option<Self> {
        let Link::Start(daemon) = &net.backend.link else {
            return None;
        };
        let Serves::Tap(tap) = &daemon.serves else {
            return None;
        };
        Some(Self {
            program: daemon.program.clone(),
            num_queues: net.backend.num_queues / 2,
            queue_size: net.backend.queue_size,
            serve: Serve::Net {
                tap: match &tap.source {
                    TapSource::Name(name) => Some(name.clone()),
                    TapSource::Fds(_) => None,
                },
                mac: net.mac,
                mtu: tap.mtu,
                rate_limit: rate_limit(&tap.limit),
            },
        })
    }

    /// The descriptors of a device's tap.
    pub fn taps(kind: &Kind) -> &[SharedFd] {
        if let Kind::Net(net) = kind
            && let Link::Start(daemon) = &net.backend.link
            && let Serves::Tap(tap) = &daemon.serves
            && let TapSource::Fds(fds) = &tap.source
        {
            return fds;
        }
        &[]
    }

    /// Our program for this.
    pub(super) fn ours(&self) -> &'static str {
        match self.serve {
            Serve::Disk { .. } => "berth-blk",
            Serve::Net { .. } => "berth-net",
        }
    }

    /// The program, for messages.
    pub(super) fn name(&self) -> String {
        let program = self.program.as_ref();
        program.map_or(self.ours().to_owned(), |path| path.display().to_string())
    }

    /// Its arguments; `socket` and `taps` are descriptors that it inherits.
    pub(super) fn arguments(&self, socket: RawFd, taps: &[RawFd]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec![
            format!("--fd={socket}").into(),
            format!("--num-queues={}", self.num_queues).into(),
            format!("--queue-size={}", self.queue_size).into(),
        ];
        let mut flag = |name: &str, value: Option<String>| {
            arguments.extend(value.map(|value| format!("--{name}={value}").into()));
        };
        match &self.serve {
            Serve::Disk {
                path,
                readonly,
                direct,
                serial,
                rate_limit,
            } => {
                flag("cache", direct.then(|| "none".to_owned()));
                flag("serial-id", serial.clone());
                flag("rate-limit", rate_limit.clone());
                arguments.extend(readonly.then(|| "--read-only".into()));
                let mut file = OsString::from("--blk-file=");
                file.push(path);
                arguments.push(file);
            }
            Serve::Net {
                tap,
                mac,
                mtu,
                rate_limit,
            } => {
                let text = |mac: &[u8; 6]| mac.map(|octet| format!("{octet:02x}")).join(":");
                flag("mac", mac.as_ref().map(text));
                flag("mtu", mtu.map(|mtu| mtu.to_string()));
                flag("rate-limit-rx", rate_limit.clone());
                flag("rate-limit-tx", rate_limit.clone());
                flag("tap", tap.clone());
                let fds: Vec<_> = taps.iter().map(ToString::to_string).collect();
                flag("tap-fd", tap.is_none().then(|| fds.join(",")));
                arguments.extend(tap.is_some().then(|| "--create".into()));
            }
        }
        arguments
    }
}

fn rate_limit(limit: &RateLimit) -> Option<String> {
    let bucket = |prefix: &str, bucket: &Bucket| {
        let Bucket {
            size,
            one_time_burst,
            refill_ms,
        } = bucket;
        format!(
            "{prefix}_size={size},{prefix}_one_time_burst={one_time_burst},{prefix}_refill_time={refill_ms}"
        )
    };
    let parts = [("bw", &limit.bandwidth), ("ops", &limit.ops)];
    let given: Vec<_> = parts
        .iter()
        .filter_map(|(prefix, limit)| limit.as_ref().map(|limit| bucket(prefix, limit)))
        .collect();
    (!given.is_empty()).then(|| given.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::device_flags;

    fn arguments(kind: &Kind) -> String {
        let request = Request::of(kind).unwrap();
        let message = serde_json::to_vec(&request).unwrap();
        assert_eq!(
            serde_json::from_slice::<Request>(&message).unwrap(),
            request
        );
        let words = request.arguments(7, &[8, 9]);
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn a_disk_becomes_arguments_of_its_daemon() {
        let disk = |text: &str| arguments(&Kind::Blk(device_flags::disk(text, 0).unwrap()));
        assert_eq!(
            disk("path=/d.raw"),
            "--fd=7 --num-queues=1 --queue-size=128 --blk-file=/d.raw"
        );
        assert_eq!(
            disk(
                "path=--help,readonly=on,direct=on,serial=s 1,num_queues=4,queue_size=256,\
                  bw_size=1M,bw_refill_time=100,ops_size=7,ops_one_time_burst=1,ops_refill_time=9"
            ),
            "--fd=7 --num-queues=4 --queue-size=256 --cache=none --serial-id=s 1 \
             --rate-limit=bw_size=1048576,bw_one_time_burst=0,bw_refill_time=100,\
             ops_size=7,ops_one_time_burst=1,ops_refill_time=9 --read-only --blk-file=--help"
        );
        let elsewhere = Kind::Blk(device_flags::disk("socket=/s", 0).unwrap());
        assert_eq!(Request::of(&elsewhere), None);
    }

    #[test]
    fn a_card_becomes_arguments_of_its_daemon() {
        let net = |text: &str| Kind::Net(device_flags::net(text, 0).unwrap());
        let text = "tap=tap0,mac=52:54:00:12:34:56,mtu=9000,num_queues=4";
        assert_eq!(
            arguments(&net(text)),
            "--fd=7 --num-queues=2 --queue-size=256 --mac=52:54:00:12:34:56 --mtu=9000 --tap=tap0 \
             --create"
        );
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&null);
        let kind = net(&format!("fd=[{fd},{fd}]"));
        assert_eq!(
            arguments(&kind),
            "--fd=7 --num-queues=2 --queue-size=256 --tap-fd=8,9"
        );
        assert_eq!(Request::taps(&kind).len(), 2);
    }
}
