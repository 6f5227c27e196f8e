//! The seam between this library and a device: what a device says about itself ([`Device`]) and
//! what it does with one queue ([`QueueWorker`]).
//!
//! ```text
//!   control thread                               worker thread "NAME-qN", one per started queue
//!   Device::features, config, hooks …            Device::new_worker ─▶ W
//!   Start ─────────────────────────────────────▶ W::sources
//!   (kick, source ready, enabled, new memory) ─▶ W::process(ring, ready) ─▶ Interest
//!   Stop, disable, memory taken away ──────────▶ W::drain(ring); on Stop W is dropped
//! ```
//!
//! The library reads kicks, publishes used entries and signals the driver once per `process` call,
//! suppresses notifications both ways, and in between looks for more for a short while
//! (`W::poll`) before it sleeps. No lock is taken on that path.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::control_socket::Command;
use crate::metrics::QueueCounters;
use crate::sandbox::Syscall;
use crate::session::SessionHandle;
use crate::virtqueue::{Ring, RingError};

/// Protocol features a device may add to those the library always offers.
pub mod protocol {
    /// VHOST_USER_PROTOCOL_F_RARP: [`Device::send_rarp`](super::Device::send_rarp) is called.
    pub const RARP: u64 = 1 << 2;
    /// VHOST_USER_PROTOCOL_F_NET_MTU: [`Device::set_mtu`](super::Device::set_mtu) is called.
    pub const NET_MTU: u64 = 1 << 4;
    /// Of our own, far from those that the specification counts: pages of guest memory stay pinned while no request
    /// uses them, so a frontend whose guest gives pages back must not go on. Others know no such bit.
    pub const PINS_MEMORY: u64 = 1 << 63;
}

/// A device type: what it offers, its configuration space, and its queue workers.
///
/// All methods but [`new_worker`](Device::new_worker) and those of the control socket are called on
/// the control thread, one at a time, and may block for as long as the frontend may wait for an answer. Arguments come from the
/// frontend and, through it, from the guest: lengths and offsets may be anything.
pub trait Device: Send + Sync + 'static {
    /// Short name: threads are called `NAME-qN`, log lines and metrics carry it.
    const NAME: &'static str;

    /// What handles one queue. `Box<dyn QueueWorker>` where queues differ.
    type Worker: QueueWorker;

    /// Feature bits of the device type. The library adds VERSION_1, RING_INDIRECT_DESC,
    /// RING_EVENT_IDX and VHOST_USER_F_PROTOCOL_FEATURES.
    fn features(&self) -> u64;

    /// Extra protocol features, see [`protocol`].
    fn protocol_features(&self) -> u64 {
        0
    }

    /// System calls that the workers make besides those of the library: the sandbox lets them
    /// pass. Asked once, before it is entered.
    fn syscalls(&self) -> Vec<Syscall> {
        Vec::new()
    }

    /// How many virtqueues there are.
    fn num_queues(&self) -> u16;

    /// The answer to GET_QUEUE_NUM; a network device counts queue pairs there.
    fn reported_queues(&self) -> u16 {
        self.num_queues()
    }

    /// Largest ring a frontend may set up; a power of two.
    fn max_queue_size(&self) -> u16 {
        1024
    }

    /// The configuration space as it is now. Reads past its end give zeros.
    fn config(&self) -> Vec<u8>;

    /// The driver writes `data` at `offset` of the configuration space. An error refuses it.
    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        let _ = (offset, data);
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// The driver accepted `features`, a subset of those offered. Comes again when it changes its
    /// mind; workers get the set that holds when their ring starts.
    fn features_acked(&self, features: u64) {
        let _ = features;
    }

    /// Metrics of the device's own, as Prometheus text: whole families, which come after those of
    /// the queues. **Called on the thread of the metrics socket.**
    fn metrics(&self) -> String {
        String::new()
    }

    /// Makes the handler of one queue, each time its ring starts. **Called on the worker thread**,
    /// before anything is taken from the ring. An error stops the queue.
    fn new_worker(&self, start: &QueueStart) -> io::Result<Self::Worker>;

    /// A frontend connected. `handle` lets the device tell it of a changed configuration space.
    fn session_started(&self, handle: SessionHandle) {
        let _ = handle;
    }

    /// The frontend has gone and every worker has been dropped: forget what the driver set.
    fn session_ended(&self) {}

    /// RESET_DEVICE: all rings are stopped; forget what the driver set.
    fn reset(&self) {}

    /// NET_SET_MTU: the MTU that the guest is told.
    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let _ = mtu;
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// SEND_RARP: announce `mac` on the network after a migration.
    fn send_rarp(&self, mac: [u8; 6]) -> io::Result<()> {
        let _ = mac;
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// SIGHUP calls [`reload`](Device::reload). Without, it ends the process, as is its default.
    const RELOADS: bool = false;

    /// Look again at what the device is made of.
    fn reload(&self) {}

    /// What the control socket takes beside `help` and `status`.
    fn commands(&self) -> &'static [Command] {
        &[]
    }

    /// Carries out a command of [`commands`](Device::commands); one line for the operator.
    /// **Called on the control socket's thread**, as is [`status`](Device::status).
    fn command(&self, name: &str) -> Result<String, String> {
        Err(format!("{name} is not carried out"))
    }

    /// What `status` says of the device itself: `key=value key=value`.
    fn status(&self) -> String {
        String::new()
    }
}

/// What a worker is told when its ring starts.
#[derive(Clone, Debug)]
pub struct QueueStart {
    /// Index of the virtqueue.
    pub queue: u16,
    /// Entries of its ring.
    pub size: u16,
    /// Features that the driver accepted.
    pub features: u64,
    /// This queue's counters; the worker adds requests and bytes.
    pub counters: Arc<QueueCounters>,
}

/// Handles one virtqueue between the start and the stop of its ring.
///
/// All methods are called on the queue's own thread. `process` must not block; `drain` may, for as
/// long as I/O in flight takes. Everything in the ring is the guest's: expect nonsense, and return
/// a [`QueueError`] only where the queue cannot go on (a request that is merely wrong is completed
/// with an error status).
pub trait QueueWorker {
    /// File descriptors to poll next to the kick, at most 31. Asked once, after creation; they
    /// stay open for the life of the worker.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Something may have happened: `ready` says what; nothing in it means the ring was just
    /// started, enabled, or given new memory. Take chains, start I/O, collect completions, push
    /// used entries; all that is possible without blocking. The library then publishes, signals
    /// the driver at most once, and sleeps until what the returned [`Interest`] names.
    fn process(&mut self, ring: &mut Ring, ready: Ready) -> Result<Interest, QueueError>;

    /// Whether chains of a disabled ring are to be taken and thrown away by
    /// [`discard`](QueueWorker::discard), as a network card must do with frames of its guest
    /// (vhost-user, "Ring states"). Asked once, after creation. Others wait in the ring.
    fn discards(&self) -> bool {
        false
    }

    /// What [`process`](QueueWorker::process) is while the ring is disabled, for a worker that
    /// [`discards`](QueueWorker::discards): without any effect but used entries.
    fn discard(&mut self, ring: &mut Ring) -> Result<Interest, QueueError> {
        let _ = ring;
        Ok(Interest::sources(0))
    }

    /// Whether `process` would find something other than new chains, such as completions. Called
    /// in a tight loop while the library looks for work before it sleeps: it must cost next to
    /// nothing, so no system call. Sources that it says nothing of (a timer) are noticed when the
    /// window has passed.
    fn poll(&mut self) -> Poll {
        Poll::Unknown
    }

    /// The thread goes to sleep: from here on its sources become ready when something happens.
    /// True where something has happened already, so that `process` is called instead.
    fn arm(&mut self) -> bool {
        false
    }

    /// Finish everything in flight: afterwards every chain that was popped has been pushed or put
    /// back, and no guest memory is in use. Called before stop, disable, and removal of memory.
    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        let _ = ring;
        Ok(())
    }
}

impl QueueWorker for Box<dyn QueueWorker> {
    fn sources(&self) -> Vec<Source> {
        (**self).sources()
    }
    fn process(&mut self, ring: &mut Ring, ready: Ready) -> Result<Interest, QueueError> {
        (**self).process(ring, ready)
    }
    fn poll(&mut self) -> Poll {
        (**self).poll()
    }
    fn arm(&mut self) -> bool {
        (**self).arm()
    }
    fn discards(&self) -> bool {
        (**self).discards()
    }
    fn discard(&mut self, ring: &mut Ring) -> Result<Interest, QueueError> {
        (**self).discard(ring)
    }
    fn drain(&mut self, ring: &mut Ring) -> Result<(), QueueError> {
        (**self).drain(ring)
    }
}

/// What [`QueueWorker::poll`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    /// Nothing to do.
    Nothing,
    /// `process` has something to do.
    Ready,
    /// Cannot tell without asking the kernel: where sources are waited for, the library goes to
    /// sleep on them at once.
    Unknown,
}

/// A file descriptor a worker wants polled, level-triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub(crate) fd: RawFd,
    pub(crate) events: i16,
}

impl Source {
    /// Ready when `fd` can be read.
    pub fn readable(fd: RawFd) -> Source {
        Source {
            fd,
            events: libc::POLLIN,
        }
    }

    /// Ready when `fd` can be written.
    pub fn writable(fd: RawFd) -> Source {
        Source {
            fd,
            events: libc::POLLOUT,
        }
    }
}

/// Why `process` was called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// The driver kicked, or the ring was found not empty after notifications were enabled.
    pub kicked: bool,
    /// Bit N: source N of [`QueueWorker::sources`] is ready (also on error or hang-up).
    pub sources: u32,
    /// [`QueueWorker::poll`] said so.
    pub polled: bool,
}

impl Ready {
    /// Whether source `n` is ready.
    pub fn source(&self, n: usize) -> bool {
        n < 32 && self.sources & (1 << n) != 0
    }
}

/// What should wake the worker next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// New available chains. If the ring is not empty then `process` is called again at once, so
    /// leave it out while chains are left in the ring on purpose (receive buffers that wait for a
    /// frame, requests that wait for room in the engine).
    pub kick: bool,
    /// Bit N: poll source N.
    pub sources: u32,
}

impl Interest {
    /// New chains only.
    pub const KICK: Interest = Interest {
        kick: true,
        sources: 0,
    };

    /// New chains and every source.
    pub const ALL: Interest = Interest {
        kick: true,
        sources: u32::MAX,
    };

    /// Sources of this mask only, no kick.
    pub const fn sources(mask: u32) -> Interest {
        Interest {
            kick: false,
            sources: mask,
        }
    }
}

/// Why a queue cannot go on. The library raises the vring's err fd, logs one line (rate limited),
/// and leaves the queue stopped until the frontend starts it again; other queues live on.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The driver wrote nonsense into the ring.
    #[error("the driver broke the ring")]
    Ring(#[from] RingError),
    /// A request that cannot even be answered with an error: no room for a status, no header.
    #[error("the driver sent a malformed request: {0}")]
    Request(&'static str),
    /// The frontend truncated the file behind guest memory. Ends the session, too.
    #[error("the frontend took guest memory away")]
    MemoryLost,
    /// The device's own resource failed (tap gone, io_uring refused).
    #[error("{what} failed")]
    Device {
        /// What failed, in the operator's words.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}
