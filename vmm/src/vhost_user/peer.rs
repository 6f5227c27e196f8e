//! One connection to a backend: the handshake, and exchanges that end in time.
//!
//! [`vhost::vhost_user::Frontend`] speaks the protocol; here each exchange gets a deadline
//! ([`super::deadline`]) and the reply flag that it needs: requests that have an answer of their own go
//! without NEED_REPLY, all others with it where the backend negotiated REPLY_ACK.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{self, Frontend, VhostUserFrontend};

use super::backend_requests::BackendRequests;
use super::deadline::Deadlines;
use super::kind::{ConfigLen, Found, Kind};

/// Most queues of a backend: SET_VRING_KICK and its like have eight bits for the index.
const MAX_QUEUES: u64 = 256;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// A protocol feature of berth-blk's own, far from those that the specification counts: it keeps pages of guest memory
/// pinned. [`Frontend`] knows no such bit and drops it, so it is asked for beside.
const PINS_MEMORY: u64 = 1 << 63;
const GET_PROTOCOL_FEATURES: u32 = 15;
/// Version 1, and that it is a reply.
const REQUEST_FLAGS: u32 = 1;
const REPLY_FLAGS: u32 = 1 | 1 << 2;

/// Why a backend with [`PINS_MEMORY`] is refused.
const PINS: &str = "it keeps guest memory pinned (berth-blk --fixed-buffers), and what the balloon gives back would be \
                    written to where the guest no longer is: leave out one of the two";

/// Why an exchange failed. The connection is of no more use, but for `Refused`.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{what}: no answer within {} s", limit.as_secs_f32())]
    Silent { what: &'static str, limit: Duration },
    #[error("{what}: {source}")]
    Protocol {
        what: &'static str,
        source: vhost::Error,
    },
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("{what}: refused")]
    Refused { what: &'static str },
    #[error("the backend will not do: {0}")]
    Unfit(String),
    #[error("the backend closed the connection")]
    Closed,
}

/// A connection with its protocol features negotiated.
pub(super) struct Peer {
    frontend: Frontend,
    stream: Arc<UnixStream>,
    deadlines: Arc<Deadlines>,
    /// What the exchanges from now on have together, and until when.
    limit: Duration,
    until: Instant,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    pub(super) requests: Option<BackendRequests>,
}

/// What of the protocol is used, where the backend has it.
fn wanted_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

impl Peer {
    /// Negotiates, and asks the backend what it is. Where the guest's pages may be discarded, one that pins them
    /// will not do.
    pub(super) fn handshake(
        stream: UnixStream,
        kind: &Kind,
        deadlines: &Arc<Deadlines>,
        limit: Duration,
        discards: bool,
    ) -> Result<(Self, Found), Error> {
        let io = |what| move |source| Error::Io { what, source };
        let ours = Arc::new(
            stream
                .try_clone()
                .map_err(io("cannot duplicate the socket"))?,
        );
        let mut peer = Self {
            frontend: Frontend::from_stream(stream, MAX_QUEUES),
            stream: ours,
            deadlines: Arc::clone(deadlines),
            limit,
            until: Instant::now() + limit,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            requests: None,
        };
        let found = peer.negotiate(kind, discards)?;
        Ok((peer, found))
    }

    /// Begins an operation: the exchanges from now on have this time, all together.
    pub(super) fn begin(&mut self, limit: Duration) {
        self.limit = limit;
        self.until = Instant::now() + limit;
    }

    fn negotiate(&mut self, kind: &Kind, discards: bool) -> Result<Found, Error> {
        self.tell("SET_OWNER", |frontend| frontend.set_owner())?;
        self.features = self.ask("GET_FEATURES", |frontend| frontend.get_features())?;
        if self.features & PROTOCOL_FEATURES != 0 {
            let offered = self.ask("GET_PROTOCOL_FEATURES", |frontend| {
                frontend.get_protocol_features()
            })?;
            if discards && self.all_protocol_features()? & PINS_MEMORY != 0 {
                return Err(Error::Unfit(PINS.to_owned()));
            }
            let chosen = offered & wanted_protocol();
            self.ask("SET_PROTOCOL_FEATURES", |frontend| {
                frontend.set_protocol_features(chosen)
            })?;
            self.protocol = chosen;
        }
        let mut queues = None;
        if self.protocol.contains(VhostUserProtocolFeatures::MQ) && kind.asks_queue_num() {
            let said = self.ask("GET_QUEUE_NUM", VhostUserFrontend::get_queue_num)?;
            queues = Some(u16::try_from(said).unwrap_or(u16::MAX));
        }
        self.open_requests()?;
        Ok(Found {
            features: self.features,
            config: self.read_config(kind)?,
            queues,
        })
    }

    /// GET_PROTOCOL_FEATURES with the bits that [`Frontend`] does not know.
    fn all_protocol_features(&self) -> Result<u64, Error> {
        let what = "GET_PROTOCOL_FEATURES";
        let failed = |source| Error::Io { what, source };
        let guard = self.deadlines.arm(&self.stream, self.until);
        let header = [GET_PROTOCOL_FEATURES, REQUEST_FLAGS, 0];
        let mut reply = [0; 20];
        let exchanged = (&*self.stream)
            .write_all(&header.map(u32::to_ne_bytes).concat())
            .and_then(|()| (&*self.stream).read_exact(&mut reply));
        let limit = self.limit;
        exchanged.map_err(|source| match guard.expired() {
            true => Error::Silent { what, limit },
            false => failed(source),
        })?;
        let expected = [GET_PROTOCOL_FEATURES, REPLY_FLAGS, 8].map(u32::to_ne_bytes);
        match reply.split_last_chunk() {
            Some((header, bits)) if header == expected.concat() => Ok(u64::from_ne_bytes(*bits)),
            _ => Err(failed(std::io::ErrorKind::InvalidData.into())),
        }
    }

    fn open_requests(&mut self) -> Result<(), Error> {
        if !self
            .protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            return Ok(());
        }
        let what = "SET_BACKEND_REQ_FD";
        let (ours, theirs) = BackendRequests::new().map_err(|source| Error::Io { what, source })?;
        self.tell(what, |frontend| frontend.set_backend_request_fd(&theirs))?;
        self.requests = Some(ours);
        Ok(())
    }

    /// The backend's configuration space, if it has one.
    pub(super) fn read_config(&mut self, kind: &Kind) -> Result<Option<Vec<u8>>, Error> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(None);
        }
        match kind.config_len() {
            ConfigLen::Exactly(0) => Ok(None),
            ConfigLen::Exactly(len) => self.read_config_bytes(len).map(Some),
            ConfigLen::UpTo(most) => self.read_config_up_to(most).map(Some),
        }
    }

    /// As much as the backend gives, which says no more than that it was asked for too much.
    fn read_config_up_to(&mut self, most: usize) -> Result<Vec<u8>, Error> {
        let mut config = Vec::new();
        let mut step = most;
        while step > 0 {
            let len = config.len() + step;
            if len <= most {
                match self.read_config_bytes(len) {
                    Ok(read) => config = read,
                    Err(Error::Refused { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            step /= 2;
        }
        Ok(config)
    }

    fn read_config_bytes(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        let zeros = vec![0; len];
        let len = zeros.len() as u32;
        let (_, config) = self.ask("GET_CONFIG", |frontend| {
            frontend.get_config(0, len, VhostUserConfigFlags::empty(), &zeros)
        })?;
        Ok(config)
    }

    /// Writes configuration space on behalf of the driver.
    pub(super) fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Error> {
        self.tell("SET_CONFIG", |frontend| {
            frontend.set_config(offset as u32, VhostUserConfigFlags::WRITABLE, data)
        })
    }

    /// Whether rings have to be enabled.
    pub(super) fn has_protocol_features(&self) -> bool {
        self.features & PROTOCOL_FEATURES != 0
    }

    /// Whether it notes requests in flight where they outlive it.
    pub(super) fn tracks_inflight(&self) -> bool {
        self.protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Makes sure that what was sent has arrived, for backends that do not acknowledge it: so no more
    /// lies in the socket than it holds.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.ask("GET_FEATURES", |frontend| frontend.get_features())?;
        }
        Ok(())
    }

    /// An exchange whose request has an answer of its own.
    pub(super) fn ask<T>(
        &mut self,
        what: &'static str,
        exchange: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        self.exchange(what, exchange)
    }

    /// An exchange whose request is acknowledged if the backend can do that.
    pub(super) fn tell<T>(
        &mut self,
        what: &'static str,
        exchange: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        if self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.exchange(what, exchange)
    }

    fn exchange<T>(
        &mut self,
        what: &'static str,
        exchange: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        let limit = self.limit;
        let guard = self.deadlines.arm(&self.stream, self.until);
        exchange(&mut self.frontend).map_err(|source| match source {
            _ if guard.expired() => Error::Silent { what, limit },
            vhost::Error::VhostUserProtocol(vhost_user::Error::BackendInternalError) => {
                Error::Refused { what }
            }
            source => Error::Protocol { what, source },
        })
    }
}

impl AsRawFd for Peer {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
