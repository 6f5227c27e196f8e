//! The frontend's end: dialling a daemon, and dialling it again after it has died.

use std::fs::File;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};

use super::memory::Memory;
use super::ring::Ring;
use super::{Protocol, features};
use crate::sys;
use crate::wait::{Broken, patient, seconds, until};

/// Most queues of a backend.
const MAX_QUEUES: u64 = 256;
/// How long a handshake may take: a disk waits for what its predecessor has in flight.
const HANDSHAKE: Duration = seconds(60);

/// What of a daemon's offer is taken.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Virtio's features and the protocol feature bit.
    pub features: u64,
    /// The protocol's features.
    pub protocol: Protocol,
}

/// The region where a daemon keeps what is in flight. It is the frontend's, and outlives the daemon.
pub struct Inflight {
    layout: VhostUserInflight,
    file: File,
}

impl std::fmt::Debug for Inflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflight")
            .field("size_bytes", &self.layout.mmap_size)
            .finish_non_exhaustive()
    }
}

/// A connection to a daemon that runs the rings.
pub struct Link {
    frontend: Frontend,
    stream: UnixStream,
    features: u64,
    protocol: Protocol,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("features", &self.features)
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// Dials the daemon at `path` as soon as it listens, and negotiates.
    ///
    /// # Errors
    /// Nobody listens in time, or the daemon does not speak the protocol.
    pub fn dial(path: &Path, wanted: Wanted) -> Result<Self> {
        let stream = until(
            &format!("a listener at {}", path.display()),
            HANDSHAKE,
            || match UnixStream::connect(path) {
                Ok(stream) => Ok(Some(stream)),
                Err(e)
                    if [ErrorKind::ConnectionRefused, ErrorKind::NotFound].contains(&e.kind()) =>
                {
                    Ok(None)
                }
                Err(e) => Err(e).with_context(|| path.display().to_string()),
            },
        )?;
        let mut link = Self {
            frontend: Frontend::from_stream(stream.try_clone()?, MAX_QUEUES),
            stream,
            features: 0,
            protocol: Protocol::empty(),
        };
        let curfew = link.curfew()?;
        link.negotiate(wanted).context("handshake")?;
        drop(curfew);
        Ok(link)
    }

    fn negotiate(&mut self, wanted: Wanted) -> Result<()> {
        let frontend = &mut self.frontend;
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        self.features = offered & wanted.features;
        if self.features & features::PROTOCOL_FEATURES != 0 {
            self.protocol = frontend.get_protocol_features()? & wanted.protocol;
            frontend.set_protocol_features(self.protocol)?;
        }
        frontend.set_features(self.features)?;
        Ok(())
    }

    /// Ends an exchange that takes too long by closing the connection: the crate waits for ever.
    fn curfew(&self) -> Result<Sender<()>> {
        let (over, late) = channel();
        let stream = self.stream.try_clone()?;
        std::thread::Builder::new()
            .name("curfew".to_owned())
            .spawn(move || {
                if late.recv_timeout(patient(HANDSHAKE)) == Err(RecvTimeoutError::Timeout) {
                    eprintln!("a vhost-user request was not answered in time");
                    let _ = stream.shutdown(Shutdown::Both);
                }
            })?;
        Ok(over)
    }

    /// Negotiated features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Negotiated protocol features.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Sleeps until the daemon signals one of the rings, and takes the signals. Looks into no ring: a signal
    /// that the daemon owes and does not send is missed.
    ///
    /// # Errors
    /// No signal in time, or the daemon is gone.
    pub fn wait_signal(&self, rings: &[Ring], limit: Duration) -> Result<()> {
        let mut fds = vec![self.stream.as_raw_fd()];
        fds.extend(rings.iter().map(Ring::wake_fd));
        match sys::poll_readable(&fds, patient(limit))? {
            None => Err(Broken::deadline("a signal from the daemon", limit)),
            Some(0) => Err(Broken::Gone("the daemon closed the connection".to_owned()).into()),
            Some(_) => {
                rings.iter().for_each(Ring::take_signal);
                Ok(())
            }
        }
    }

    /// A region for `queues` of `size`, as the daemon lays it out.
    ///
    /// # Errors
    /// The daemon does not track what is in flight.
    pub fn new_inflight(&mut self, queues: u16, size: u16) -> Result<Inflight> {
        ensure!(
            self.protocol.contains(Protocol::INFLIGHT_SHMFD),
            "the daemon does not offer INFLIGHT_SHMFD"
        );
        let _curfew = self.curfew()?;
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        let wish = VhostUserInflight::new(0, 0, queues, size);
        let (layout, file) = self
            .frontend
            .get_inflight_fd(&wish)
            .context("GET_INFLIGHT_FD")?;
        ensure!(layout.mmap_size > 0, "an inflight region of no size");
        Ok(Inflight { layout, file })
    }

    /// Gives the daemon memory, the region of what is in flight, and the rings, each from its base.
    ///
    /// # Errors
    /// The daemon refuses something.
    pub fn start(
        &mut self,
        memory: &Memory,
        rings: &mut [Ring],
        inflight: Option<&Inflight>,
        base: impl Fn(&Ring) -> u16,
    ) -> Result<()> {
        let _curfew = self.curfew()?;
        if self.protocol.contains(Protocol::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.frontend
            .set_mem_table(&[memory.region()])
            .context("SET_MEM_TABLE")?;
        if let Some(region) = inflight {
            self.frontend
                .set_inflight_fd(&region.layout, region.file.as_raw_fd())
                .context("SET_INFLIGHT_FD")?;
        }
        for ring in rings {
            ring.set_features(self.features);
            self.start_ring(ring, base(ring))
                .with_context(|| format!("queue {}", ring.index()))?;
        }
        Ok(())
    }

    fn start_ring(&mut self, ring: &Ring, base: u16) -> Result<()> {
        let index = usize::from(ring.index());
        let [desc, avail, used] = ring.uvas();
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, ring.size())?;
        frontend.set_vring_base(index, base)?;
        let addresses = VringConfigData {
            queue_max_size: ring.size(),
            queue_size: ring.size(),
            desc_table_addr: desc,
            avail_ring_addr: avail,
            used_ring_addr: used,
            ..Default::default()
        };
        frontend.set_vring_addr(index, &addresses)?;
        frontend.set_vring_call(index, ring.call_fd())?;
        frontend.set_vring_kick(index, ring.kick_fd())?;
        if self.features & features::PROTOCOL_FEATURES != 0 {
            frontend.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Stops a ring: everything that the daemon has taken is answered; where it would go on.
    ///
    /// # Errors
    /// No answer in time.
    pub fn stop_ring(&mut self, ring: &Ring) -> Result<u16> {
        let _curfew = self.curfew()?;
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        let base = self
            .frontend
            .get_vring_base(usize::from(ring.index()))
            .context("GET_VRING_BASE")?;
        Ok(u16::try_from(base & 0xffff)?)
    }
}
