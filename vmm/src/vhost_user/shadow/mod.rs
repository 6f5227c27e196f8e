//! Shadow virtqueues: how a backend serves a guest none of whose memory it has.
//!
//! ```text
//!  guest ── ring, buffers ──▶ shNN-ID thread ── copies ──▶ ring, buffers in the bounce memory ──▶ backend
//!           private memory    (one a queue)                a memfd, all that the backend maps
//! ```
//!
//! Elsewhere data never enters the VMM: this is the exception, for guests whose memory no other process may have
//! (`shared=off`) or that do not keep to the DMA window ([`super::window`]): Windows, BSD, `iommu=usedac`, a device that
//! is added while the guest runs. docs/adr/0005-shadow-virtqueues.md says why the VMM copies.
//!
//! To the session ([`super::session`]) the rings in the bounce memory are those of the device, and this side of them is
//! its guest: starting, stopping, the death of a backend and what it had in flight are no different from any other.
//!
//! | file | what |
//! |---|---|
//! | `arena` | which pages of the bounce memory are whose |
//! | `ring` | the guest's ring as its device, the backend's as its driver |
//! | `chain` | a request of the guest's, checked, and how its buffers are laid out |
//! | `queue` | forward and back, and what is in flight |
//! | `worker` | the thread and its events |
//!
//! Threads: a worker for each queue, started by the vCPU that sets DRIVER_OK and ended by a reset, by the end of the
//! device, or by a ring that makes no sense, which asks for a reset. Only a worker touches its queue. A pause of the
//! guest does not stop it, no more than it stops a backend.
//!
//! Invariants: [`queue`]'s; and the bounce memory is given to another driver only when worker and backend have let go.
//!
//! virtio 1.3, 2.7 (split virtqueues).
#![forbid(unsafe_code)]

mod arena;
mod chain;
mod fake;
mod fuzz;
mod queue;
mod ring;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::arena::Arena;
pub(crate) use self::fuzz::guest_ring;
use self::queue::Queue;
use self::ring::{BackendRing, GuestRing, Layout};
use self::worker::{Controls, Events, Worker};
use super::shared::{Ring, Shared};
use crate::config::affinity::HostCpus;
use crate::cpu::affinity;
use crate::devices::virtio::device::{Activation, QueueSetup};
use crate::memory;
use crate::sandbox::{self, ThreadKind};
use crate::telemetry::LogLimit;

const PAGE: u64 = 4096;
/// What `st_blocks` counts.
const BLOCK: u64 = 512;
/// The most that the buffers of a queue take. All of it is address space, and memory only where it was ever used.
const MOST: u64 = 64 << 20;
/// The most that a disk's queue uses of it at a time: as much as keeps a disk busy. All its requests come back by
/// themselves, so one that is larger waits until it is alone.
const DISK: u64 = 16 << 20;
/// The same for devices whose requests are small: frames of 64 KiB, or a mebibyte of a file.
const LESS: u64 = 16 << 20;
/// Longest name that a thread may have.
const THREAD_NAME: usize = 15;

/// A driver can break its ring as often as it likes.
static FAULTS: LogLimit = LogLimit::new(Duration::from_secs(10));

/// What is wrong with a ring. The queue is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("no memory at {0:#x}, where a ring or a table is")]
    Memory(u64),
    #[error("the driver is at index {index}, which a ring of {size} cannot hold")]
    AvailIndex { index: u16, size: u16 },
    #[error("descriptor {head} of a ring of {size}")]
    Head { head: u16, size: u16 },
    #[error("the chain at descriptor {head} does not end")]
    Loop { head: u16 },
    #[error("a table of {len} bytes that is odd or nested")]
    Table { len: u32 },
    #[error("the chain at descriptor {head} has a buffer to read behind one to write")]
    Order { head: u16 },
    #[error("descriptor {index} belongs to a request that the device still has")]
    InUse { index: u16 },
    #[error("a buffer of {len} bytes at {gpa:#x} is outside memory")]
    Outside { gpa: u64, len: u32 },
    #[error("a request of {bytes} bytes, and there is room for {room}")]
    TooBig { bytes: u64, room: u64 },
    #[error("the backend is at index {index}, which a ring of {size} cannot hold")]
    UsedIndex { index: u16, size: u16 },
    #[error("the backend is done with request {id}, which it does not have")]
    NotInFlight { id: u32 },
}

/// What a device's queues have done, since it is there.
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: AtomicU64,
    /// Bytes copied out of guest memory, and into it.
    in_bytes: AtomicU64,
    out_bytes: AtomicU64,
    /// How often a request had to wait for room.
    stalls: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }

    fn named(&self) -> [(&'static str, u64); 4] {
        [
            ("shadow_requests", &self.requests),
            ("shadow_copied_in_bytes", &self.in_bytes),
            ("shadow_copied_out_bytes", &self.out_bytes),
            ("shadow_stalls", &self.stalls),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}

/// The memory that a backend has of a device with shadow queues: one region from address 0, a ring and an arena for
/// each queue.
#[derive(Debug)]
pub(super) struct Bounce {
    memory: GuestMemoryMmap,
    parts: Vec<Part>,
    has_status: bool,
    /// Where workers run: not where the vCPU that starts them is kept to.
    cpus: Option<HostCpus>,
    counters: Arc<Counters>,
}

/// A queue's part of it.
#[derive(Debug, Clone, Copy)]
struct Part {
    ring: Layout,
    start: u64,
    len: u64,
}

impl Bounce {
    /// For queues of up to these sizes. Makes a file, so not on a vCPU's thread.
    pub(super) fn new(device_type: u32, sizes: &[u16]) -> Result<Self, memory::Error> {
        let len = arena_bytes(device_type);
        let mut end = 0;
        let mut place = |bytes: u64| {
            let start = end;
            end += bytes.next_multiple_of(PAGE);
            start
        };
        let parts = sizes.iter().map(|&size| {
            let entries = u64::from(size);
            Part {
                ring: Layout {
                    size,
                    desc: place(16 * entries),
                    avail: place(6 + 2 * entries),
                    used: place(6 + 8 * entries),
                },
                start: place(len),
                len,
            }
        });
        let parts = parts.collect();
        Ok(Self {
            memory: memory::bounce(end.max(PAGE))?,
            parts,
            has_status: device_type == VIRTIO_ID_BLOCK,
            cpus: affinity::of_this_process().ok(),
            counters: Arc::default(),
        })
    }

    /// What its queues have done, and how much memory it takes now.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.counters.named().to_vec();
        let files = self.memory.iter().filter_map(GuestRegionMmap::file_offset);
        let blocks = files.filter_map(|file| Some(file.file().metadata().ok()?.blocks()));
        counters.push(("shadow_bounce_bytes", blocks.sum::<u64>() * BLOCK));
        counters
    }

    /// What a backend maps.
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

/// Bytes of a queue's arena: the largest request of its device fits.
fn arena_bytes(device_type: u32) -> u64 {
    match device_type {
        VIRTIO_ID_NET | VIRTIO_ID_FS => LESS,
        _ => MOST,
    }
}

/// Largest buffer of a disk's requests with up to `seg_max` of them, so that any fits half of an arena.
pub(super) fn size_max(seg_max: u32) -> u32 {
    let most = MOST / 2 / u64::from(seg_max.max(1)) / PAGE * PAGE;
    most.max(PAGE) as u32
}

/// The workers of a device, between a driver's DRIVER_OK and its reset. Dropped, they end soon.
pub(super) struct Workers {
    controls: Vec<Arc<Controls>>,
    threads: Vec<JoinHandle<()>>,
}

/// A queue whose two sides are made, before its thread is.
struct Prepared {
    worker: Worker,
    controls: Arc<Controls>,
    ring: Ring,
}

impl Workers {
    /// Starts a worker for each queue; returns them and the rings for the backend.
    pub(super) fn start(
        bounce: &Bounce,
        activation: Activation,
        shared: &Arc<Shared>,
    ) -> Result<(Self, Vec<Ring>), String> {
        let mut workers = Self {
            controls: Vec::new(),
            threads: Vec::new(),
        };
        let mut rings = Vec::new();
        let event_idx = activation.features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let memory = &activation.memory;
        for setup in activation.queues {
            let index = setup.index;
            let failed = |error: io::Error| format!("queue {index}: no shadow: {error}");
            let prepared = prepare(bounce, setup, memory, event_idx).map_err(failed)?;
            let (worker, shared) = (prepared.worker, Arc::clone(shared));
            let name = format!("sh{index}-{}", shared.id());
            let name: String = name.chars().take(THREAD_NAME).collect();
            let cpus = bounce.cpus;
            let run = move || {
                leave_vcpu(cpus.as_ref());
                if let Err(end) = worker.run() {
                    shared.broken(index, &end);
                }
            };
            let thread = sandbox::spawn(ThreadKind::Shadow, &name, run).map_err(failed)?;
            workers.threads.push(thread);
            workers.controls.push(prepared.controls);
            rings.push(prepared.ring);
        }
        Ok((workers, rings))
    }

    /// Has them end soon.
    pub(super) fn stop(&self) {
        for controls in &self.controls {
            controls.stop();
        }
    }

    /// Whether all have ended.
    pub(super) fn have_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Sends a queue's interrupts elsewhere.
    pub(super) fn set_call(&self, queue: u16, call: EventFd) {
        let mut all = self.controls.iter();
        if let Some(controls) = all.find(|controls| controls.index == queue) {
            controls.set_call(call);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Takes the calling thread off the CPUs of the vCPU that started it.
fn leave_vcpu(cpus: Option<&HostCpus>) {
    let here = affinity::of_this_process().ok();
    if let Some(cpus) = cpus
        && here.as_ref() != Some(cpus)
        && let Err(error) = affinity::keep_this_thread_to(cpus)
    {
        tracing::debug!(%error, "a shadow queue stays on the CPUs of a vCPU");
    }
}

fn prepare(
    bounce: &Bounce,
    setup: QueueSetup,
    memory: &GuestMemoryMmap,
    event_idx: bool,
) -> io::Result<Prepared> {
    let part = bounce.parts.get(usize::from(setup.index));
    let part = part.ok_or(io::ErrorKind::InvalidInput)?;
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    let (kick, call) = (event()?, event()?);
    let at = Layout {
        size: setup.size,
        ..part.ring
    };
    let guest_at = Layout {
        size: setup.size,
        desc: setup.desc,
        avail: setup.avail,
        used: setup.used,
    };
    let backend = BackendRing::new(bounce.memory.clone(), at, event_idx);
    let queue = Queue::new(
        GuestRing::new(memory.clone(), guest_at, event_idx),
        backend.map_err(io::Error::other)?,
        match bounce.has_status {
            true => Arena::new(part.start, part.len).sparing(DISK),
            false => Arena::new(part.start, part.len),
        },
        bounce.has_status,
        Arc::clone(&bounce.counters),
    );
    let controls = Arc::new(Controls::new(setup.index, setup.call)?);
    let events = Events {
        guest_kick: setup.kick,
        backend_kick: kick.try_clone()?,
        backend_call: call.try_clone()?,
    };
    let ring = Ring::new(QueueSetup {
        index: setup.index,
        size: at.size,
        desc: at.desc,
        avail: at.avail,
        used: at.used,
        kick,
        call,
    });
    Ok(Prepared {
        worker: Worker::new(queue, Arc::clone(&controls), events)?,
        controls,
        ring,
    })
}

impl Shared {
    /// A worker cannot go on: the driver is to start over.
    fn broken(&self, queue: u16, end: &worker::End) {
        if let Some(suppressed) = FAULTS.pass() {
            let device = self.id();
            tracing::warn!(
                device,
                queue,
                suppressed,
                reason = %end,
                "the shadow queue has stopped, the device needs a reset"
            );
        }
        if let Some(notify) = &self.state().notify {
            notify.needs_reset();
        }
    }
}
