//! What a vCPU's exits come to: accesses go to the buses, the rest ends the machine.
#![expect(
    unsafe_code,
    reason = "the size and count of a port access stand in a union of kvm_run"
)]

use std::io;
use std::sync::Arc;

use berth_irqchip::Chip;
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::counters::{ExitCounters, Reason};
use crate::bus::Bus;
use crate::memory::layout::{HIGH_RAM_START, MMIO32_LEN, MMIO32_START};

/// The two address spaces of a machine, and the chip whose interrupts end.
#[derive(Clone, Default)]
pub struct Buses {
    /// Ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where the end of a level interrupt goes, if this process has the IOAPIC.
    pub irqchip: Option<Arc<Chip>>,
}

/// What to do after an exit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Enter the guest again.
    Enter,
    /// Look whether someone wants this vCPU to stop.
    Gate,
    /// The guest is dead; the text names the exit.
    Dead(String),
}

/// Runs the guest until its next exit and answers that.
pub(super) fn run_once(fd: &mut VcpuFd, buses: &Buses, counters: &ExitCounters) -> Next {
    let dead = match fd.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => return port_access(fd, buses, counters),
        Ok(VcpuExit::MmioRead(address, data)) => {
            counters.count(Reason::MmioRead);
            return answered(buses.mmio.read(address, data), counters);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            counters.count(Reason::MmioWrite);
            if may_be_bar(address) {
                counters.count(Reason::BarWrite);
            }
            return answered(buses.mmio.write(address, data), counters);
        }
        Ok(VcpuExit::IoapicEoi(vector)) => {
            counters.count(Reason::IoapicEoi);
            if let Some(chip) = &buses.irqchip {
                chip.end_of_interrupt(vector);
            }
            return Next::Enter;
        }
        Ok(VcpuExit::Intr) => {
            counters.count(Reason::Interrupted);
            return Next::Gate;
        }
        Err(error) => match error.errno() {
            libc::EINTR => {
                counters.count(Reason::Interrupted);
                return Next::Gate;
            }
            // An application processor that left its wait for SIPI; nothing happened.
            libc::EAGAIN => return Next::Enter,
            _ => format!("KVM_RUN failed: {}", io::Error::from(error)),
        },
        Ok(VcpuExit::Shutdown) => "KVM_EXIT_SHUTDOWN (triple fault)".to_owned(),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            format!("KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on host CPU {cpu}")
        }
        Ok(VcpuExit::InternalError) => String::new(),
        Ok(VcpuExit::SystemEvent(kind, data)) => {
            format!("KVM_EXIT_SYSTEM_EVENT type {kind} data {data:x?}")
        }
        Ok(exit) => format!("an exit that this VMM does not expect, {exit:?}"),
    };
    counters.count(Reason::Other);
    Next::Dead(if dead.is_empty() {
        internal_error(fd)
    } else {
        dead
    })
}

/// Whether a BAR can be there: in the windows of the PCI host bridge.
pub(super) fn may_be_bar(address: u64) -> bool {
    address >= HIGH_RAM_START || (MMIO32_START..MMIO32_START + MMIO32_LEN).contains(&address)
}

fn answered(answered: bool, counters: &ExitCounters) -> Next {
    if !answered {
        counters.count(Reason::Unclaimed);
    }
    Next::Enter
}

/// A string instruction (`rep outsb`) is one exit with several elements, each an access of its own.
fn port_access(fd: &mut VcpuFd, buses: &Buses, counters: &ExitCounters) -> Next {
    let run = fd.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return Next::Dead(format!("exit reason {} for a port access", run.exit_reason));
    }
    // SAFETY: the exit reason says that the union holds `io`.
    let access = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(access.size).max(1);
    let len = size * access.count as usize;
    // SAFETY: KVM puts the data `data_offset` bytes into the vCPU's mapping, which is larger than the
    // structure by a page for it, and the vCPU does not run, so nothing else touches it (KVM api.rst,
    // "KVM_EXIT_IO").
    let data = unsafe {
        let start = std::ptr::from_mut(run)
            .cast::<u8>()
            .add(access.data_offset as usize);
        std::slice::from_raw_parts_mut(start, len)
    };
    let port = u64::from(access.port);
    let mut all_answered = true;
    if u32::from(access.direction) == KVM_EXIT_IO_IN {
        counters.count(Reason::IoIn);
        for element in data.chunks_mut(size) {
            all_answered &= buses.pio.read(port, element);
        }
    } else {
        counters.count(Reason::IoOut);
        for element in data.chunks(size) {
            all_answered &= buses.pio.write(port, element);
        }
    }
    answered(all_answered, counters)
}

fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return "KVM_EXIT_INTERNAL_ERROR".to_owned();
    }
    // SAFETY: the exit reason says that the union holds `internal`.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let kind = match internal.suberror {
        1 => "emulation failed",
        2 => "simultaneous exceptions",
        3 => "an exit while an event was delivered",
        4 => "an exit that KVM does not expect",
        _ => "unknown",
    };
    let count = (internal.ndata as usize).min(internal.data.len());
    format!(
        "KVM_EXIT_INTERNAL_ERROR suberror {} ({kind}) data {:x?}",
        internal.suberror,
        &internal.data[..count]
    )
}
