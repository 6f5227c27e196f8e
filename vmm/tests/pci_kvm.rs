//! The topology over KVM's real chip: a few bytes of guest ring a doorbell that moves with its BAR, and a
//! queue's interrupt arrives in the local APIC.
//!
//! The test is the driver: it does through the buses what exits of a guest would. Only the doorbell is
//! rung from inside, as nothing else shows whether KVM or this process takes the write.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_irqchip::{Chip, Mode};
use berth_vmm::bus::Bus;
use berth_vmm::config::MemoryConfig;
use berth_vmm::devices::virtio::device::{
    ActivateError, Activation, TransportNotify, VirtioDevice,
};
use berth_vmm::memory::GuestRam;
use berth_vmm::memory::layout::{ECAM_START, MMIO32_START};
use berth_vmm::pci::{Pci, PciContext, PciHost};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MMIO64: u64 = 16 << 30;
const CODE: u64 = 0x1000;
/// `mov [0], ax; out 0x80, al; jmp` to the beginning, with the doorbell at the data segment's base.
const RING: [u8; 7] = [0xa3, 0, 0, 0xe6, 0x80, 0xeb, 0xf9];
const NOTIFY: u64 = 0x1_0000;
const TABLE: u64 = 0x8000;
/// Vector of the queue's interrupt.
const VECTOR: u32 = 0x41;

/// Hands its activation to the test.
struct Device(Arc<Mutex<Option<Activation>>>);

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        1 << 32
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attach(&mut self, _notify: Arc<dyn TransportNotify>) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        *self.0.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn set_call(&mut self, _queue: u16, _call: EventFd) {}

    fn reset(&mut self) {
        *self.0.lock().unwrap() = None;
    }
}

/// Who took the guest's write to the doorbell.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Kernel,
    UserSpace,
}

struct Machine {
    vcpu: VcpuFd,
    mmio: Arc<Bus>,
    activation: Arc<Mutex<Option<Activation>>>,
    chip: Arc<Chip>,
    _pci: Pci,
    _vm: Arc<VmFd>,
    _slots: berth_vmm::memory::RamSlots,
}

/// A vCPU in real mode, and the device below a root port; `None`, and a note, without `/dev/kvm`.
fn machine() -> Option<Machine> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: no /dev/kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    vm.set_tss_address(0xfffb_d000).unwrap();
    let ram = GuestRam::new(&MemoryConfig::of(2 << 20)).unwrap();
    let slots = ram.register(&vm).unwrap();
    ram.memory().write_slice(&RING, GuestAddress(CODE)).unwrap();
    let chip = Chip::new(Arc::clone(&vm), Mode::Kernel).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mmio = Arc::new(Bus::new());
    let mut host = PciHost::new(PciContext {
        wiring: Arc::new(Arc::clone(&chip)),
        memory: ram.memory().clone(),
        mmio: Arc::clone(&mmio),
        ports: Arc::default(),
        mmio64_start: MMIO64,
    });
    let activation = Arc::<Mutex<Option<Activation>>>::default();
    let device = Box::new(Device(Arc::clone(&activation)));
    host.add_below_root_port("_disk0", device, 0x1b36).unwrap();
    Some(Machine {
        vcpu,
        mmio,
        activation,
        chip,
        _pci: host.finish().unwrap(),
        _vm: vm,
        _slots: slots,
    })
}

impl Machine {
    fn config_write(&self, bus: u64, device: u64, register: u64, data: &[u8]) {
        let at = ECAM_START + (bus << 20) + (device << 15) + register;
        assert!(self.mmio.write(at, data));
    }

    fn config_byte(&self, register: u64) -> u8 {
        let mut byte = [0];
        assert!(self.mmio.read(ECAM_START + (1 << 20) + register, &mut byte));
        byte[0]
    }

    /// Puts the device's BAR, and the bridge's window around it, into the 32-bit window.
    fn place(&self, base: u64) {
        let edge = (base >> 16) as u16 & 0xfff0;
        let window = [edge.to_le_bytes(), edge.to_le_bytes()].concat();
        self.config_write(0, 1, 0x20, &window);
        self.config_write(1, 0, 0x10, &(base as u32).to_le_bytes());
        self.config_write(1, 0, 0x14, &[0; 4]);
    }

    fn write(&self, at: u64, data: &[u8]) {
        assert!(self.mmio.write(at, data), "nobody at {at:#x}");
    }

    /// Writes MSI-X message control: bit 15 enables, bit 14 masks the function.
    fn set_msix(&self, control: u16) {
        let mut msix = self.config_byte(0x34);
        while self.config_byte(msix.into()) != 0x11 {
            msix = self.config_byte(u64::from(msix) + 1);
        }
        self.config_write(1, 0, u64::from(msix) + 2, &control.to_le_bytes());
    }

    /// Switches MSI-X on, with vector 1 unmasked, and drives the device to DRIVER_OK with queue 0.
    fn start(&self, bar: u64) {
        self.set_msix(0x8000);
        let entry = bar + TABLE + 16;
        for (offset, value) in [(0, 0xfee0_0000), (8, VECTOR), (12, 0)] {
            self.write(entry + offset, &value.to_le_bytes());
        }
        self.write(bar + 0x14, &[3]);
        self.write(bar + 0x08, &1_u32.to_le_bytes());
        self.write(bar + 0x0c, &1_u32.to_le_bytes());
        self.write(bar + 0x14, &[11]);
        self.write(bar + 0x1a, &1_u16.to_le_bytes());
        for (offset, address) in [(0x20, 0x1_0000_u64), (0x28, 0x2_0000), (0x30, 0x3_0000)] {
            self.write(bar + offset, &address.to_le_bytes());
        }
        self.write(bar + 0x1c, &1_u16.to_le_bytes());
        self.write(bar + 0x14, &[15]);
    }

    /// Runs the guest once around: it writes to `gpa`.
    fn ring(&mut self, gpa: u64) -> Taken {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        sregs.ds.base = gpa;
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        regs.rip = CODE;
        self.vcpu.set_regs(&regs).unwrap();
        let mut taken = Taken::Kernel;
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(0x80, _) => return taken,
                VcpuExit::MmioWrite(at, _) => {
                    assert_eq!(at, gpa);
                    taken = Taken::UserSpace;
                }
                exit => panic!("{exit:?}"),
            }
        }
    }

    fn kicked(&self) -> bool {
        let activation = self.activation.lock().unwrap();
        activation.as_ref().unwrap().queues[0].kick.read().is_ok()
    }

    /// Whether the vector waits in the local APIC; gives an irqfd time to get there.
    fn interrupt_arrives(&self) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(20) {
            let lapic = self.vcpu.get_lapic().unwrap();
            let request = lapic.regs[0x200 + 0x10 * (VECTOR as usize / 32)] as u8;
            if request >> (VECTOR % 32) & 1 == 1 {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    fn enable_apic(&self) {
        let mut lapic = self.vcpu.get_lapic().unwrap();
        (lapic.regs[0xf0], lapic.regs[0xf1]) = (-1, 1);
        self.vcpu.set_lapic(&lapic).unwrap();
    }
}

#[test]
fn a_doorbell_never_exits_and_moves_with_its_bar() {
    let Some(mut machine) = machine() else { return };
    let (first, second) = (MMIO32_START + 0x10_0000, MMIO32_START + 0x54_0000);
    machine.place(first);
    machine.start(first);
    assert_eq!(machine.ring(first + NOTIFY), Taken::Kernel);
    assert!(machine.kicked());
    // Queue 1's doorbell is another.
    assert_eq!(machine.ring(first + NOTIFY + 4), Taken::Kernel);
    assert!(!machine.kicked());
    assert_eq!(machine.ring(first + NOTIFY + 8), Taken::UserSpace);

    machine.place(second);
    assert_eq!(machine.ring(first + NOTIFY), Taken::UserSpace);
    assert!(!machine.kicked());
    assert_eq!(machine.ring(second + NOTIFY), Taken::Kernel);
    assert!(machine.kicked());

    // Memory decode off and on, in the bridge above.
    machine.config_write(0, 1, 0x04, &[4, 0]);
    assert_eq!(machine.ring(second + NOTIFY), Taken::UserSpace);
    machine.config_write(0, 1, 0x04, &[6, 0]);
    assert_eq!(machine.ring(second + NOTIFY), Taken::Kernel);
    assert!(machine.kicked());
}

#[test]
fn an_interrupt_of_a_queue_arrives_in_the_local_apic() {
    let Some(machine) = machine() else { return };
    machine.enable_apic();
    let bar = MMIO32_START + 0x10_0000;
    machine.place(bar);
    machine.start(bar);
    let activation = machine.activation.lock().unwrap().take().unwrap();
    activation.queues[0].call.write(1).unwrap();
    assert!(machine.interrupt_arrives());
}

#[test]
fn a_masked_interrupt_is_pending_and_arrives_when_it_is_unmasked() {
    let Some(machine) = machine() else { return };
    machine.enable_apic();
    let bar = MMIO32_START + 0x10_0000;
    machine.place(bar);
    machine.start(bar);
    let mask = bar + TABLE + 16 + 12;
    machine.write(mask, &1_u32.to_le_bytes());
    let activation = machine.activation.lock().unwrap().take().unwrap();
    activation.queues[0].call.write(1).unwrap();
    let pending = || {
        let mut bits = [0; 8];
        assert!(machine.mmio.read(bar + 0x4000, &mut bits));
        bits[0]
    };
    assert_eq!(pending(), 1 << 1);
    machine.write(mask, &0_u32.to_le_bytes());
    assert!(machine.interrupt_arrives());
    assert_eq!(pending(), 0);
}

#[test]
fn enabling_and_masking_all_vectors_costs_one_update_of_the_routes() {
    let Some(machine) = machine() else { return };
    let bar = MMIO32_START + 0x10_0000;
    machine.place(bar);
    for vector in 0..3 {
        let entry = bar + TABLE + 16 * u64::from(vector);
        for (offset, value) in [(0, 0xfee0_0000), (8, VECTOR + vector), (12, 0)] {
            machine.write(entry + offset, &value.to_le_bytes());
        }
    }
    let state = || {
        let counters = machine.chip.counters();
        (counters.routing_updates, counters.msis_attached)
    };
    let (before, none) = state();
    assert_eq!(none, 0);
    machine.set_msix(0x8000);
    assert_eq!(state(), (before + 1, 3));
    machine.set_msix(0xc000);
    assert_eq!(state(), (before + 1, 0));
    machine.set_msix(0x8000);
    assert_eq!(state(), (before + 1, 3), "the routes are there already");
}
