//! What the control thread asks of a queue's worker thread, and the handle it asks through.
//!
//! Commands travel on a channel; a flag stops the worker's polling, an eventfd wakes it from sleep. Where the answer
//! matters (a stopped ring, memory no longer in use) the control thread waits for it, which may
//! take as long as the I/O in flight. A worker that hangs in a write to an fd of the frontend (a
//! call fd that is full and blocks) is interrupted out of it.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Device, QueueStart};
use crate::guest_memory::GuestMemory;
use crate::inflight::InflightRegion;
use crate::log::QueueLog;
use crate::notify::{Notifiers, VringFd};
use crate::sandbox::{self, ThreadKind};
use crate::sys;
use crate::virtqueue::RingLayout;
use crate::worker::QueueThread;

/// Everything a worker needs to run a ring.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) queue: QueueStart,
    pub(crate) layout: RingLayout,
    pub(crate) base: u16,
    pub(crate) memory: Arc<GuestMemory>,
    /// Where the requests in flight are noted, if the frontend gave us a region.
    pub(crate) inflight: Option<Arc<InflightRegion>>,
    pub(crate) notifiers: Notifiers,
    pub(crate) log: Option<QueueLog>,
    pub(crate) enabled: bool,
}

/// What a worker thread is made of, besides its device.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) commands: Receiver<Command>,
    /// Set after a command was sent.
    pub(crate) waiting: Arc<AtomicBool>,
    /// Written after a command was sent.
    pub(crate) wake: EventFd,
}

/// From the control thread to a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// Run a ring; none is running.
    Start(Box<Start>),
    /// Finish what is in flight, forget the ring, answer the index of the next chain (none
    /// where the ring could not even be started).
    Stop(Sender<Option<u16>>),
    /// Take chains, or finish what is in flight and take none.
    SetEnabled(bool, Sender<()>),
    /// Work in this memory from now on. `removed`: regions are gone, so finish what is in flight.
    UpdateMemory {
        memory: Arc<GuestMemory>,
        removed: bool,
        done: Sender<()>,
    },
    /// Log writes so from now on; answered when nothing is logged as before any more.
    SetLog(Option<Box<QueueLog>>, Sender<()>),
    SetKick(VringFd),
    SetCall(Option<VringFd>),
    SetErr(Option<VringFd>),
    /// End the thread.
    Exit,
}

/// The control thread's end of one worker thread. Dropping it ends the thread, and waits.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    commands: Sender<Command>,
    waiting: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

/// How long an answer is waited for before the worker is interrupted, and how often again.
const PATIENCE: Duration = Duration::from_millis(200);

impl WorkerHandle {
    /// Starts the thread `NAME-qN`; it waits for commands.
    pub(crate) fn spawn<D: Device>(
        device: &Arc<D>,
        queue: u16,
        poll_limit: Duration,
    ) -> io::Result<WorkerHandle> {
        let (commands, receiver) = channel();
        let (alive, ended) = channel();
        sys::prepare_interrupts()?;
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let waiting = Arc::new(AtomicBool::new(false));
        let device = Arc::clone(device);
        let inbox = Inbox {
            commands: receiver,
            waiting: Arc::clone(&waiting),
            wake: wake.try_clone()?,
        };
        let thread = std::thread::Builder::new()
            .name(format!("{}-q{queue}", D::NAME))
            .spawn(move || {
                match sandbox::enter_thread(ThreadKind::Worker) {
                    Ok(()) => QueueThread::new(device, inbox, poll_limit).run(),
                    Err(error) => {
                        error!(%error, queue, "no sandbox for this thread: the queue does not run");
                    }
                }
                drop(alive);
            })?;
        Ok(WorkerHandle {
            commands,
            waiting,
            wake,
            thread: Some(thread),
            ended,
        })
    }

    /// Sends a command and wakes the thread.
    pub(crate) fn send(&self, command: Command) {
        // The thread ends only on Exit, which only drop sends; a full wake counter is a wake too.
        let _ = self.commands.send(command);
        // Release: the command is in the channel before the worker looks there.
        self.waiting.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// Waits for an answer. None where the worker has nothing that the command was about.
    pub(crate) fn wait<T>(&self, answer: &Receiver<T>) -> Option<T> {
        loop {
            match answer.recv_timeout(PATIENCE) {
                Ok(value) => return Some(value),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(thread) = &self.thread {
                        sys::interrupt(thread);
                    }
                }
            }
        }
    }

    /// Sends the command that `make` builds around a reply channel; the caller waits.
    pub(crate) fn ask<T>(&self, make: impl FnOnce(Sender<T>) -> Command) -> Receiver<T> {
        let (reply, receiver) = channel();
        self.send(make(reply));
        receiver
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.send(Command::Exit);
        self.wait(&self.ended);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed by the panic hook.
            let _ = thread.join();
        }
    }
}
