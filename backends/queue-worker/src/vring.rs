//! The control thread's view of one vring: what the frontend has set, and the worker that runs it.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::command::{Command, Start, WorkerHandle};
use crate::device::{Device, QueueStart};
use crate::features;
use crate::guest_memory::GuestMemory;
use crate::inflight::InflightRegion;
use crate::log::SessionLog;
use crate::metrics::QueueCounters;
use crate::notify::{Notifiers, VringFd};
use crate::protocol::message::VringAddr;
use crate::session::Refusal;
use crate::virtqueue::RingLayout;

/// What all rings of a session have in common, as it is now.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) inflight: Option<Arc<InflightRegion>>,
    pub(crate) log: SessionLog,
    /// Features that the driver accepted.
    pub(crate) features: u64,
}

/// One vring. The worker thread is started with the first ring and ends with the session.
#[derive(Debug)]
pub(crate) struct Vring {
    index: u16,
    size: u16,
    addr: Option<VringAddr>,
    /// Guest address of the used ring, where writes to it are logged.
    log_used: Option<u64>,
    base: u16,
    kick: Option<VringFd>,
    call: Option<VringFd>,
    err: Option<VringFd>,
    /// What SET_VRING_ENABLE said last, if it came.
    enabled: Option<bool>,
    running: bool,
    worker: Option<WorkerHandle>,
    poll_limit: Duration,
    counters: Arc<QueueCounters>,
    /// Written by the worker when the frontend took guest memory away.
    memory_lost: Arc<EventFd>,
}

impl Vring {
    pub(crate) fn new(
        index: u16,
        counters: Arc<QueueCounters>,
        memory_lost: Arc<EventFd>,
        poll_limit: Duration,
    ) -> Vring {
        Vring {
            index,
            size: 0,
            addr: None,
            log_used: None,
            base: 0,
            kick: None,
            call: None,
            err: None,
            enabled: None,
            running: false,
            worker: None,
            poll_limit,
            counters,
            memory_lost,
        }
    }

    fn runner(&self) -> Option<&WorkerHandle> {
        self.worker.as_ref().filter(|_| self.running)
    }

    pub(crate) fn set_num(&mut self, num: u32, max: u16) -> Result<(), Refusal> {
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= max => {
                if size != self.size {
                    self.pause();
                }
                self.size = size;
                Ok(())
            }
            _ => Err(Refusal::BadRingSize { num, max }),
        }
    }

    /// Frontends repeat the addresses of a live ring when dirty logging begins: only `log_used`
    /// is new then, and the ring goes on.
    pub(crate) fn set_addr(&mut self, addr: VringAddr, log_used: Option<u64>, log: &SessionLog) {
        if self.addr != Some(addr) {
            self.pause();
            self.addr = Some(addr);
        }
        if self.log_used != log_used {
            self.log_used = log_used;
            if let Some(done) = self.update_log(log) {
                self.wait_for(&done);
            }
        }
    }

    /// Has a running ring log as `log` says; to be waited for with [`wait_for`](Vring::wait_for).
    pub(crate) fn update_log(&self, log: &SessionLog) -> Option<Receiver<()>> {
        let log = log.of_queue(self.log_used).map(Box::new);
        self.runner()
            .map(|worker| worker.ask(|done| Command::SetLog(log, done)))
    }

    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), Refusal> {
        if self.running {
            return Err(Refusal::Running(u32::from(self.index)));
        }
        self.base = u16::try_from(base).map_err(|_| Refusal::BadBase(base))?;
        Ok(())
    }

    pub(crate) fn set_kick(&mut self, kick: Option<VringFd>) -> Result<(), Refusal> {
        let kick = kick.ok_or(Refusal::NoKick(u32::from(self.index)))?;
        self.kick = Some(Arc::clone(&kick));
        if let Some(worker) = self.runner() {
            worker.send(Command::SetKick(kick));
        }
        Ok(())
    }

    pub(crate) fn set_call(&mut self, call: Option<VringFd>) {
        self.call.clone_from(&call);
        if let Some(worker) = self.runner() {
            worker.send(Command::SetCall(call));
        }
    }

    pub(crate) fn set_err(&mut self, err: Option<VringFd>) {
        self.err.clone_from(&err);
        if let Some(worker) = self.runner() {
            worker.send(Command::SetErr(err));
        }
    }

    /// Returns when a disabled ring has nothing in flight any more.
    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = Some(enabled);
        if let Some(worker) = self.runner() {
            let _ = worker.ask(|done| Command::SetEnabled(enabled, done)).recv();
        }
    }

    /// Back to what the ring was at the start of the session.
    pub(crate) fn reset_enabled(&mut self) {
        self.enabled = None;
    }

    /// RESET_DEVICE: the ring is set up anew; it begins disabled whatever was negotiated.
    pub(crate) fn reset(&mut self) {
        self.size = 0;
        self.addr = None;
        self.log_used = None;
        self.base = 0;
        self.enabled = Some(false);
    }

    /// Stops the worker and keeps the base, so that the ring can go on from there.
    fn pause(&mut self) {
        if let Some(worker) = self.runner() {
            let stopped = worker.ask(Command::Stop);
            if let Some(base) = worker.wait(&stopped).flatten() {
                self.base = base;
            }
        }
        self.running = false;
    }

    /// GET_VRING_BASE: stops the ring until a new kick fd comes; the next index to take.
    pub(crate) fn stop(&mut self) -> u16 {
        self.pause();
        self.kick = None;
        self.base
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    /// Starts the ring if it has all it needs, is enabled, and does not run.
    pub(crate) fn start_if_ready<D: Device>(
        &mut self,
        device: &Arc<D>,
        surroundings: &Surroundings,
    ) -> Result<(), Refusal> {
        let Surroundings {
            memory,
            inflight,
            log,
            features,
        } = surroundings;
        let by_default = features & 1 << features::PROTOCOL_FEATURES == 0;
        let enabled = self.enabled.unwrap_or(by_default);
        let (Some(addr), Some(kick)) = (self.addr, &self.kick) else {
            return Ok(());
        };
        // Without the memory that the ring lies in, wait for it.
        let parts = [addr.desc, addr.avail, addr.used];
        let here = parts.iter().all(|uva| memory.slice_uva(*uva, 1).is_ok());
        if self.running || !enabled || self.size == 0 || !here {
            return Ok(());
        }
        let start = Start {
            queue: QueueStart {
                queue: self.index,
                size: self.size,
                features: *features,
                counters: Arc::clone(&self.counters),
            },
            layout: RingLayout {
                size: self.size,
                desc_uva: addr.desc,
                avail_uva: addr.avail,
                used_uva: addr.used,
            },
            base: self.base,
            memory: Arc::clone(memory),
            inflight: inflight.clone(),
            notifiers: Notifiers {
                kick: Arc::clone(kick),
                call: self.call.clone(),
                err: self.err.clone(),
                memory_lost: Arc::clone(&self.memory_lost),
                counters: Arc::clone(&self.counters),
            },
            log: log.of_queue(self.log_used),
            enabled,
        };
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => WorkerHandle::spawn(device, self.index, self.poll_limit)?,
        };
        worker.send(Command::Start(Box::new(start)));
        self.worker = Some(worker);
        self.running = true;
        Ok(())
    }

    /// Hands a running ring new memory; to be waited for with [`wait_for`](Vring::wait_for).
    pub(crate) fn update_memory(
        &self,
        memory: &Arc<GuestMemory>,
        removed: bool,
    ) -> Option<Receiver<()>> {
        self.runner().map(|worker| {
            worker.ask(|done| Command::UpdateMemory {
                memory: Arc::clone(memory),
                removed,
                done,
            })
        })
    }

    /// Returns when the worker has done what it was asked for, and uses nothing of before.
    pub(crate) fn wait_for(&self, done: &Receiver<()>) {
        if let Some(worker) = self.runner() {
            worker.wait(done);
        }
    }
}
