//! The thread of one vCPU, and the set of all of them.
//!
//! A kick cannot be lost: the controller closes the gate, then writes `immediate_exit`, then sends the
//! signal. The thread clears `immediate_exit`, then looks at the gate, then enters KVM_RUN. Cleared
//! before it was written, it is still set when KVM_RUN looks (which returns at once); cleared after, the
//! gate was closed before the thread looked at it. The signal is for a thread that is in the guest
//! already. Returning from a closed gate only at EINTR also lets KVM finish the access of the last exit.
#![expect(
    unsafe_code,
    reason = "immediate_exit is written by two threads, and signals go to threads"
)]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::affinity;
use super::counters::{ExitCounters, Reason};
use super::exits::{Buses, Next, run_once};
use super::gate::{Gate, Pass};
use super::perf::DoorbellCounter;
use super::regs;
use super::stats::KernelStats;
use crate::config::affinity::VcpuAffinity;
use crate::sandbox::{self, ThreadKind};
use crate::telemetry::startup;
use crate::vm::{GuestEvent, GuestEvents};

/// How long all vCPUs together may take to come out of the guest.
const PARK_DEADLINE: Duration = Duration::from_secs(5);

/// Why vCPUs do not do as they are told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No thread.
    #[error("cannot start the thread of vcpu{index}")]
    Spawn {
        /// Which.
        index: usize,
        /// The system's answer.
        source: io::Error,
    },
    /// It cannot be kept to the CPUs that it was given.
    #[error("cannot keep the thread of vcpu{index} to its CPUs")]
    Affinity {
        /// Which.
        index: usize,
        /// The system's answer.
        source: io::Error,
    },
    /// No handler for the kick.
    #[error("cannot install the signal handler of the vCPUs")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// They did not stop.
    #[error("vcpus {vcpus:?} did not stop within {} s", PARK_DEADLINE.as_secs())]
    Stuck {
        /// Which.
        vcpus: Vec<usize>,
    },
}

/// `kvm_run.immediate_exit` of a thread that runs; `None` once it is on its way out.
struct ImmediateExit(Option<*mut u8>);

// SAFETY: the pointer is only used under the lock that holds it, as an atomic, and is taken away before
// the mapping goes.
unsafe impl Send for ImmediateExit {}

/// What the thread and its controller share.
struct Shared {
    exits: ExitCounters,
    /// Locked for a kick and at the thread's end.
    immediate_exit: Mutex<ImmediateExit>,
    /// Doorbells that KVM took itself, where perf may count them.
    doorbells: OnceLock<DoorbellCounter>,
}

impl Shared {
    fn immediate_exit(&self) -> MutexGuard<'_, ImmediateExit> {
        self.immediate_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

struct Vcpu {
    shared: Arc<Shared>,
    stats: Option<KernelStats>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    fn kick(&self) {
        let immediate_exit = self.shared.immediate_exit();
        if let (Some(flag), Some(thread)) = (immediate_exit.0, &self.thread) {
            // SAFETY: the thread takes the pointer away under this lock before its mapping goes.
            // Release: the gate was closed before.
            unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Release);
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, SIGRTMIN()) };
        }
    }
}

/// All vCPUs of a machine. Dropped, their threads end.
pub struct Vcpus {
    gate: Arc<Gate>,
    vcpus: Vec<Vcpu>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they wait for [`resume`](Self::resume).
    pub fn start(
        fds: Vec<VcpuFd>,
        buses: &Buses,
        events: &GuestEvents,
        affinity: &[VcpuAffinity],
    ) -> Result<Self, Error> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(Error::Signal)?;
        let gate = Arc::new(Gate::new(fds.len()));
        let mut vcpus = Self {
            gate: Arc::clone(&gate),
            vcpus: Vec::new(),
        };
        for (index, mut fd) in fds.into_iter().enumerate() {
            let flag = &raw mut fd.get_kvm_run().immediate_exit;
            let shared = Arc::new(Shared {
                exits: ExitCounters::default(),
                immediate_exit: Mutex::new(ImmediateExit(Some(flag))),
                doorbells: OnceLock::new(),
            });
            let stats = KernelStats::open(&fd)
                .inspect_err(|error| tracing::debug!(index, %error, "no kernel counters"))
                .ok();
            let runner = Runner {
                fd,
                index,
                gate: Arc::clone(&gate),
                shared: Arc::clone(&shared),
                buses: buses.clone(),
                events: events.clone(),
            };
            let thread = Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || runner.run())
                .map_err(|source| Error::Spawn { index, source })?;
            let cpus = affinity.iter().find(|of| usize::from(of.vcpu) == index);
            let kept = cpus.map_or(Ok(()), |of| affinity::keep_to(&thread, &of.host_cpus));
            vcpus.vcpus.push(Vcpu {
                shared,
                stats,
                thread: Some(thread),
            });
            kept.map_err(|source| Error::Affinity { index, source })?;
        }
        Ok(vcpus)
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Brings all vCPUs out of the guest; returns when they are. On an error they run on.
    pub fn pause(&self) -> Result<(), Error> {
        self.gate.close();
        self.kick();
        self.gate
            .wait_parked(Instant::now() + PARK_DEADLINE)
            .map_err(|vcpus| {
                self.gate.open();
                Error::Stuck { vcpus }
            })
    }

    /// Counters of each vCPU, in order: our own exits, then what the kernel counts where it tells.
    pub fn counters(&self) -> Vec<Vec<(String, u64)>> {
        self.vcpus.iter().map(Vcpu::counters).collect()
    }

    fn kick(&self) {
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.stop();
        self.kick();
        for vcpu in &mut self.vcpus {
            if let Some(thread) = vcpu.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

impl Vcpu {
    fn counters(&self) -> Vec<(String, u64)> {
        let own = self.shared.exits.snapshot();
        let mut counters: Vec<_> = own.map(|(name, value)| (name.to_owned(), value)).collect();
        if let Some(stats) = &self.stats {
            match stats.read() {
                Ok(values) => counters.extend(values),
                Err(error) => tracing::debug!(%error, "kernel counters"),
            }
        }
        if let Some(doorbells) = self.shared.doorbells.get() {
            match doorbells.read(self.shared.exits.get(Reason::BarWrite)) {
                Ok(count) => counters.push(("doorbells".to_owned(), count)),
                Err(error) => tracing::debug!(%error, "doorbell counter"),
            }
        }
        counters
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Its arrival ends KVM_RUN; there is nothing to do here.
}

/// What the thread owns.
struct Runner {
    fd: VcpuFd,
    index: usize,
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    buses: Buses,
    events: GuestEvents,
}

impl Runner {
    fn run(mut self) {
        match DoorbellCounter::of_this_thread() {
            Ok(counter) => drop(self.shared.doorbells.set(counter)),
            Err(error) => tracing::debug!(index = self.index, %error, "doorbells are not counted"),
        }
        // The counter's files are open.
        sandbox::enter(ThreadKind::Vcpu);
        loop {
            self.clear_immediate_exit();
            match self.gate.pass(self.index) {
                Pass::Stop => break,
                Pass::Run => {}
                // So that the guest's watchdogs forgive the time that it missed. A guest without
                // kvmclock has nothing to tell: EINVAL.
                Pass::Resumed => drop(self.fd.kvmclock_ctrl()),
            }
            if self.index == 0 {
                startup::entered();
            }
            loop {
                match run_once(&mut self.fd, &self.buses, &self.shared.exits) {
                    Next::Enter => {}
                    Next::Gate => break,
                    Next::Dead(exit) => return self.die(&exit),
                }
            }
        }
        self.shared.immediate_exit().0 = None;
    }

    fn clear_immediate_exit(&mut self) {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the mapping lives as long as `fd`; a controller writes it as an atomic too.
        // Acquire: the gate is looked at after.
        unsafe { AtomicU8::from_ptr(flag) }.swap(0, Ordering::AcqRel);
    }

    fn die(self, exit: &str) {
        let registers = regs::dump(&self.fd);
        self.shared.immediate_exit().0 = None;
        self.events.send(GuestEvent::Fatal(format!(
            "vcpu{}: {exit}\n{registers}",
            self.index
        )));
        self.gate.wait_for_stop(self.index);
    }
}
