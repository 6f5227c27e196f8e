//! Handing rings to a backend and taking them back.
//!
//! ```text
//!  start   SET_FEATURES, SET_MEM_TABLE, SET_INFLIGHT_FD with a region that it made
//!          each ring: SET_VRING_NUM, _ADDR, _BASE, _ERR, _CALL, _KICK   kick last: it starts the ring
//!          each ring: SET_VRING_ENABLE 1
//!  resume  the same, the region its predecessor's, the base from the used ring; then a kick and an
//!          interrupt for what was missed
//!  stop    each ring: SET_VRING_ENABLE 0
//!          each ring: GET_VRING_BASE             answered when the backend has let go of it
//! ```
//!
//! Addresses of rings are user addresses of this process; the memory table says which guest addresses
//! and which bytes of which file they are.

use std::sync::atomic::Ordering;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::inflight::Inflight;
use super::kind::Offer;
use super::peer::{Error, PROTOCOL_FEATURES, Peer};
use super::shared::{Ring, Rings};

/// Bytes from a used ring's start to its index.
const USED_INDEX: u64 = 2;

/// Rings that a backend runs.
pub(super) struct Running {
    /// Backend's index and error event of each ring, in the order of the rings.
    rings: Vec<(usize, EventFd)>,
}

impl Running {
    /// Hands rings over. If it fails the connection is of no more use.
    ///
    /// `resume` says that a backend has run them before, and is gone; `inflight` is what it has left.
    pub(super) fn start(
        peer: &mut Peer,
        rings: &Rings,
        offer: &Offer,
        inflight: &mut Option<Inflight>,
        resume: bool,
    ) -> Result<Self, Error> {
        let mut features = offer.acknowledge(rings.features);
        if peer.has_protocol_features() {
            features |= PROTOCOL_FEATURES;
        }
        peer.tell("SET_FEATURES", |frontend| frontend.set_features(features))?;
        let table = memory_table(rings)?;
        peer.tell("SET_MEM_TABLE", |frontend| frontend.set_mem_table(&table))?;
        Inflight::hand_over(inflight, peer, rings, offer)?;
        let mut running = Self { rings: Vec::new() };
        for ring in &rings.rings {
            let index = usize::from(offer.backend_index(ring.index, rings.features));
            let err = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| Error::Io {
                what: "cannot make an eventfd",
                source,
            })?;
            let base = if resume { used_index(rings, ring)? } else { 0 };
            set_up(peer, rings, ring, index, base)?;
            hand_over(peer, ring, index, &err)?;
            running.rings.push((index, err));
        }
        running.enable(peer, true)?;
        if resume {
            for ring in &rings.rings {
                // Full is as good as written.
                let _ = ring.kick.write(1);
                let _ = ring.call().write(1);
            }
        }
        Ok(running)
    }

    /// Takes all rings back.
    pub(super) fn stop(self, peer: &mut Peer) -> Result<(), Error> {
        self.enable(peer, false)?;
        for (index, _) in self.rings {
            peer.ask("GET_VRING_BASE", |frontend| frontend.get_vring_base(index))?;
        }
        Ok(())
    }

    /// Sends a ring's interrupts to where they go now.
    pub(super) fn set_call(&self, peer: &mut Peer, rings: &Rings, queue: u16) -> Result<(), Error> {
        let mut both = rings.rings.iter().zip(&self.rings);
        let Some((ring, (index, _))) = both.find(|(ring, _)| ring.index == queue) else {
            return Ok(());
        };
        let call = ring.call();
        peer.tell("SET_VRING_CALL", |frontend| {
            frontend.set_vring_call(*index, &call)
        })?;
        // What came in between went to the old one.
        let _ = call.write(1);
        Ok(())
    }

    /// The error events, in the order of the rings.
    pub(super) fn errors(&self) -> impl Iterator<Item = &EventFd> {
        self.rings.iter().map(|(_, err)| err)
    }

    fn enable(&self, peer: &mut Peer, enable: bool) -> Result<(), Error> {
        if !peer.has_protocol_features() {
            return Ok(());
        }
        for (index, _) in &self.rings {
            peer.tell("SET_VRING_ENABLE", |frontend| {
                frontend.set_vring_enable(*index, enable)
            })?;
        }
        peer.settle()
    }
}

/// Where the ring is and where to go on.
fn set_up(
    peer: &mut Peer,
    rings: &Rings,
    ring: &Ring,
    index: usize,
    base: u16,
) -> Result<(), Error> {
    let size = usize::from(ring.size);
    let addresses = VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: 0,
        desc_table_addr: user_address(rings, ring.desc, 16 * size)?,
        used_ring_addr: user_address(rings, ring.used, 6 + 8 * size)?,
        avail_ring_addr: user_address(rings, ring.avail, 6 + 2 * size)?,
        log_addr: None,
    };
    peer.tell("SET_VRING_NUM", |frontend| {
        frontend.set_vring_num(index, ring.size)
    })?;
    peer.tell("SET_VRING_ADDR", |frontend| {
        frontend.set_vring_addr(index, &addresses)
    })?;
    peer.tell("SET_VRING_BASE", |frontend| {
        frontend.set_vring_base(index, base)
    })
}

/// The ring's events; the backend starts it with the last.
fn hand_over(peer: &mut Peer, ring: &Ring, index: usize, err: &EventFd) -> Result<(), Error> {
    peer.tell("SET_VRING_ERR", |frontend| {
        frontend.set_vring_err(index, err)
    })?;
    peer.tell("SET_VRING_CALL", |frontend| {
        frontend.set_vring_call(index, &ring.call())
    })?;
    peer.tell("SET_VRING_KICK", |frontend| {
        frontend.set_vring_kick(index, &ring.kick)
    })?;
    peer.settle()
}

/// Guest memory as the backend is to map it.
fn memory_table(rings: &Rings) -> Result<Vec<VhostUserMemoryRegionInfo>, Error> {
    rings
        .memory
        .iter()
        .map(VhostUserMemoryRegionInfo::from_guest_region)
        .collect::<Result<_, _>>()
        .map_err(|_| Error::Unfit("guest memory is not shared with it".to_owned()))
}

fn user_address(rings: &Rings, gpa: u64, len: usize) -> Result<u64, Error> {
    let slice = rings
        .memory
        .get_slice(GuestAddress(gpa), len)
        .map_err(|error| Error::Unfit(format!("no ring fits at {gpa:#x}: {error}")))?;
    Ok(slice.ptr_guard().as_ptr() as u64)
}

/// The used index that a backend left: everything before it is done.
fn used_index(rings: &Rings, ring: &Ring) -> Result<u16, Error> {
    let at = GuestAddress(ring.used + USED_INDEX);
    let index: u16 = rings
        .memory
        .load(at, Ordering::Acquire)
        .map_err(|error| Error::Unfit(format!("no used ring at {at:?}: {error}")))?;
    Ok(u16::from_le(index))
}
