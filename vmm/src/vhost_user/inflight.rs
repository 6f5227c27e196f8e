//! The region in which backends note the requests that they have taken and not yet answered.
//!
//! ```text
//!   rings of a new driver    GET_INFLIGHT_FD ─▶ kept here     SET_INFLIGHT_FD ─▶ SET_VRING_* …
//!   a backend came back      the same region                  SET_INFLIGHT_FD ─▶ SET_VRING_* …
//!   device reset, reboot     dropped: what was in flight is nobody's
//! ```
//!
//! The first backend makes it and every successor gets it before a ring, so that one which was killed
//! leaves nothing undone and nothing to be done twice. What is in it is the backends' business: it is
//! never mapped here. Reference: vhost-user, "Inflight I/O tracking".

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::kind::Offer;
use super::peer::{Error, Peer};
use super::shared::Rings;

/// A region, for as long as its rings are those of one driver.
pub(super) struct Inflight {
    shape: VhostUserInflight,
    file: File,
}

impl Inflight {
    /// Has the backend use `kept`, or a new one, which is kept, where there is none yet and it can make
    /// one. To be done before it gets a ring.
    ///
    /// # Errors
    /// Also where an earlier backend noted requests, and this one cannot read that.
    pub(super) fn hand_over(
        kept: &mut Option<Self>,
        peer: &mut Peer,
        rings: &Rings,
        offer: &Offer,
    ) -> Result<(), Error> {
        if !peer.tracks_inflight() {
            return match kept {
                None => Ok(()),
                Some(_) => Err(Error::Unfit(
                    "it cannot take over requests in flight".to_owned(),
                )),
            };
        }
        if kept.is_none() {
            *kept = Self::make(peer, rings, offer)?;
        }
        let Some(region) = kept else { return Ok(()) };
        peer.tell("SET_INFLIGHT_FD", |frontend| {
            frontend.set_inflight_fd(&region.shape, region.file.as_raw_fd())
        })
    }

    fn make(peer: &mut Peer, rings: &Rings, offer: &Offer) -> Result<Option<Self>, Error> {
        let queues = rings
            .rings
            .iter()
            .map(|ring| offer.backend_index(ring.index, rings.features) + 1)
            .max();
        let size = rings.rings.iter().map(|ring| ring.size).max();
        let (Some(queues), Some(size)) = (queues, size) else {
            return Ok(None);
        };
        let asked = VhostUserInflight::new(0, 0, queues, size);
        let (got, file) = peer.ask("GET_INFLIGHT_FD", |frontend| {
            frontend.get_inflight_fd(&asked)
        })?;
        // QEMU takes this for a backend that has none after all.
        if got.mmap_size == 0 {
            return Ok(None);
        }
        let shape = VhostUserInflight::new(got.mmap_size, got.mmap_offset, queues, size);
        Ok(Some(Self { shape, file }))
    }
}
