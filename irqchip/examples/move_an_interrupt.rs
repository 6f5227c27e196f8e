//! The whole of a user: a machine of 64 KiB and one vCPU takes an interrupt; another is raised, and the machine is
//! saved before it takes it; a new one takes it.
//!
//! ```sh
//! cargo run -p berth-irqchip --example move_an_interrupt
//! ```
//!
//! ```text
//!  first machine:   raise ─▶ line 4 ─▶ PIC ─▶ vector 0x0c ─▶ the guest's handler writes port 0xe9
//!                   raise ─▶ line 4 ─▶ PIC      (saved here)
//!  second machine:                     PIC ─▶ vector 0x0c ─▶ the same
//! ```
#![allow(unsafe_code, reason = "a memory slot is a promise about a mapping")]

use std::error::Error;
use std::sync::Arc;

use berth_irqchip::{Chip, ChipState, Line, Mode, Trigger, VcpuState};
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: usize = 1 << 16;
/// Code and handler, and the interrupt vector table's entry for ISA interrupt 4.
const START: u64 = 0x1000;
const HANDLER: u64 = 0x1100;
const VECTOR_ENTRY: u64 = 4 * 0x0c;
const HANDLED: u16 = 0xe9;
const IDLE: u16 = 0xea;

/// The guest, in real mode: waits, and says so when an interrupt has woken it.
const WAITS: &[u8] = &[
    0xfb, 0xf4, 0xfa, // sti; hlt; cli
    0xe6, 0xea, // out 0xea, al
    0xeb, 0xf9, // jmp to the start
];
const HANDLES: &[u8] = &[
    0xe6, 0xe9, // out 0xe9, al
    0xb0, 0x20, 0xe6, 0x20, // mov al, 0x20; out 0x20, al: the end of the interrupt
    0xcf, // iret
];

struct Machine {
    vcpu: VcpuFd,
    serial: Line,
    chip: Arc<Chip>,
    memory: GuestMemoryMmap,
}

/// What another process, or another host, would be sent.
struct Saved {
    regs: kvm_regs,
    sregs: kvm_sregs,
    vcpu: Vec<u8>,
    chip: Vec<u8>,
    memory: Vec<u8>,
}

impl Machine {
    /// The chip before the vCPU; lines and vectors in the same order wherever it is made.
    fn new() -> Result<Self, Box<dyn Error>> {
        let vm = Arc::new(Kvm::new()?.create_vm()?);
        vm.set_tss_address(0xfffb_d000)?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?;
        let slot = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
            ..Default::default()
        };
        // SAFETY: the range is one whole mapping, which `Machine` drops after its vCPU.
        unsafe { vm.set_user_memory_region(slot) }?;
        let chip = Chip::new(Arc::clone(&vm), Mode::Kernel)?;
        let serial = chip.line(4, Trigger::Edge)?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Self {
            vcpu,
            serial,
            chip,
            memory,
        })
    }

    /// Loads the guest. The PICs are as firmware would leave them.
    fn boot(&mut self) -> Result<(), Box<dyn Error>> {
        self.memory.write_slice(WAITS, GuestAddress(START))?;
        self.memory.write_slice(HANDLES, GuestAddress(HANDLER))?;
        let entry = GuestAddress(VECTOR_ENTRY);
        self.memory.write_obj(HANDLER as u32, entry)?; // segment 0
        self.chip.initialise_pics()?;
        let mut sregs = self.vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs)?;
        let regs = kvm_regs {
            rip: START,
            rsp: 0x8000,
            rflags: 2,
            ..Default::default()
        };
        Ok(self.vcpu.set_regs(&regs)?)
    }

    /// Runs until the guest has taken an interrupt.
    fn take_interrupt(&mut self) -> Result<(), Box<dyn Error>> {
        let mut handled = false;
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(HANDLED, _) => handled = true,
                VcpuExit::IoOut(IDLE, _) if handled => return Ok(()),
                other => return Err(format!("an exit without reason: {other:?}").into()),
            }
        }
    }

    fn save(mut self) -> Result<Saved, Box<dyn Error>> {
        // KVM ends the guest's last instruction when it is called again.
        self.vcpu.set_kvm_immediate_exit(1);
        if let Ok(exit) = self.vcpu.run() {
            return Err(format!("the guest ran on: {exit:?}").into());
        }
        let held = self.chip.hold(&[])?;
        let vcpu = VcpuState::save(&self.vcpu)?;
        let chip = held.save(std::slice::from_ref(&vcpu))?;
        let mut memory = vec![0; MEMORY];
        self.memory.read_slice(&mut memory, GuestAddress(0))?;
        Ok(Saved {
            regs: self.vcpu.get_regs()?,
            sregs: self.vcpu.get_sregs()?,
            vcpu: vcpu.to_bytes(),
            chip: chip.to_bytes(),
            memory,
        })
    }

    fn restore(saved: &Saved) -> Result<Self, Box<dyn Error>> {
        let machine = Self::new()?;
        machine.memory.write_slice(&saved.memory, GuestAddress(0))?;
        machine.vcpu.set_sregs(&saved.sregs)?;
        machine.vcpu.set_regs(&saved.regs)?;
        VcpuState::from_bytes(&saved.vcpu)?.restore(&machine.vcpu)?;
        let chip = ChipState::from_bytes(&saved.chip)?;
        machine.chip.restore(&chip, &[])?;
        Ok(machine)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut first = Machine::new()?;
    first.boot()?;
    first.serial.raise()?;
    first.take_interrupt()?;
    println!("the first machine took its interrupt");
    first.serial.raise()?;
    let saved = first.save()?;
    println!("it was saved with another on its way, and is gone");
    let mut second = Machine::restore(&saved)?;
    second.take_interrupt()?;
    println!("the second machine took it");
    Ok(())
}
