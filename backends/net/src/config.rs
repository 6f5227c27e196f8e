//! The configuration: checked arguments.

#![forbid(unsafe_code)]

use std::os::fd::RawFd;

use berth_queue_worker::DaemonArgs;
use thiserror::Error;

use crate::args::Args;
use crate::device::{Identity, MAX_PAIRS};
use crate::settings::Settings;

/// Where the port comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortConfig {
    /// An interface of this name.
    Tap {
        /// Its name.
        name: String,
        /// Make it if it is not there.
        create: bool,
    },
    /// Attached descriptors.
    Fds(Vec<RawFd>),
}

/// What the daemon is to do.
#[derive(Debug, Clone)]
pub struct Config {
    /// Sockets.
    pub daemon: DaemonArgs,
    /// The tap.
    pub port: PortConfig,
    /// The device.
    pub settings: Settings,
}

/// Why the arguments make no sense together.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Neither --tap nor --tap-fd.
    #[error("no network: give --tap=NAME or --tap-fd=N")]
    NoPort,
    /// More descriptors than a device can have pairs.
    #[error("--tap-fd names {0} descriptors; at most {MAX_PAIRS} pairs are possible")]
    TooManyFds(usize),
    /// The same descriptor twice.
    #[error("--tap-fd names descriptor {0} twice")]
    SameFd(RawFd),
    /// Not one descriptor a pair.
    #[error("--num-queues={pairs} does not fit the {fds} descriptors of --tap-fd: one a pair")]
    FdCount {
        /// Pairs asked for.
        pairs: u16,
        /// Descriptors given.
        fds: usize,
    },
    /// Not a ring size.
    #[error("--queue-size={0} is not a power of two between 16 and 1024")]
    QueueSize(u16),
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        if !args.queue_size.is_power_of_two() || !(16..=1024).contains(&args.queue_size) {
            return Err(ConfigError::QueueSize(args.queue_size));
        }
        let (port, pairs) = match (args.tap, args.tap_fd) {
            (Some(name), _) => (
                PortConfig::Tap {
                    name,
                    create: args.create,
                },
                args.num_queues.unwrap_or(1),
            ),
            (None, fds) if fds.is_empty() => return Err(ConfigError::NoPort),
            (None, fds) => {
                let pairs = pairs_of_fds(&fds, args.num_queues)?;
                (PortConfig::Fds(fds), pairs)
            }
        };
        Ok(Self {
            daemon: args.daemon,
            port,
            settings: Settings {
                identity: Identity {
                    mac: args.mac,
                    mtu: args.mtu,
                    pairs,
                },
                max_queue_size: args.queue_size,
                rate_limit_rx: args.rate_limit_rx,
                rate_limit_tx: args.rate_limit_tx,
                engine: args.engine,
            },
        })
    }
}

fn pairs_of_fds(fds: &[RawFd], asked: Option<u16>) -> Result<u16, ConfigError> {
    let pairs = u16::try_from(fds.len())
        .ok()
        .filter(|&pairs| pairs <= MAX_PAIRS)
        .ok_or(ConfigError::TooManyFds(fds.len()))?;
    if let Some((_, fd)) = fds
        .iter()
        .enumerate()
        .find(|(i, fd)| fds[..*i].contains(fd))
    {
        return Err(ConfigError::SameFd(*fd));
    }
    match asked {
        Some(asked) if asked != pairs => Err(ConfigError::FdCount {
            pairs: asked,
            fds: fds.len(),
        }),
        _ => Ok(pairs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        let args = [&["berth-net", "--socket-path=s"], args].concat();
        Config::try_from(Args::try_parse_from(args).unwrap())
    }

    fn usage(args: &[&str]) -> String {
        let args = [&["berth-net"], args].concat();
        Args::try_parse_from(args).unwrap_err().to_string()
    }

    #[test]
    fn everything_given() {
        let config = config(&[
            "--tap=tap0",
            "--create",
            "--mac=52:54:00:12:34:56",
            "--num-queues=8",
            "--queue-size=256",
            "--mtu=9000",
        ])
        .unwrap();
        assert_eq!(
            config.port,
            PortConfig::Tap {
                name: "tap0".to_string(),
                create: true
            }
        );
        assert_eq!(config.settings.identity.pairs, 8);
        assert_eq!(config.settings.identity.mtu, Some(9000));
        assert_eq!(
            config.settings.identity.mac.unwrap().to_string(),
            "52:54:00:12:34:56"
        );
        assert_eq!(config.settings.max_queue_size, 256);
    }

    #[test]
    fn pairs_follow_descriptors() {
        let port = config(&["--tap-fd=4,5,7"]).unwrap();
        assert_eq!(port.port, PortConfig::Fds(vec![4, 5, 7]));
        assert_eq!(port.settings.identity.pairs, 3);
        let error = |args: &[&str]| config(args).unwrap_err();
        assert_eq!(error(&["--tap-fd=4,4"]), ConfigError::SameFd(4));
        assert_eq!(
            error(&["--tap-fd=4,5", "--num-queues=1"]),
            ConfigError::FdCount { pairs: 1, fds: 2 }
        );
        assert_eq!(
            error(&["--tap-fd=1,2,3,4,5,6,7,8,9"]),
            ConfigError::TooManyFds(9)
        );
    }

    #[test]
    fn what_does_not_fit_together() {
        assert_eq!(config(&[]).unwrap_err(), ConfigError::NoPort);
        for size in ["0", "8", "100", "2048"] {
            let args = ["--tap=t", "--queue-size", size];
            assert!(
                matches!(config(&args).unwrap_err(), ConfigError::QueueSize(_)),
                "{size}"
            );
        }
    }

    #[test]
    fn usage_errors_name_the_flag_and_the_nearest_one() {
        assert!(
            usage(&["--tpa=tap0"]).contains("--tap"),
            "{}",
            usage(&["--tpa=tap0"])
        );
        assert!(usage(&["--num-queues=9"]).contains("1..=8"));
        assert!(usage(&["--num-queues=0"]).contains("1..=8"));
        assert!(usage(&["--mtu=67"]).contains("68..=65521"));
        assert!(usage(&["--mac=1:2"]).contains("is not a MAC address"));
        assert!(usage(&["--create", "--tap-fd=3"]).contains("cannot be used with"));
        assert!(usage(&["--tap=a", "--tap-fd=3"]).contains("cannot be used with"));
    }
}
