//! The thread of one queue: owns its ring, its device worker and its event fds.
//!
//! ```text
//!            ┌──────────────── commands (channel + wake eventfd) ◀── control thread
//!            ▼
//!   ┌─▶ handle commands ─▶ process ─▶ publish used ─▶ signal once ─▶ look for more, for a while
//!   │                         ▲                                          │ found   │ nothing
//!   │                         ├──────────────────────────────────────────┘         ▼
//!   │                         └─────────────────── not empty ────── enable notification
//!   │                                                                              │ empty
//!   └────────────────────────────────────────── poll(wake, kick, the worker's sources)
//!
//!   idle ──Start──▶ running ⇄ disabled      running ──QueueError──▶ broken ──Stop──▶ idle
//! ```
//!
//! Invariants: nothing here takes a lock; a ring is processed only while running; after a Stop,
//! a disable or a removal of memory has been answered, no guest memory of before is in use.
//! Spec: vhost-user, "Ring states".
#![forbid(unsafe_code)]

use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::command::{Command, Inbox, Start};
use crate::device::{Device, Interest, Poll, QueueError, QueueWorker, Ready, Source};
use crate::guest_memory::GuestMemory;
use crate::notify::{LogLimit, Notifiers};
use crate::polling::Window;
use crate::sigbus;
use crate::sys;
use crate::virtqueue::{Ring, RingError};

/// Queues that broke, over all queues and sessions: a guest can cause this line at will.
static BROKEN_QUEUES: LogLimit = LogLimit::new(Duration::from_secs(10));

/// The state of a worker thread.
pub(crate) struct QueueThread<D: Device> {
    device: Arc<D>,
    inbox: Inbox,
    poll_limit: Duration,
    running: Option<Running<D::Worker>>,
    slots: Vec<libc::pollfd>,
}

/// A ring that was started.
struct Running<W> {
    name: &'static str,
    queue: u16,
    ring: Ring,
    /// None where the device could not make one: broken from the start.
    worker: Option<W>,
    sources: Vec<Source>,
    notifiers: Notifiers,
    enabled: bool,
    /// The worker empties the ring while it is disabled.
    discards: bool,
    broken: bool,
    /// Call `process` before the next sleep.
    pending: Option<Ready>,
    interest: Interest,
    window: Window,
    /// When there was nothing left to do; none while busy, and where nobody wants to know.
    idle_since: Option<Instant>,
    /// Losses of guest memory in this process when ours was looked at last.
    losses: u64,
}

/// Slots of the poll array before the worker's sources.
const WAKE: usize = 0;
const KICK: usize = 1;
const FIRST_SOURCE: usize = 2;

/// Looks for work between two looks at the clock, which costs as much as several of them.
const LOOKS_PER_CLOCK: u32 = 8;

impl<D: Device> QueueThread<D> {
    pub(crate) fn new(device: Arc<D>, inbox: Inbox, poll_limit: Duration) -> Self {
        QueueThread {
            device,
            inbox,
            poll_limit,
            running: None,
            slots: Vec::new(),
        }
    }

    /// Runs until told to exit.
    pub(crate) fn run(mut self) {
        loop {
            // Acquire: pairs with the store after a command was sent.
            if self.inbox.waiting.load(Ordering::Acquire) && !self.handle_all() {
                self.stop();
                return;
            }
            if let Some(running) = &mut self.running {
                if let Some(ready) = running.take_pending() {
                    running.process(ready);
                }
                if running.rest(&self.inbox.waiting) {
                    continue;
                }
            }
            self.sleep();
        }
    }

    /// Handles all commands that have come; false where one was to exit.
    fn handle_all(&mut self) -> bool {
        self.inbox.waiting.store(false, Ordering::Relaxed);
        // Later than the store: a command that comes now sets the flag again.
        fence(Ordering::SeqCst);
        while let Ok(command) = self.inbox.commands.try_recv() {
            if matches!(command, Command::Exit) {
                return false;
            }
            self.handle(command);
        }
        true
    }

    fn handle(&mut self, command: Command) {
        match (command, &mut self.running) {
            (Command::Start(start), _) => {
                self.stop();
                self.running = self.start(*start);
            }
            (Command::Stop(reply), _) => {
                let base = self.stop();
                let _ = reply.send(base);
            }
            (Command::SetEnabled(enabled, done), Some(running)) => {
                running.set_enabled(enabled);
                let _ = done.send(());
            }
            (
                Command::UpdateMemory {
                    memory,
                    removed,
                    done,
                },
                Some(running),
            ) => {
                running.update_memory(&memory, removed);
                // The old regions must be unmapped before the frontend is told that they are.
                drop(memory);
                let _ = done.send(());
            }
            (Command::SetLog(log, done), Some(running)) => {
                running.ring.set_log(log.map(|log| *log));
                let _ = done.send(());
            }
            (Command::SetKick(kick), Some(running)) => {
                running.notifiers.kick = kick;
                running.pending = Some(Ready::default());
            }
            (Command::SetCall(call), Some(running)) => {
                running.notifiers.call = call;
                // What went to the fd of before may have been thrown away: frontends place the
                // real one after the ring was started.
                running.ring.owe_signal();
                running.pending.get_or_insert_default();
            }
            (Command::SetErr(err), Some(running)) => running.notifiers.err = err,
            // Without a ring there is nothing to change; dropping a reply channel answers it.
            (_, None) | (Command::Exit, _) => {}
        }
    }

    fn start(&self, start: Start) -> Option<Running<D::Worker>> {
        let queue = start.queue.queue;
        let memory = Rc::new(GuestMemory::clone(&start.memory));
        let features = start.queue.features;
        let losses = sigbus::losses();
        let ring = Ring::new(start.layout, start.base, features, memory);
        let ring = ring.and_then(|ring| match start.inflight {
            Some(region) => ring.tracked(region, queue),
            None => Ok(ring),
        });
        let ring = match ring {
            Ok(mut ring) => {
                ring.set_log(start.log);
                ring.measure_latency(Arc::clone(&start.queue.counters));
                ring
            }
            Err(error) => {
                report_broken(D::NAME, queue, &error.into());
                start.notifiers.raise_err();
                if start.memory.is_lost() {
                    let _ = start.notifiers.memory_lost.write(1);
                }
                return None;
            }
        };
        let mut running = Running {
            name: D::NAME,
            queue,
            ring,
            worker: None,
            sources: Vec::new(),
            notifiers: start.notifiers,
            enabled: start.enabled,
            discards: false,
            broken: false,
            pending: Some(Ready::default()),
            interest: Interest::KICK,
            window: Window::new(self.poll_limit),
            idle_since: None,
            losses,
        };
        match self.device.new_worker(&start.queue) {
            Ok(worker) => {
                running.discards = worker.discards();
                running.sources = worker.sources();
                running.sources.truncate(31);
                running.worker = Some(worker);
                debug!(
                    queue,
                    base = start.base,
                    used = running.ring.next_used(),
                    size = start.layout.size,
                    "ring started"
                );
            }
            Err(source) => running.fail(&QueueError::Device {
                what: "starting the queue",
                source,
            }),
        }
        Some(running)
    }

    /// Stops the ring, if one runs; the index of the next chain to take.
    fn stop(&mut self) -> Option<u16> {
        let mut running = self.running.take()?;
        running.finish_resubmitted();
        running.drain();
        let _ = running.notifiers.take_kicks();
        debug!(
            queue = running.queue,
            base = running.ring.next_avail(),
            used = running.ring.next_used(),
            "ring stopped"
        );
        Some(running.ring.next_avail())
    }

    fn sleep(&mut self) {
        self.slots.clear();
        self.slots
            .push(sys::poll_slot(self.inbox.wake.as_raw_fd(), libc::POLLIN));
        let active = self.running.as_ref().filter(|r| r.is_active());
        if let Some(running) = active {
            running.add_slots(&mut self.slots);
            running.notifiers.counters.sleeps.add(1);
        }
        if let Err(error) = sys::poll(&mut self.slots, -1) {
            // Only a bad argument or no memory: nothing a retry at full speed would mend.
            warn!(%error, "poll failed");
            std::thread::sleep(Duration::from_millis(100));
            return;
        }
        if self.slots[WAKE].revents != 0 {
            let _ = self.inbox.wake.read();
        }
        if self.slots.len() > KICK
            && let Some(running) = &mut self.running
        {
            running.note_events(&self.slots);
        }
    }
}

impl<W: QueueWorker> Running<W> {
    fn is_active(&self) -> bool {
        (self.enabled || self.discards) && !self.broken
    }

    fn take_pending(&mut self) -> Option<Ready> {
        if self.is_active() {
            self.pending.take()
        } else {
            None
        }
    }

    fn add_slots(&self, slots: &mut Vec<libc::pollfd>) {
        let kick = if self.interest.kick {
            self.notifiers.kick_fd()
        } else {
            -1
        };
        slots.push(sys::poll_slot(kick, libc::POLLIN));
        for (n, source) in self.sources.iter().enumerate() {
            let wanted = self.interest.sources & (1 << n) != 0;
            let fd = if wanted { source.fd } else { -1 };
            slots.push(sys::poll_slot(fd, source.events));
        }
    }

    /// Turns what poll found into a pending `process`.
    fn note_events(&mut self, slots: &[libc::pollfd]) {
        let mut ready = Ready::default();
        let kick = slots[KICK].revents;
        if kick & libc::POLLIN != 0 {
            match self.notifiers.take_kicks() {
                Ok(kicked) => ready.kicked = kicked,
                Err(source) => self.fail(&kick_error(source)),
            }
        } else if kick != 0 {
            self.fail(&kick_error(std::io::ErrorKind::BrokenPipe.into()));
        }
        for (n, slot) in slots[FIRST_SOURCE..].iter().enumerate() {
            if slot.revents != 0 {
                ready.sources |= 1 << n;
            }
        }
        if ready != Ready::default() {
            self.pending = Some(ready);
            if let Some(since) = self.idle_since.take() {
                self.window.learn(since.elapsed());
            }
        }
    }

    fn process(&mut self, ready: Ready) {
        self.idle_since = None;
        let result = self.try_process(ready);
        // Lost memory reads as zeros, which looks like nonsense of the driver: name the cause.
        if let Err(error) = self.check_memory().and(result) {
            self.fail(&error);
        }
    }

    fn try_process(&mut self, ready: Ready) -> Result<(), QueueError> {
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        self.ring.begin_batch();
        self.ring.disable_notification()?;
        self.interest = if self.enabled {
            worker.process(&mut self.ring, ready)?
        } else {
            worker.discard(&mut self.ring)?
        };
        self.finish_batch()
    }

    /// Nothing is pending: looks for work, for a while. True where the thread must not sleep.
    fn rest(&mut self, interrupted: &AtomicBool) -> bool {
        if self.pending.is_some() && self.is_active() {
            return true;
        }
        if !self.is_active() {
            return interrupted.load(Ordering::Relaxed);
        }
        match self.try_rest(interrupted) {
            Ok(stay) => stay,
            Err(error) => {
                let lost = self.check_memory().err();
                self.fail(&lost.unwrap_or(error.into()));
                false
            }
        }
    }

    fn try_rest(&mut self, interrupted: &AtomicBool) -> Result<bool, RingError> {
        if self.look()? {
            return Ok(true);
        }
        if self.window.is_adaptive() {
            let begin = *self.idle_since.get_or_insert_with(Instant::now);
            let window = self.window.get();
            let mut waited = begin.elapsed();
            while waited < window && self.may_poll() {
                for _ in 0..LOOKS_PER_CLOCK {
                    if self.look()? {
                        self.notifiers.counters.polls.add(1);
                        return Ok(true);
                    }
                    if interrupted.load(Ordering::Relaxed) {
                        return Ok(true);
                    }
                    std::hint::spin_loop();
                }
                waited = begin.elapsed();
            }
        }
        let kicked = self.interest.kick && self.ring.enable_notification()?;
        let polled =
            self.interest.sources != 0 && self.worker.as_mut().is_some_and(QueueWorker::arm);
        Ok(self.found(kicked, polled))
    }

    /// Looks once, without a system call; what is found is pending.
    fn look(&mut self) -> Result<bool, RingError> {
        let kicked = self.interest.kick && self.ring.num_available()? != 0;
        let polled = self.interest.sources != 0
            && self.worker.as_mut().map(QueueWorker::poll) == Some(Poll::Ready);
        Ok(self.found(kicked, polled))
    }

    fn found(&mut self, kicked: bool, polled: bool) -> bool {
        if kicked || polled {
            self.pending = Some(Ready {
                kicked,
                polled,
                sources: 0,
            });
        }
        kicked || polled
    }

    /// Whether everything that is waited for can be seen without a system call.
    fn may_poll(&mut self) -> bool {
        self.interest.sources == 0
            || self
                .worker
                .as_mut()
                .is_some_and(|worker| worker.poll() != Poll::Unknown)
    }

    fn check_memory(&mut self) -> Result<(), QueueError> {
        let losses = sigbus::losses();
        if losses != self.losses {
            self.losses = losses;
            if self.ring.is_lost() {
                return Err(QueueError::MemoryLost);
            }
        }
        Ok(())
    }

    /// Publishes what was pushed, and signals the driver if it wants that.
    fn finish_batch(&mut self) -> Result<(), QueueError> {
        if self.ring.publish()? {
            self.notifiers.counters.batches.add(1);
        }
        if self.ring.needs_signal()? {
            let call = self.notifiers.call();
            call.map_err(|source| QueueError::Device {
                what: "writing the call fd",
                source,
            })?;
        }
        Ok(())
    }

    /// Has the device take what an earlier process left in flight, if it has not yet: a ring that
    /// is stopped has no such requests.
    fn finish_resubmitted(&mut self) {
        let mut left = self.ring.resubmits_left();
        while left > 0 && self.enabled && !self.broken {
            self.process(Ready::default());
            self.drain();
            let before = std::mem::replace(&mut left, self.ring.resubmits_left());
            if left == before {
                break;
            }
        }
    }

    /// Finishes everything in flight.
    fn drain(&mut self) {
        let Some(worker) = &mut self.worker else {
            return;
        };
        let drained = worker.drain(&mut self.ring);
        let result = drained.and_then(|()| self.finish_batch());
        if let (Err(error), false) = (result, self.broken) {
            self.report(&error);
        }
    }

    fn set_enabled(&mut self, enabled: bool) {
        if self.enabled && !enabled {
            self.drain();
        }
        self.enabled = enabled;
        self.pending = Some(Ready::default());
    }

    fn update_memory(&mut self, memory: &Arc<GuestMemory>, removed: bool) {
        if removed {
            self.drain();
        }
        let memory = Rc::new(GuestMemory::clone(memory));
        if let Err(error) = self.ring.set_memory(memory)
            && !self.broken
        {
            self.fail(&error.into());
        }
        self.pending = Some(Ready::default());
    }

    /// The queue cannot go on.
    fn fail(&mut self, error: &QueueError) {
        self.report(error);
        self.drain();
    }

    fn report(&mut self, error: &QueueError) {
        self.broken = true;
        if self.ring.is_lost() {
            let _ = self.notifiers.memory_lost.write(1);
        }
        report_broken(self.name, self.queue, error);
        self.notifiers.raise_err();
    }
}

fn kick_error(source: std::io::Error) -> QueueError {
    QueueError::Device {
        what: "reading the kick fd",
        source,
    }
}

fn report_broken(device: &str, queue: u16, error: &QueueError) {
    let Some(suppressed) = BROKEN_QUEUES.pass() else {
        return;
    };
    let mut causes = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        causes.push_str(&format!(": {error}"));
        cause = error.source();
    }
    warn!(
        device,
        queue, suppressed, "queue stopped until it is set up again: {error}{causes}"
    );
}
