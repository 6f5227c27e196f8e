//! A Linux tap as the port: one file descriptor a queue.
//!
//! ```text
//!   --tap=NAME            attach to what is there, made with or without IFF_MULTI_QUEUE
//!   --tap=NAME --create   make it if it is not there; it goes when the last descriptor closes
//!   --tap-fd=N[,N...]     descriptors that someone with more rights attached for us
//! ```
//!
//! One frame a system call, straight from and into guest memory. A tap made here is not
//! persistent, so the kernel removes it with us however we end, SIGKILL included; one that was
//! there before is left as it was.
//!
//! Threads: workers read and write their own queue; offloads, header length and attachment are
//! set by the control thread or the control queue's thread. The kernel locks.
//!
//! Invariants: queue 0 is always attached. Other queues are detached until told, since a frame
//! steered to a queue that nobody reads is a lost connection.
//! Kernel: Documentation/networking/tuntap.rst, 3.3 (multi-queue).

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use berth_queue_worker::Syscall;
use libc::c_int;
use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::attach::{attach, attach_first, check_name};
use super::drops::Drops;
use super::frame::Frame;
use super::link::LinkWatch;
use super::{NetPort, sys};
use crate::device::has;
use crate::header::HDR_LEN;

/// An Ethernet header with two VLAN tags.
const ETHERNET_WITH_TAGS: usize = 14 + 2 * 4;
/// Both or neither: the kernel refuses one alone.
const TUN_F_USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Why there is no tap to work with.
#[derive(Debug, Error)]
pub enum TapError {
    /// No tun driver, or no right to it.
    #[error("cannot open /dev/net/tun (is the tun module loaded, and may this user open it?)")]
    Device(#[source] io::Error),
    /// Not a possible interface name.
    #[error("'{0}' is not an interface name (1 to 15 bytes, no '/', '%', ':' or blanks)")]
    Name(String),
    /// Nothing of that name.
    #[error("tap '{0}' does not exist; make it (ip tuntap add {0} mode tap) or give --create")]
    Missing(String),
    /// Not a tap.
    #[error("'{0}' is not a tap device")]
    NotTap(String),
    /// Its only queue is taken.
    #[error("tap '{0}' is in use by another process")]
    Busy(String),
    /// It belongs to somebody else, or we may not make one.
    #[error("no right to tap '{0}': run as its owner, or with CAP_NET_ADMIN")]
    NotOurs(String),
    /// One queue where more are needed.
    #[error(
        "tap '{0}' has a single queue, {1} pairs need {1}; \
         make it with multi_queue or use --num-queues=1"
    )]
    SingleQueue(String, u16),
    /// A descriptor that is no tap's.
    #[error("--tap-fd={0} is not a tap's file descriptor")]
    NotTapFd(RawFd),
    /// A tap's descriptor made without what we need.
    #[error("--tap-fd={0} was made without {1}; it needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    FdFlags(RawFd, &'static str),
    /// Descriptors of two taps.
    #[error("--tap-fd={0} belongs to '{1}', the first one to '{2}'")]
    FdMixed(RawFd, String, String),
    /// Something else that the kernel refused.
    #[error("cannot {action} tap '{name}'")]
    Setup {
        /// Name of the tap.
        name: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A tap with its queues.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<OwnedFd>,
    multi_queue: bool,
    uso: bool,
    roomy: bool,
    /// As of the last look; 0 where it is not known. Written by the thread that follows the link.
    mtu: Arc<AtomicU32>,
    /// None where the tap may live in another network namespace, so that its name means nothing,
    /// or where the kernel does not tell.
    link: Option<LinkWatch>,
    /// None in the same cases.
    drops: Option<Drops>,
}

impl Tap {
    /// Attaches `pairs` queues to the tap `name`; with `create`, makes it if there is none.
    /// `mtu` is for a tap that is made.
    ///
    /// # Errors
    /// See [`TapError`]: each names the tap and what to do.
    pub fn open(name: &str, pairs: u16, create: bool, mtu: Option<u16>) -> Result<Self, TapError> {
        check_name(name)?;
        let exists = sys::if_index(name).is_some();
        if !exists && !create {
            return Err(TapError::Missing(name.to_string()));
        }
        let (first, multi_queue) = attach_first(name, pairs, exists)?;
        let mut queues = vec![first];
        for _ in 1..pairs {
            queues.push(attach(name, libc::IFF_MULTI_QUEUE).map_err(|e| e.explain(name))?);
        }
        let mut tap = Self::new(name.to_string(), queues, multi_queue)?;
        match LinkWatch::open(name) {
            Ok(link) => tap.link = Some(link),
            Err(error) => {
                tracing::warn!(%error, "cannot follow the tap's link; the guest is told that it is up");
            }
        }
        tap.drops = Drops::open(name).ok();
        if !exists {
            tap.set_up(mtu)?;
            tracing::info!(tap = name, "tap created; it goes when this process ends");
        }
        if let Some(now) = tap.link.as_ref().and_then(|link| link.mtu().ok()) {
            tap.mtu.store(now, Ordering::Relaxed);
        }
        if exists && let Some(mtu) = mtu {
            tap.warn_of_other_mtu(mtu);
        }
        Ok(tap)
    }

    /// Takes over attached descriptors, one a pair.
    ///
    /// # Errors
    /// A descriptor that is not a tap's, lacks a header, or is another tap's.
    pub fn from_fds(fds: &[RawFd]) -> Result<Self, TapError> {
        let mut queues = Vec::new();
        let mut first: Option<(String, c_int)> = None;
        for &fd in fds {
            let queue = sys::duplicate(fd).map_err(|_| TapError::NotTapFd(fd))?;
            let (name, flags) = sys::get_iff(queue.as_fd()).map_err(|_| TapError::NotTapFd(fd))?;
            let wanted = [
                (libc::IFF_TAP, "IFF_TAP"),
                (libc::IFF_NO_PI, "IFF_NO_PI"),
                (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
            ];
            if let Some((_, missing)) = wanted.iter().find(|(flag, _)| flags & flag == 0) {
                return Err(TapError::FdFlags(fd, missing));
            }
            let (tap, _) = first.get_or_insert_with(|| (name.clone(), flags));
            if *tap != name {
                return Err(TapError::FdMixed(fd, name, tap.clone()));
            }
            sys::set_nonblocking(queue.as_fd()).map_err(setup(&name, "set up"))?;
            queues.push(queue);
        }
        let (name, flags) = first.unwrap_or_default();
        Self::new(name, queues, flags & libc::IFF_MULTI_QUEUE != 0)
    }

    fn new(name: String, queues: Vec<OwnedFd>, multi_queue: bool) -> Result<Self, TapError> {
        let mut tap = Self {
            name,
            queues,
            multi_queue,
            uso: false,
            roomy: false,
            mtu: Arc::default(),
            link: None,
            drops: None,
        };
        let name = tap.name.clone();
        let first = tap
            .queues
            .first()
            .ok_or_else(|| TapError::Name(name.clone()))?
            .as_fd();
        sys::set_vnet_hdr_size(first, HDR_LEN).map_err(setup(&name, "set the header size of"))?;
        let uso = sys::set_offload(first, libc::TUN_F_CSUM | TUN_F_USO).is_ok();
        sys::set_offload(first, 0).map_err(setup(&name, "set the offloads of"))?;
        // Nobody but the descriptor's maker limits it; a limit that cannot be read may be there.
        let roomy = sys::send_buffer(first).is_ok_and(|bytes| bytes == c_int::MAX);
        tap.uso = uso;
        tap.roomy = roomy;
        for queue in 1..tap.num_queues() {
            tap.set_attached(queue, false)
                .map_err(setup(&name, "detach a queue of"))?;
        }
        Ok(tap)
    }

    /// Name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn set_up(&self, mtu: Option<u16>) -> Result<(), TapError> {
        let socket = sys::control_socket().map_err(setup(&self.name, "set up"))?;
        if let Some(mtu) = mtu {
            sys::set_mtu(socket.as_fd(), &self.name, mtu)
                .map_err(setup(&self.name, "set the MTU of"))?;
        }
        sys::set_up(socket.as_fd(), &self.name).map_err(setup(&self.name, "set up"))
    }

    fn warn_of_other_mtu(&self, guest: u16) {
        if let Some(tap) = self.mtu()
            && tap != u32::from(guest)
        {
            tracing::warn!(
                tap = self.name,
                tap_mtu = tap,
                guest,
                "tap has another MTU than --mtu"
            );
        }
    }

    /// The interface's MTU when it was looked at last, where it can be.
    #[must_use]
    pub fn mtu(&self) -> Option<u32> {
        // A number by itself: no ordering.
        Some(self.mtu.load(Ordering::Relaxed)).filter(|mtu| *mtu != 0)
    }

    fn queue(&self, queue: u16) -> io::Result<&OwnedFd> {
        self.queues
            .get(usize::from(queue))
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl NetPort for Tap {
    fn num_queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn has_uso(&self) -> bool {
        self.uso
    }

    fn is_roomy(&self) -> bool {
        self.roomy
    }

    fn host_drops(&self) -> Option<u64> {
        self.drops.as_ref().and_then(|drops| drops.count().ok())
    }

    fn max_plain_frame(&self) -> Option<usize> {
        let mtu = self.mtu()?;
        Some(HDR_LEN + ETHERNET_WITH_TAGS + mtu as usize)
    }

    fn fd(&self, queue: u16) -> RawFd {
        self.queue(queue).map_or(-1, AsRawFd::as_raw_fd)
    }

    fn recv(&self, queue: u16, frame: &mut Frame<'_, '_>) -> io::Result<usize> {
        sys::readv(self.queue(queue)?.as_fd(), frame)
    }

    fn send(&self, queue: u16, frame: &Frame<'_, '_>) -> io::Result<usize> {
        sys::writev(self.queue(queue)?.as_fd(), frame)
    }

    fn set_header_len(&self, len: usize) -> io::Result<()> {
        sys::set_vnet_hdr_size(self.queue(0)?.as_fd(), len)
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        sys::set_offload(self.queue(0)?.as_fd(), tun_offloads(features))
    }

    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()> {
        if queue == 0 || !self.multi_queue {
            return Ok(());
        }
        match sys::set_queue(self.queue(queue)?.as_fd(), attached) {
            // It is as asked already.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn watch_link(&self, on_change: Box<dyn Fn(bool) + Send>) -> io::Result<()> {
        let Some(link) = &self.link else {
            return Ok(());
        };
        let mtu = Arc::clone(&self.mtu);
        link.follow(move |link| {
            if let Some(now) = link.mtu {
                mtu.store(now, Ordering::Relaxed);
            }
            on_change(link.up);
        })
    }

    fn syscalls(&self) -> Vec<Syscall> {
        const TAP: [Syscall; 3] = [
            Syscall::any(libc::SYS_readv),
            Syscall::any(libc::SYS_writev),
            Syscall::ioctl(&[
                libc::TUNSETQUEUE as u32,
                libc::TUNSETVNETHDRSZ as u32,
                libc::TUNSETOFFLOAD as u32,
                libc::SIOCGIFFLAGS as u32,
                libc::SIOCGIFMTU as u32,
            ]),
        ];
        TAP.to_vec()
    }
}

/// TUN_F_* for the offloads that the guest accepts on receive. None go without checksum offload,
/// since a segmented frame has no full checksum.
fn tun_offloads(features: u64) -> u32 {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let tso4 = has(features, VIRTIO_NET_F_GUEST_TSO4);
    let tso6 = has(features, VIRTIO_NET_F_GUEST_TSO6);
    let mut bits = libc::TUN_F_CSUM;
    if tso4 {
        bits |= libc::TUN_F_TSO4;
    }
    if tso6 {
        bits |= libc::TUN_F_TSO6;
    }
    if (tso4 || tso6) && has(features, VIRTIO_NET_F_GUEST_ECN) {
        bits |= libc::TUN_F_TSO_ECN;
    }
    if has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6) {
        bits |= TUN_F_USO;
    }
    bits
}

fn setup<'a>(name: &'a str, action: &'static str) -> impl FnOnce(io::Error) -> TapError + 'a {
    move |source| TapError::Setup {
        name: name.to_string(),
        action,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_of_the_tap_follow_the_guest() {
        let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        let tso4 = 1 << VIRTIO_NET_F_GUEST_TSO4;
        let ecn = 1 << VIRTIO_NET_F_GUEST_ECN;
        let uso4 = 1 << VIRTIO_NET_F_GUEST_USO4;
        let uso6 = 1 << VIRTIO_NET_F_GUEST_USO6;
        assert_eq!(tun_offloads(0), 0);
        assert_eq!(tun_offloads(tso4), 0, "nothing without checksums");
        assert_eq!(tun_offloads(csum), 1);
        assert_eq!(tun_offloads(csum | tso4), 3);
        assert_eq!(tun_offloads(csum | ecn), 1, "ECN only with TSO");
        assert_eq!(tun_offloads(csum | tso4 | ecn), 0xb);
        assert_eq!(
            tun_offloads(csum | uso4),
            1,
            "the kernel takes USO4 and USO6 together"
        );
        assert_eq!(tun_offloads(csum | uso4 | uso6), 0x61);
    }
}
