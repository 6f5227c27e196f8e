//! The thread that fills buffers.
//!
//! Invariants: a buffer is taken, filled and given back before the next; what the guest put into the
//! ring is only ever read through virtio-queue, which checks it. A ring that makes no sense ends the
//! thread and asks for a reset.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueT, Writer};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::device::{QueueSetup, TransportNotify};
use crate::telemetry::LogLimit;

/// Most bytes given for one buffer: a guest that wants more asks again.
const MAX_FILL: usize = 64 << 10;
/// Bytes read from the source at a time.
const CHUNK: usize = 4096;

/// A driver can break its ring as often as it likes.
static FAILURES: LogLimit = LogLimit::new(Duration::from_secs(10));

/// What the transport's threads and the worker share.
pub(super) struct Shared {
    stop: EventFd,
    kick: EventFd,
    /// Where interrupts go; the driver may change it.
    call: Mutex<EventFd>,
}

/// Where the ring is.
pub(super) struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
}

impl Shared {
    pub(super) fn split(setup: QueueSetup, stop: EventFd) -> (Ring, Self) {
        let ring = Ring {
            size: setup.size,
            desc: setup.desc,
            avail: setup.avail,
            used: setup.used,
        };
        let shared = Self {
            stop,
            kick: setup.kick,
            call: Mutex::new(setup.call),
        };
        (ring, shared)
    }

    /// Asks the worker to end.
    pub(super) fn stop(&self) {
        // Full is as good as written.
        let _ = self.stop.write(1);
    }

    pub(super) fn set_call(&self, call: EventFd) {
        *self.call.lock().unwrap_or_else(PoisonError::into_inner) = call;
    }

    fn interrupt(&self) {
        let call = self.call.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = call.write(1);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Token {
    Stop = 0,
    Kick = 1,
    Source = 2,
}

/// How a pass over the ring ended.
#[derive(Debug, PartialEq, Eq)]
enum Pass {
    /// Nothing left to fill.
    Idle,
    /// The source has nothing now.
    Starved,
}

pub(super) struct Worker {
    name: String,
    queue: Queue,
    memory: GuestMemoryMmap,
    source: File,
    shared: Arc<Shared>,
    epoll: Epoll,
}

impl Worker {
    pub(super) fn new(
        name: &str,
        ring: &Ring,
        memory: GuestMemoryMmap,
        source: File,
        shared: Arc<Shared>,
    ) -> Result<Self, String> {
        let epoll = Epoll::new().map_err(|error| format!("cannot make an epoll: {error}"))?;
        for (event, token) in [(&shared.stop, Token::Stop), (&shared.kick, Token::Kick)] {
            let interest = EpollEvent::new(EventSet::IN, token as u64);
            epoll
                .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
                .map_err(|error| format!("cannot watch an eventfd: {error}"))?;
        }
        Ok(Self {
            name: name.to_owned(),
            queue: queue(ring).map_err(|error| error.to_string())?,
            memory,
            source,
            shared,
            epoll,
        })
    }

    pub(super) fn run(mut self, notify: &dyn TransportNotify) {
        if let Err(reason) = self.serve() {
            if let Some(suppressed) = FAILURES.pass() {
                let device = self.name.as_str();
                tracing::warn!(device, suppressed, reason, "the device needs a reset");
            }
            notify.needs_reset();
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        // The first kick may have come before anybody listened.
        self.pass()?;
        let mut events = [EpollEvent::default(); 3];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(format!("cannot wait for events: {error}")),
            };
            let tokens = events[..ready].iter().map(EpollEvent::data);
            if tokens.clone().any(|token| token == Token::Stop as u64) {
                return Ok(());
            }
            // Read or not, the ring is looked at.
            let _ = self.shared.kick.read();
            self.pass()?;
        }
    }

    /// Fills what there is to fill, and watches the source if it ran dry.
    fn pass(&mut self) -> Result<(), String> {
        if self.process()? == Pass::Starved {
            let interest = EventSet::IN | EventSet::ONE_SHOT;
            let interest = EpollEvent::new(interest, Token::Source as u64);
            let fd = self.source.as_raw_fd();
            self.epoll
                .ctl(ControlOperation::Modify, fd, interest)
                .or_else(|_| self.epoll.ctl(ControlOperation::Add, fd, interest))
                .map_err(|error| format!("cannot wait for the source: {error}"))?;
        }
        Ok(())
    }

    fn process(&mut self) -> Result<Pass, String> {
        let ring = |error: virtio_queue::Error| format!("queue 0: {error}");
        let mut filled_any = false;
        let mut pass = Pass::Idle;
        let end = self
            .queue
            .avail_idx(&self.memory, Ordering::Acquire)
            .map_err(ring)?;
        // Chains that come later have a kick of their own: suppression is not offered.
        for _ in 0..(end - Wrapping(self.queue.next_avail())).0 {
            let Some(chain) = self.queue.iter(&self.memory).map_err(ring)?.next() else {
                return Err("queue 0: cannot read the avail ring".to_owned());
            };
            let head = chain.head_index();
            let mut writer = chain.writer(&self.memory).map_err(ring)?;
            let Some(len) = fill(&mut self.source, &mut writer)? else {
                self.queue.go_to_previous_position();
                pass = Pass::Starved;
                break;
            };
            self.queue.add_used(&self.memory, head, len).map_err(ring)?;
            filled_any = true;
        }
        if filled_any && self.queue.needs_notification(&self.memory).map_err(ring)? {
            self.shared.interrupt();
        }
        Ok(pass)
    }
}

fn queue(ring: &Ring) -> Result<Queue, virtio_queue::Error> {
    let mut queue = Queue::new(ring.size)?;
    queue.try_set_size(ring.size)?;
    queue.try_set_desc_table_address(GuestAddress(ring.desc))?;
    queue.try_set_avail_ring_address(GuestAddress(ring.avail))?;
    queue.try_set_used_ring_address(GuestAddress(ring.used))?;
    queue.set_ready(true);
    Ok(queue)
}

/// Fills a buffer; `None` if the source has nothing now and nothing was written.
fn fill<B: BitmapSlice>(
    source: &mut impl Read,
    buffer: &mut Writer<'_, B>,
) -> Result<Option<u32>, String> {
    let mut chunk = [0; CHUNK];
    let mut total = 0;
    loop {
        let want = buffer.available_bytes().min(MAX_FILL - total).min(CHUNK);
        if want == 0 {
            return Ok(Some(total as u32));
        }
        match source.read(&mut chunk[..want]) {
            Ok(0) => return Err("the source of entropy has ended".to_owned()),
            Ok(len) => {
                buffer
                    .write_all(&chunk[..len])
                    .map_err(|error| format!("cannot write to the guest's buffer: {error}"))?;
                total += len;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && total == 0 => return Ok(None),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(total as u32)),
            Err(error) => return Err(format!("cannot read the source of entropy: {error}")),
        }
    }
}
