//! A vCPU, its thread, and the commands a test gives it.
//!
//! The thread is in one of two places: in KVM, or waiting for the next command while the guest
//! stands at its command port. To end it, the test side closes the command channel and sends a
//! signal whose handler sets `immediate_exit`: it takes effect also if it comes just before
//! KVM_RUN.
#![allow(unsafe_code, reason = "a signal handler that reaches into kvm_run")]

use std::cell::Cell;
use std::ops::Range;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use berth_irqchip::{Chip, IOAPIC_LEN, VcpuState};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::monitor::{
    COMMAND_PORT, MAILBOX_PORT, Mailbox, NO_VECTOR, Operation, START, mailbox_of,
};
use super::{DEADLINE, Exit, Exits, Host};

/// The IOAPIC's page; accesses leave the kernel where this process has the IOAPIC.
const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_0000 + IOAPIC_LEN;

/// A vCPU that does as it is told.
pub(crate) struct Cpu {
    id: u16,
    commands: Option<Sender<Command>>,
    results: Receiver<Result<Mailbox, String>>,
    arrived: Receiver<u32>,
    stop: Arc<AtomicBool>,
    runs: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Cpu {
    /// The `index`th vCPU, with this APIC id.
    pub(super) fn new(host: &Host, index: u8, id: u16) -> Self {
        let vcpu = create(host, id);
        if id == 0 {
            start_in_real_mode(&vcpu);
        }
        Self::start(host, index, id, (vcpu, false))
    }

    /// Runs a vCPU that has its registers, and perhaps a command that it has not done.
    pub(super) fn start(host: &Host, index: u8, id: u16, (vcpu, busy): (VcpuFd, bool)) -> Self {
        let (commands, next) = channel();
        let (done, results) = channel();
        let (arriving, arrived) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let runs = Arc::new(AtomicU64::new(0));
        let mut runner = Runner {
            vcpu,
            mailbox: GuestAddress(mailbox_of(index)),
            memory: host.memory.clone(),
            chip: Arc::clone(&host.chip),
            exits: Arc::clone(&host.exits),
            stop: Arc::clone(&stop),
            runs: Arc::clone(&runs),
            next,
            done,
            arriving,
            busy,
        };
        register_signal_handler(SIGRTMIN(), leave_kvm).unwrap();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || runner.run())
            .unwrap();
        Self {
            id,
            commands: Some(commands),
            results,
            arrived,
            stop,
            runs,
            thread: Some(thread),
        }
    }

    /// Takes the vCPU out of KVM, whatever it does there, for good: what is left to do is to look and to save.
    pub(crate) fn park(&self) {
        let (ack, parked) = channel();
        self.send_command(Command::Park(ack));
        self.kick();
        parked.recv_timeout(DEADLINE).expect("it leaves KVM");
    }

    /// What the vCPU, which does nothing, is about to take.
    pub(crate) fn events(&self) -> kvm_vcpu_events {
        self.change_events(|_| {})
    }

    /// Changes it; returns what it was.
    pub(crate) fn change_events(&self, change: fn(&mut kvm_vcpu_events)) -> kvm_vcpu_events {
        let (reply, events) = channel();
        self.send_command(Command::Events(change, reply));
        events.recv_timeout(DEADLINE).expect("the vCPU is idle")
    }

    /// What a vCPU that did nothing when it was saved took before its first command.
    pub(crate) fn taken_on_arrival(&self) -> Option<u8> {
        let vector = self.arrived.recv_timeout(DEADLINE).expect("it arrives");
        u8::try_from(vector).ok()
    }

    /// What the vCPU is; it runs no more.
    pub(super) fn save(&self) -> SavedCpu {
        self.saved(false)
    }

    /// What the vCPU, which does nothing, is; it goes on.
    pub(super) fn look(&self) -> SavedCpu {
        self.saved(true)
    }

    fn saved(&self, goes_on: bool) -> SavedCpu {
        let (reply, saved) = channel();
        self.send_command(Command::Save { reply, goes_on });
        saved.recv_timeout(DEADLINE).expect("the vCPU is parked")
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread is not joined yet, so its id is valid, and it has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }

    /// Writes `value` to a guest physical address.
    pub(crate) fn write8(&self, gpa: u32, value: u8) {
        self.execute(Operation::Write8, gpa, value.into(), 1);
    }

    pub(crate) fn write16(&self, gpa: u32, value: u16) {
        self.execute(Operation::Write16, gpa, value.into(), 1);
    }

    pub(crate) fn write32(&self, gpa: u32, value: u32) {
        self.execute(Operation::Write32, gpa, value.into(), 1);
    }

    /// Writes `value` so often without a command in between.
    pub(crate) fn write32_times(&self, gpa: u32, value: u32, times: u32) {
        self.execute(Operation::Write32, gpa, value.into(), times);
    }

    pub(crate) fn read32(&self, gpa: u32) -> u32 {
        self.execute(Operation::Read32, gpa, 0, 1) as u32
    }

    /// Writes `value` to a port.
    pub(crate) fn out8(&self, port: u16, value: u8) {
        self.execute(Operation::Out8, port.into(), value.into(), 1);
    }

    pub(crate) fn out16(&self, port: u16, value: u16) {
        self.execute(Operation::Out16, port.into(), value.into(), 1);
    }

    pub(crate) fn out32(&self, port: u16, value: u32) {
        self.execute(Operation::Out32, port.into(), value.into(), 1);
    }

    pub(crate) fn out16_times(&self, port: u16, value: u16, times: u32) {
        self.execute(Operation::Out16, port.into(), value.into(), times);
    }

    pub(crate) fn write_msr(&self, msr: u32, value: u64) {
        self.execute(Operation::WriteMsr, msr, value, 1);
    }

    pub(crate) fn read_msr(&self, msr: u32) -> u64 {
        self.execute(Operation::ReadMsr, msr, 0, 1)
    }

    pub(crate) fn read_tsc(&self) -> u64 {
        self.execute(Operation::ReadTsc, 0, 0, 1)
    }

    /// Halts until the next interrupt, one that waits already included, and returns its vector.
    pub(crate) fn interrupt(&self) -> u8 {
        self.halt();
        self.woken_by()
    }

    /// Lets the guest run with interrupts on; [`woken_by`](Self::woken_by) must be next.
    pub(crate) fn spin(&self) {
        self.send(Operation::SpinForInterrupt, 0, 0, 1);
    }

    /// Sends `vector` by KVM's hypercall to the vCPUs whose APIC ids are set bits; how many got it. Where it does
    /// not come back soon the vCPU is parked, and this is where it stands.
    pub(crate) fn send_ipi_by_hypercall(&self, ids: u32, vector: u8) -> Result<u32, u64> {
        const SEND_IPI: u32 = 10;
        const SOON: Duration = Duration::from_secs(2);
        let value = u64::from(vector) << 32 | u64::from(ids);
        self.send(Operation::Hypercall, SEND_IPI, value, 1);
        match self.results.recv_timeout(SOON) {
            Ok(result) => Ok(result.unwrap().low),
            Err(_) => {
                self.park();
                Err(self.save().regs.rip)
            }
        }
    }

    pub(crate) fn in8(&self, port: u16) -> u8 {
        self.execute(Operation::In8, port.into(), 0, 1) as u8
    }

    /// Lets the guest halt; [`woken_by`](Self::woken_by) must be next.
    pub(crate) fn halt(&self) {
        self.send(Operation::WaitForInterrupt, 0, 0, 1);
    }

    /// The vector that ended a [`halt`](Self::halt).
    pub(crate) fn woken_by(&self) -> u8 {
        self.woken_at().0
    }

    /// The vector that ended a [`halt`](Self::halt), and the TSC in its handler.
    pub(crate) fn woken_at(&self) -> (u8, u64) {
        let result = self.receive(Operation::WaitForInterrupt);
        let vector = u8::try_from(result.vector).unwrap();
        (vector, u64::from(result.high) << 32 | u64::from(result.low))
    }

    /// Writes an MSR; returns the TSC just before.
    pub(crate) fn write_msr_at(&self, msr: u32, value: u64) -> u64 {
        self.execute(Operation::TimedWriteMsr, msr, value, 1)
    }

    /// How often this vCPU has entered KVM; each command makes it once.
    pub(crate) fn runs(&self) -> u64 {
        self.runs.load(Ordering::SeqCst)
    }

    fn execute(&self, operation: Operation, target: u32, value: u64, count: u32) -> u64 {
        self.send(operation, target, value, count);
        let result = self.receive(operation);
        let id = self.id;
        assert_eq!(
            result.vector, NO_VECTOR,
            "vcpu{id} took an exception in {operation:?}"
        );
        u64::from(result.high) << 32 | u64::from(result.low)
    }

    fn send(&self, operation: Operation, target: u32, value: u64, count: u32) {
        let mailbox = Mailbox {
            operation: operation as u32,
            target,
            low: value as u32,
            high: (value >> 32) as u32,
            count,
            vector: NO_VECTOR,
        };
        self.send_command(Command::Do(mailbox));
    }

    fn send_command(&self, command: Command) {
        let commands = self.commands.as_ref().expect("taken on drop only");
        commands
            .send(command)
            .unwrap_or_else(|_| panic!("vcpu{} has ended", self.id));
    }

    fn receive(&self, operation: Operation) -> Mailbox {
        match self.results.recv_timeout(DEADLINE) {
            Ok(Ok(result)) => result,
            Ok(Err(why)) => panic!("vcpu{}: {operation:?}: {why}", self.id),
            Err(_) => panic!(
                "vcpu{}: {operation:?} not done within {DEADLINE:?}",
                self.id
            ),
        }
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.commands = None;
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the test side asks for.
enum Command {
    Do(Mailbox),
    Park(Sender<()>),
    Events(fn(&mut kvm_vcpu_events), Sender<kvm_vcpu_events>),
    Save {
        reply: Sender<SavedCpu>,
        goes_on: bool,
    },
}

/// A vCPU that was taken apart, between two commands or in the middle of one.
pub(super) struct SavedCpu {
    /// The command's result is still to come.
    busy: bool,
    regs: kvm_regs,
    sregs: kvm_sregs,
    state: Vec<u8>,
}

impl SavedCpu {
    /// Its interrupts and clocks.
    pub(super) fn state(&self) -> VcpuState {
        VcpuState::from_bytes(&self.state).unwrap()
    }

    /// The same vCPU in another VM.
    pub(super) fn restore(&self, host: &Host, id: u16) -> (VcpuFd, bool) {
        let vcpu = create(host, id);
        vcpu.set_sregs(&self.sregs).unwrap();
        vcpu.set_regs(&self.regs).unwrap();
        self.state().restore(&vcpu).unwrap();
        (vcpu, self.busy)
    }
}

fn create(host: &Host, id: u16) -> VcpuFd {
    let vcpu = host.vm.create_vcpu(id.into()).unwrap();
    set_cpuid(&host.kvm, &vcpu, id);
    vcpu
}

/// What the vCPU's thread owns.
struct Runner {
    vcpu: VcpuFd,
    mailbox: GuestAddress,
    /// A reference to the mapping, so that it outlives the guest.
    memory: GuestMemoryMmap,
    chip: Arc<Chip>,
    exits: Exits,
    stop: Arc<AtomicBool>,
    /// How often KVM_RUN was called.
    runs: Arc<AtomicU64>,
    next: Receiver<Command>,
    done: Sender<Result<Mailbox, String>>,
    /// What interrupted a vCPU on its way to the first command.
    arriving: Sender<u32>,
    /// The guest has a command whose result is still to come.
    busy: bool,
}

impl Runner {
    fn run(&mut self) {
        let run = self.vcpu.get_kvm_run();
        IMMEDIATE_EXIT.set(&raw mut run.immediate_exit);
        // From here on a signal counts; one that came before has left the flag.
        while !self.stop.load(Ordering::SeqCst) {
            self.runs.fetch_add(1, Ordering::SeqCst);
            let exit = match self.vcpu.run() {
                Ok(exit) => exit,
                // A vCPU that waited to be started has been, by a startup IPI.
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) if error.errno() == libc::EINTR => {
                    if self.obey(false) {
                        continue;
                    }
                    break;
                }
                Err(error) => return self.fail(format!("KVM_RUN: {error}")),
            };
            match exit {
                VcpuExit::IoIn(COMMAND_PORT, _) => {
                    let result = self.memory.read_obj(self.mailbox).unwrap();
                    if std::mem::replace(&mut self.busy, false) {
                        let _ = self.done.send(Ok(result));
                    } else {
                        let _ = self.arriving.send(result.vector);
                    }
                    if !self.obey(true) {
                        break;
                    }
                }
                VcpuExit::IoIn(MAILBOX_PORT, data) => {
                    data.copy_from_slice(&(self.mailbox.0 as u32).to_le_bytes());
                }
                VcpuExit::IoOut(port, data) => {
                    let exit = Exit::Pio {
                        port,
                        data: data.to_vec(),
                    };
                    self.exits.lock().unwrap().push(exit);
                }
                VcpuExit::MmioRead(gpa, data) if IOAPIC.contains(&gpa) => {
                    self.chip.ioapic_read(gpa - IOAPIC.start, data);
                }
                VcpuExit::MmioWrite(gpa, data) if IOAPIC.contains(&gpa) => {
                    let written = self.chip.ioapic_write(gpa - IOAPIC.start, data);
                    written.unwrap();
                }
                VcpuExit::IoapicEoi(vector) => self.chip.end_of_interrupt(vector),
                VcpuExit::MmioWrite(gpa, data) => {
                    let exit = Exit::Mmio {
                        gpa,
                        data: data.to_vec(),
                    };
                    self.exits.lock().unwrap().push(exit);
                }
                other => {
                    let what = format!("unexpected exit {other:?}");
                    return self.fail(what);
                }
            }
        }
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }

    /// Does what the test side asks for while the vCPU is not in KVM, until there is a command for the guest,
    /// which stands at its command port or was taken out of KVM. `false` is the end.
    fn obey(&mut self, at_port: bool) -> bool {
        loop {
            match self.next.recv() {
                Ok(Command::Do(command)) => {
                    self.memory.write_obj(command, self.mailbox).unwrap();
                    self.busy = true;
                    return true;
                }
                Ok(Command::Park(ack)) => drop(ack.send(())),
                Ok(Command::Events(change, reply)) => {
                    let before = self.vcpu.get_vcpu_events().unwrap();
                    let mut events = before;
                    change(&mut events);
                    self.vcpu.set_vcpu_events(&events).unwrap();
                    let _ = reply.send(before);
                }
                Ok(Command::Save { reply, goes_on }) => {
                    if at_port {
                        self.finish_read();
                    }
                    let _ = reply.send(self.save());
                    self.vcpu.get_kvm_run().immediate_exit = 0;
                    return goes_on;
                }
                Err(_) => return false,
            }
        }
    }

    /// Lets KVM finish the read of the command port. What the vCPU does next, here or elsewhere, is to read its
    /// clock and ask for a command.
    fn finish_read(&mut self) {
        let nothing = Mailbox {
            operation: Operation::ReadTsc as u32,
            count: 1,
            vector: NO_VECTOR,
            ..Default::default()
        };
        self.memory.write_obj(nothing, self.mailbox).unwrap();
        self.vcpu.get_kvm_run().immediate_exit = 1;
        let error = self.vcpu.run().expect_err("the guest may not run");
        assert_eq!(error.errno(), libc::EINTR);
    }

    fn save(&self) -> SavedCpu {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        // An interrupt that is being injected is here too: `VcpuState` is to have it.
        sregs.interrupt_bitmap = [0; 4];
        SavedCpu {
            busy: self.busy,
            regs: self.vcpu.get_regs().unwrap(),
            sregs,
            state: VcpuState::save(&self.vcpu).unwrap().to_bytes(),
        }
    }

    fn fail(&self, why: String) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
        let _ = self.done.send(Err(why));
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

fn set_cpuid(kvm: &Kvm, vcpu: &VcpuFd, id: u16) {
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= X2APIC | TSC_DEADLINE;
                entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id & 0xff) << 24;
            }
            0xb | 0x1f => entry.edx = id.into(),
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).unwrap();
}

fn start_in_real_mode(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = START;
    sregs.cs.selector = (START >> 4) as u16;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
}
