//! A vCPU, its thread, and what it is told to do.
//!
//! The thread takes the clock around each command: when the guest goes on, and when it is back at its command
//! port. So what passes between two threads of ours is in no figure.
//!
//! To end it, the other side closes the command channel, sets `stop` and sends a signal whose handler sets
//! `immediate_exit`: it takes effect also if it comes just before KVM_RUN.
#![allow(
    unsafe_code,
    reason = "a signal handler that reaches into kvm_run, and gettid"
)]

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::monitor::{
    COMMAND_PORT, EXIT_GPA, EXIT_PORT, MAILBOX_PORT, Mailbox, NO_VECTOR, Operation, START,
    mailbox_of,
};

/// How long a command may take; a machine under emulation is slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// Local APIC registers in x2APIC mode, and its base register (Intel SDM 3A, 12.12).
const APIC_BASE: u32 = 0x1b;
const APIC_BASE_X2APIC: u64 = 0xfee0_0000 | 1 << 11 | 1 << 10;
const APIC_BASE_BSP: u64 = 1 << 8;
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const SPURIOUS_ENABLE: u64 = 1 << 8 | 0xff;
const ICR: u32 = 0x830;

/// An interrupt command for another vCPU.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ipi {
    Fixed(u8),
    Init,
    /// Start in real mode at [`START`].
    Startup,
}

/// What came of a command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    mailbox: Mailbox,
    /// When the guest went on with it.
    begun: Instant,
    /// When the guest was back at its command port.
    ended: Instant,
}

/// What the vCPU's thread and the other side share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Commands with which the guest has gone on, or is about to.
    begun: AtomicU64,
    tid: AtomicU32,
}

/// A vCPU that does as it is told.
pub(super) struct Cpu {
    id: u8,
    tsc_khz: u32,
    sent: Cell<u64>,
    commands: Option<Sender<Mailbox>>,
    results: Receiver<Result<Done>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Cpu {
    /// vCPU `id`, which 0 runs at once; the other waits for its startup IPI.
    pub(super) fn new(kvm: &Kvm, vm: &VmFd, memory: &GuestMemoryMmap, id: u8) -> Result<Cpu> {
        let vcpu = vm.create_vcpu(id.into()).context("create a vCPU")?;
        set_cpuid(kvm, &vcpu, id)?;
        if id == 0 {
            start_in_real_mode(&vcpu)?;
        }
        let tsc_khz = vcpu
            .get_tsc_khz()
            .context("the frequency of a vCPU's TSC")?;
        let (commands, next) = channel();
        let (done, results) = channel();
        let shared = Arc::new(Shared::default());
        let mut runner = Runner {
            vcpu,
            mailbox: GuestAddress(mailbox_of(id)),
            memory: memory.clone(),
            shared: Arc::clone(&shared),
            next,
            done,
        };
        register_signal_handler(SIGRTMIN(), leave_kvm).context("a signal handler")?;
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                if let Err(error) = runner.run() {
                    let _ = runner.done.send(Err(error));
                }
                IMMEDIATE_EXIT.set(std::ptr::null_mut());
            })?;
        Ok(Cpu {
            id,
            tsc_khz,
            sent: Cell::new(0),
            commands: Some(commands),
            results,
            shared,
            thread: Some(thread),
        })
    }

    /// Frequency of its TSC.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Writes 32 bits so often; how long that took.
    pub(super) fn write32(&self, gpa: u32, value: u32, times: u32) -> Result<Duration> {
        self.execute(Operation::Write32, gpa, value.into(), times)
            .map(|done| done.ended - done.begun)
    }

    /// Writes 16 bits to a port so often; how long that took.
    pub(super) fn out16(&self, port: u16, value: u16, times: u32) -> Result<Duration> {
        self.execute(Operation::Out16, port.into(), value.into(), times)
            .map(|done| done.ended - done.begun)
    }

    pub(super) fn write_msr(&self, msr: u32, value: u64) -> Result<()> {
        self.execute(Operation::WriteMsr, msr, value, 1).map(drop)
    }

    pub(super) fn read_tsc(&self) -> Result<u64> {
        Ok(self.execute(Operation::ReadTsc, 0, 0, 1)?.mailbox.value())
    }

    /// Switches the local APIC on, in x2APIC mode.
    pub(super) fn enable_apic(&self) -> Result<()> {
        let base = self.execute(Operation::ReadMsr, APIC_BASE, 0, 1)?;
        let bsp = base.mailbox.value() & APIC_BASE_BSP;
        self.write_msr(APIC_BASE, APIC_BASE_X2APIC | bsp)?;
        self.write_msr(SPURIOUS, SPURIOUS_ENABLE)
    }

    /// Ends the interrupt that was taken last.
    pub(super) fn eoi(&self) -> Result<()> {
        self.write_msr(EOI, 0)
    }

    /// Sends an interrupt to the vCPU with this APIC id; the TSC just before.
    pub(super) fn send_ipi(&self, apic_id: u8, ipi: Ipi) -> Result<u64> {
        const ASSERT: u64 = 1 << 14;
        let command = match ipi {
            Ipi::Fixed(vector) => u64::from(vector),
            Ipi::Init => 5 << 8,
            Ipi::Startup => 6 << 8 | START >> 12,
        };
        let value = u64::from(apic_id) << 32 | ASSERT | command;
        let done = self.execute(Operation::TimedWriteMsr, ICR, value, 1)?;
        Ok(done.mailbox.value())
    }

    /// Lets the guest halt and waits until its thread sleeps in the kernel for it.
    pub(super) fn halt(&self) -> Result<()> {
        self.send(Operation::WaitForInterrupt, 0, 0, 1)?;
        let deadline = Instant::now() + PATIENCE;
        while self.shared.begun.load(Ordering::Acquire) < self.sent.get() || !self.sleeps() {
            if Instant::now() >= deadline {
                bail!("vcpu{} does not halt", self.id);
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Lets the guest wait for an interrupt that may come before it halts.
    pub(super) fn await_interrupt(&self) -> Result<()> {
        self.send(Operation::WaitForInterrupt, 0, 0, 1)
    }

    /// Waits for `vector`, which ends a [`halt`](Self::halt): when its handler had left the guest, and the TSC
    /// in it.
    pub(super) fn woken_by(&self, vector: u8) -> Result<(Instant, u64)> {
        let done = self.receive(Operation::WaitForInterrupt)?;
        if done.mailbox.vector != u32::from(vector) {
            let (id, came) = (self.id, done.mailbox.vector);
            bail!("vcpu{id} waited for vector {vector:#x} and took {came:#x}");
        }
        Ok((done.ended, done.mailbox.value()))
    }

    fn sleeps(&self) -> bool {
        let tid = self.shared.tid.load(Ordering::Acquire);
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat"));
        is_asleep(&stat.unwrap_or_default())
    }

    fn execute(&self, operation: Operation, target: u32, value: u64, count: u32) -> Result<Done> {
        self.send(operation, target, value, count)?;
        let done = self.receive(operation)?;
        if done.mailbox.vector != NO_VECTOR {
            let (id, vector) = (self.id, done.mailbox.vector);
            bail!("vcpu{id} took vector {vector:#x} in {operation:?} of {target:#x}");
        }
        Ok(done)
    }

    fn send(&self, operation: Operation, target: u32, value: u64, count: u32) -> Result<()> {
        let mailbox = Mailbox {
            operation: operation as u32,
            target,
            low: value as u32,
            high: (value >> 32) as u32,
            count,
            vector: NO_VECTOR,
        };
        self.sent.set(self.sent.get() + 1);
        let commands = self.commands.as_ref().context("a vCPU that was dropped")?;
        commands
            .send(mailbox)
            .with_context(|| format!("vcpu{} has ended", self.id))
    }

    fn receive(&self, operation: Operation) -> Result<Done> {
        match self.results.recv_timeout(PATIENCE) {
            Ok(result) => result.with_context(|| format!("vcpu{}: {operation:?}", self.id)),
            Err(_) => bail!("vcpu{}: {operation:?} not done in {PATIENCE:?}", self.id),
        }
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.commands = None;
        self.shared.stop.store(true, Ordering::SeqCst);
        let Some(thread) = self.thread.take() else {
            return;
        };
        // SAFETY: the thread is not joined yet, so its id is valid, and it has a handler.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        let _ = thread.join();
    }
}

/// Whether the third field of /proc/PID/stat is S.
fn is_asleep(stat: &str) -> bool {
    let state = stat.rsplit(')').next().unwrap_or_default();
    state.trim_start().starts_with('S')
}

/// What the vCPU's thread owns.
struct Runner {
    vcpu: VcpuFd,
    mailbox: GuestAddress,
    /// A reference to the mapping, so that it outlives the guest.
    memory: GuestMemoryMmap,
    shared: Arc<Shared>,
    next: Receiver<Mailbox>,
    done: Sender<Result<Done>>,
}

impl Runner {
    fn run(&mut self) -> Result<()> {
        IMMEDIATE_EXIT.set(&raw mut self.vcpu.get_kvm_run().immediate_exit);
        // From here on a signal counts; one that came before has left the flag `stop`.
        // SAFETY: a system call without arguments.
        let tid = unsafe { libc::gettid() };
        self.shared
            .tid
            .store(tid.cast_unsigned(), Ordering::Release);
        let mut begun: Option<Instant> = None;
        while !self.shared.stop.load(Ordering::SeqCst) {
            match self.vcpu.run() {
                Ok(VcpuExit::IoIn(COMMAND_PORT, _)) => {
                    let ended = Instant::now();
                    if let Some(begun) = begun {
                        let mailbox = self.memory.read_obj(self.mailbox)?;
                        let done = Done {
                            mailbox,
                            begun,
                            ended,
                        };
                        if self.done.send(Ok(done)).is_err() {
                            break;
                        }
                    }
                    let Ok(command) = self.next.recv() else {
                        break;
                    };
                    self.memory.write_obj(command, self.mailbox)?;
                    begun = Some(Instant::now());
                    self.shared.begun.fetch_add(1, Ordering::Release);
                }
                Ok(VcpuExit::IoIn(MAILBOX_PORT, data)) => {
                    let address = (self.mailbox.0 as u32).to_le_bytes();
                    data.copy_from_slice(&address[..data.len().min(4)]);
                }
                Ok(VcpuExit::IoOut(EXIT_PORT, _)) => {}
                Ok(VcpuExit::MmioWrite(gpa, _)) if gpa == u64::from(EXIT_GPA) => {}
                Ok(other) => bail!("an exit that nobody asked for: {other:?}"),
                // EAGAIN: a vCPU that waited to be started has been, by a startup IPI.
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
        Ok(())
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn leave_kvm(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null only while the vCPU of this very thread is alive and its kvm_run mapped;
        // a byte that the kernel reads, written without a torn state.
        unsafe { flag.write_volatile(1) };
    }
}

fn set_cpuid(kvm: &Kvm, vcpu: &VcpuFd, id: u8) -> Result<()> {
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("KVM's CPUID")?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= X2APIC | TSC_DEADLINE;
                entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24;
            }
            0xb | 0x1f => entry.edx = id.into(),
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).context("a vCPU's CPUID")
}

fn start_in_real_mode(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = START;
    sregs.cs.selector = (START >> 4) as u16;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_sleeps_by_its_state_and_not_by_its_name() {
        assert!(is_asleep("12 (vcpu0) S 1 2 3"));
        assert!(is_asleep("12 (odd) name) S 1 2 3"));
        assert!(!is_asleep("12 (S) R 1 2 3"));
        assert!(!is_asleep("") && !is_asleep("12 vcpu0"));
    }
}
