//! A machine for tests: a megabyte of memory, the chip under test, and vCPUs that do as they are
//! told, one command at a time ([`Cpu`]). A test thus reads as a story in one language; the guest
//! side of each command is in [`monitor`].

mod apic;
mod cpu;
mod monitor;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_irqchip::{Chip, ChipState, Held, Mode, Msi, MsiMessage};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub(crate) use apic::{Ipi, LVT_TIMER, TSC_DEADLINE, TSC_DEADLINE_MODE};
pub(crate) use cpu::Cpu;

/// How long a test waits for anything; generous, as some machines emulate the guest.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// The page on which a startup IPI makes a vCPU begin.
pub(crate) const START_PAGE: u8 = (monitor::START >> 12) as u8;

/// A guest access that KVM handed to user space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Mmio { gpa: u64, data: Vec<u8> },
    Pio { port: u16, data: Vec<u8> },
}

/// Accesses that left the kernel, commands apart.
pub(crate) type Exits = Arc<Mutex<Vec<Exit>>>;

/// What a vCPU needs of its machine.
pub(crate) struct Host {
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    chip: Arc<Chip>,
    exits: Exits,
}

/// One VM. vCPUs end and everything is taken down when it is dropped, also by a failed assertion.
pub(crate) struct Machine {
    /// Before the VM: threads end first.
    cpus: Vec<Cpu>,
    pub(crate) chip: Arc<Chip>,
    host: Host,
}

/// A machine that was taken apart.
pub(crate) struct Saved {
    cpus: Vec<cpu::SavedCpu>,
    memory: Vec<u8>,
    chip: Vec<u8>,
}

impl Host {
    fn new(kvm: Kvm, mode: Mode) -> Self {
        Self::with_chip(kvm, |vm| Chip::new(vm, mode).unwrap())
    }

    fn with_chip(kvm: Kvm, make: impl FnOnce(Arc<VmFd>) -> Arc<Chip>) -> Self {
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.set_tss_address(0xfffb_d000).unwrap();
        let memory = memory_at_zero(&vm);
        let chip = make(Arc::clone(&vm));
        Self {
            kvm,
            vm,
            memory,
            chip,
            exits: Exits::default(),
        }
    }
}

impl Machine {
    /// A machine whose vCPU 0 runs, with its local APIC on, the PICs masked and interrupts held back. The others, if
    /// any, wait to be started as in a real machine. `None`, and a note, without `/dev/kvm`.
    pub(crate) fn new(mode: Mode, vcpus: u8) -> Option<Self> {
        let ids: Vec<u16> = (0..vcpus.into()).collect();
        Self::with_ids(mode, &ids)
    }

    /// The same with these APIC ids, of which the first is 0.
    pub(crate) fn with_ids(mode: Mode, ids: &[u16]) -> Option<Self> {
        Self::with_chip(ids, |vm| Chip::new(vm, mode).unwrap())
    }

    /// The same with a chip that the test makes.
    pub(crate) fn with_chip(
        ids: &[u16],
        make: impl FnOnce(Arc<VmFd>) -> Arc<Chip>,
    ) -> Option<Self> {
        let Ok(kvm) = Kvm::new() else {
            note("skipped: no /dev/kvm");
            return None;
        };
        let host = Host::with_chip(kvm, make);
        monitor::load(&host.memory);
        let cpus = (0..)
            .zip(ids)
            .map(|(index, id)| Cpu::new(&host, index, *id));
        let machine = Self {
            cpus: cpus.collect(),
            chip: Arc::clone(&host.chip),
            host,
        };
        machine.cpu(0).enable_apic();
        if machine.chip.mode() == Mode::Kernel {
            machine.cpu(0).mask_pic();
        }
        Some(machine)
    }

    pub(crate) fn cpu(&self, id: usize) -> &Cpu {
        &self.cpus[id]
    }

    /// Guest accesses that left the kernel since the last call.
    pub(crate) fn take_exits(&self) -> Vec<Exit> {
        std::mem::take(&mut *self.host.exits.lock().unwrap())
    }

    /// Takes the machine apart, whatever its vCPUs do. Its devices go with it, when the caller drops them.
    pub(crate) fn save(self, msis: &[&Msi]) -> Saved {
        self.cpus.iter().for_each(Cpu::park);
        let held = self.chip.hold(msis).unwrap();
        self.saved(&held, Cpu::save)
    }

    /// What the machine is, whose vCPUs do nothing and whose chip is held; it goes on.
    pub(crate) fn look(&self, held: &Held<'_>) -> Saved {
        self.saved(held, Cpu::look)
    }

    fn saved(&self, held: &Held<'_>, save: fn(&Cpu) -> cpu::SavedCpu) -> Saved {
        let cpus: Vec<_> = self.cpus.iter().map(save).collect();
        let vcpus: Vec<_> = cpus.iter().map(cpu::SavedCpu::state).collect();
        let chip = held.save(&vcpus).unwrap().to_bytes();
        let mut memory = vec![0; monitor::MEMORY_BYTES];
        self.host
            .memory
            .read_slice(&mut memory, GuestAddress(0))
            .unwrap();
        Saved { cpus, memory, chip }
    }

    /// The same machine in a new VM. `make` makes its devices, in the order in which they were first made.
    pub(crate) fn restored<D>(
        saved: &Saved,
        make: impl FnOnce(&Arc<Chip>) -> D,
        msis: impl Fn(&D) -> Vec<&Msi>,
    ) -> (Self, D) {
        let state = ChipState::from_bytes(&saved.chip).unwrap();
        let host = Host::new(Kvm::new().unwrap(), state.mode());
        let memory = &host.memory;
        memory.write_slice(&saved.memory, GuestAddress(0)).unwrap();
        let devices = make(&host.chip);
        let vcpus = (0..).zip(&saved.cpus);
        let vcpus: Vec<_> = vcpus.map(|(id, cpu)| cpu.restore(&host, id)).collect();
        host.chip.restore(&state, &msis(&devices)).unwrap();
        let vcpus = (0..).zip(vcpus);
        let cpus = vcpus.map(|(index, vcpu)| Cpu::start(&host, index, index.into(), vcpu));
        let cpus = cpus.collect();
        let chip = Arc::clone(&host.chip);
        (Self { cpus, chip, host }, devices)
    }

    /// A vector that raises `vector` on vCPU 0.
    pub(crate) fn msi(&self, vector: u8) -> Msi {
        let msi = self.chip.msi().unwrap();
        msi.set_message(to_cpu0(vector)).unwrap();
        msi
    }

    /// The VM, for what the chip does not offer.
    pub(crate) fn vm(&self) -> &VmFd {
        &self.host.vm
    }

    /// Whether the instruction at this address is VMCALL.
    pub(crate) fn is_vmcall(&self, address: u64) -> bool {
        let code: [u8; 3] = self.host.memory.read_obj(GuestAddress(address)).unwrap();
        code == [0x0f, 0x01, 0xc1]
    }

    /// Waits until the IOAPIC, where it is KVM's, has seen that a masked pin was raised: irqfd hands wired
    /// interrupts to a kernel thread.
    pub(crate) fn wait_asserted(&self, pin: u32) {
        let deadline = Instant::now() + DEADLINE;
        while self.chip.mode() == Mode::Kernel && !self.is_asserted(pin) {
            assert!(Instant::now() < deadline, "pin {pin} was not raised");
            std::thread::yield_now();
        }
    }

    /// Whether a pin of KVM's IOAPIC is high, or an edge waits there.
    #[allow(unsafe_code, reason = "one member of a union")]
    pub(crate) fn is_asserted(&self, pin: u32) -> bool {
        let chip = self.irqchip(KVM_IRQCHIP_IOAPIC);
        // SAFETY: plain numbers, of which KVM has filled this member as the chip is its IOAPIC.
        unsafe { chip.chip.ioapic.irr & 1 << pin != 0 }
    }

    /// Whether an interrupt of the first eight waits in KVM's PIC.
    #[allow(unsafe_code, reason = "one member of a union")]
    pub(crate) fn is_requested_at_pic(&self, pin: u32) -> bool {
        let chip = self.irqchip(KVM_IRQCHIP_PIC_MASTER);
        // SAFETY: plain numbers, of which KVM has filled this member as the chip is a PIC.
        unsafe { chip.chip.pic.irr & 1 << pin != 0 }
    }

    fn irqchip(&self, chip_id: u32) -> kvm_irqchip {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.vm().get_irqchip(&mut chip).unwrap();
        chip
    }

    /// Makes KVM take the high half of an MSI address as destination bits, and check it.
    pub(crate) fn use_x2apic_ids(&self) {
        let args = [KVM_X2APIC_API_USE_32BIT_IDS.into(), 0, 0, 0];
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            args,
            ..Default::default()
        };
        self.host.vm.enable_cap(&cap).unwrap();
    }

    /// Asserts that vCPU 0 has no interrupt waiting: one of the lowest priority, raised now, must
    /// be the next it takes.
    pub(crate) fn assert_no_interrupt(&self) {
        const LOWEST: u8 = 0x20;
        let probe = self.msi(LOWEST);
        probe.event().write(1).unwrap();
        assert_eq!(
            self.cpu(0).interrupt(),
            LOWEST,
            "an interrupt that nobody raised"
        );
        self.cpu(0).eoi();
    }
}

/// The message that raises `vector`, edge-triggered, on vCPU 0.
pub(crate) fn to_cpu0(vector: u8) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

/// Tells whoever reads the output; unlike `eprintln!` also if the test passes.
pub(crate) fn note(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// Waits for an eventfd and takes its count.
pub(crate) fn wait_for(event: &EventFd) -> u64 {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match event.read() {
            Ok(count) => return count,
            Err(_) if Instant::now() < deadline => poll_until(event, deadline),
            Err(error) => panic!("eventfd not signalled within {DEADLINE:?}: {error}"),
        }
    }
}

/// Whether an eventfd is signalled now; takes its count.
pub(crate) fn is_signalled(event: &EventFd) -> bool {
    event.read().is_ok()
}

#[allow(unsafe_code, reason = "poll of one descriptor")]
fn poll_until(event: &EventFd, deadline: Instant) {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let left = deadline
        .saturating_duration_since(Instant::now())
        .as_millis() as i32;
    // SAFETY: `poll` is one valid pollfd and 1 is its count.
    unsafe { libc::poll(&raw mut poll, 1, left) };
}

#[allow(unsafe_code, reason = "a memory slot is a promise about a mapping")]
fn memory_at_zero(vm: &VmFd) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), monitor::MEMORY_BYTES)]).unwrap();
    let slot = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: monitor::MEMORY_BYTES as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        flags: 0,
    };
    // SAFETY: the range is one whole mapping, which `Machine` and each vCPU thread keep until the
    // last vCPU has ended; the host side accesses it by copies only.
    unsafe { vm.set_user_memory_region(slot) }.unwrap();
    memory
}
