//! A machine of two vCPUs, a megabyte, and one of KVM's two ways of having interrupt controllers.

use std::sync::Arc;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::cpu::{Cpu, Ipi};
use super::monitor;

/// Of the IOAPIC.
const PINS: u32 = 24;
/// The GSI behind the pins, routed to a message.
const MSI_GSI: u32 = PINS;
/// Where a message goes: physical destination, APIC id 0.
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// The IOAPIC's registers (82093AA datasheet, 3.1).
const IOAPIC_INDEX: u32 = 0xfec0_0000;
const IOAPIC_DATA: u32 = 0xfec0_0010;
const LEVEL: u32 = 1 << 15;
/// Of the local APIC, in x2APIC mode.
const LVT_LINT0: u32 = 0x835;
const LVT_MASKED: u64 = 1 << 16;

/// Who has the interrupt controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// All in the kernel.
    Kernel,
    /// The local APICs only.
    Split,
}

/// One VM. vCPUs end and everything is taken down when it is dropped.
pub(super) struct Machine {
    /// Before the VM: threads end first.
    cpus: [Cpu; 2],
    vm: Arc<VmFd>,
}

/// An eventfd that raises a GSI, until it is dropped.
pub(super) struct Irqfd {
    event: EventFd,
    resample: Option<EventFd>,
    gsi: u32,
    vm: Arc<VmFd>,
}

impl Irqfd {
    pub(super) fn raise(&self) -> Result<()> {
        self.event.write(1).context("raise an irqfd")
    }
}

impl Drop for Irqfd {
    fn drop(&mut self) {
        // It was registered; and if KVM forgot it, there is nothing to undo.
        let _ = self.vm.unregister_irqfd(&self.event, self.gsi);
        drop(self.resample.take());
    }
}

impl Machine {
    /// A machine whose vCPUs run, with their local APICs on and interrupts held back.
    pub(super) fn new(mode: Mode) -> Result<Machine> {
        let kvm = open_kvm()?;
        let vm = Arc::new(kvm.create_vm().context("create a VM")?);
        vm.set_tss_address(0xfffb_d000)
            .context("KVM_SET_TSS_ADDR")?;
        let memory = memory_at_zero(&vm)?;
        monitor::load(&memory)?;
        match mode {
            Mode::Kernel => vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?,
            Mode::Split => {
                let mut split = kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    ..Default::default()
                };
                split.args[0] = PINS.into();
                vm.enable_cap(&split).context("KVM_CAP_SPLIT_IRQCHIP")?;
            }
        }
        let cpus = [0, 1].map(|id| Cpu::new(&kvm, &vm, &memory, id));
        let [first, second] = cpus;
        let machine = Machine {
            cpus: [first?, second?],
            vm,
        };
        machine.start()?;
        Ok(machine)
    }

    fn start(&self) -> Result<()> {
        let [first, second] = &self.cpus;
        first.enable_apic()?;
        // KVM's reset state lets the PICs through to vCPU 0.
        first.write_msr(LVT_LINT0, LVT_MASKED)?;
        first.send_ipi(1, Ipi::Init)?;
        first.send_ipi(1, Ipi::Startup)?;
        second.enable_apic()
    }

    pub(super) fn cpu(&self, id: usize) -> &Cpu {
        &self.cpus[id]
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Routes every pin to the IOAPIC, where the kernel has it, and one GSI more to a message with `vector`.
    pub(super) fn route(&self, mode: Mode, vector: u8) -> Result<()> {
        let mut entries = vec![msi_route(vector)];
        if mode == Mode::Kernel {
            entries.extend((0..PINS).map(pin_route));
        }
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| anyhow::anyhow!("a routing table: {error:?}"))?;
        self.vm
            .set_gsi_routing(&table)
            .context("KVM_SET_GSI_ROUTING")
    }

    /// An eventfd for the message.
    pub(super) fn msi(&self) -> Result<Irqfd> {
        self.irqfd(MSI_GSI, false)
    }

    /// An eventfd for a pin; KVM lowers the line of a level-triggered one when the guest ends the interrupt.
    pub(super) fn pin(&self, pin: u32, level: bool) -> Result<Irqfd> {
        self.irqfd(pin, level)
    }

    fn irqfd(&self, gsi: u32, level: bool) -> Result<Irqfd> {
        let event = EventFd::new(libc::EFD_CLOEXEC)?;
        let resample = if level {
            let resample = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
            self.vm
                .register_irqfd_with_resample(&event, &resample, gsi)
                .context("an irqfd with a resample eventfd")?;
            Some(resample)
        } else {
            self.vm.register_irqfd(&event, gsi).context("an irqfd")?;
            None
        };
        Ok(Irqfd {
            event,
            resample,
            gsi,
            vm: Arc::clone(&self.vm),
        })
    }

    /// Routes an IOAPIC pin to `vector` on vCPU 0, active high.
    pub(super) fn programme_pin(&self, pin: u32, vector: u8, level: bool) -> Result<()> {
        let low = u32::from(vector) | if level { LEVEL } else { 0 };
        for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)] {
            self.cpus[0].write32(IOAPIC_INDEX, register, 1)?;
            self.cpus[0].write32(IOAPIC_DATA, value, 1)?;
        }
        Ok(())
    }
}

/// The message that raises `vector`, edge-triggered, on vCPU 0.
pub(super) fn message(vector: u8) -> kvm_msi {
    kvm_msi {
        address_lo: MSI_ADDRESS,
        data: vector.into(),
        ..Default::default()
    }
}

fn msi_route(vector: u8) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: MSI_GSI,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = MSI_ADDRESS;
    entry.u.msi.data = vector.into();
    entry
}

fn pin_route(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = pin;
    entry
}

fn open_kvm() -> Result<Kvm> {
    Kvm::new().context(
        "cannot open /dev/kvm: load kvm_intel or kvm_amd, and be root or in the group that owns it",
    )
}

#[allow(unsafe_code, reason = "a memory slot is a promise about a mapping")]
fn memory_at_zero(vm: &VmFd) -> Result<GuestMemoryMmap> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), monitor::MEMORY_BYTES)])
        .context("a megabyte for the guest")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: monitor::MEMORY_BYTES as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        flags: 0,
    };
    // SAFETY: the range is one whole mapping, which each vCPU's thread keeps until that vCPU runs no more; the
    // host side accesses it by copies only.
    unsafe { vm.set_user_memory_region(slot) }.context("the guest's memory")?;
    Ok(memory)
}
