//! A vCPU's registers as text, for the message with which a machine ends.

#![forbid(unsafe_code)]

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// The registers, several lines; or why they cannot be had.
pub(super) fn registers(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format(&regs, &sregs),
        (Err(error), _) | (_, Err(error)) => format!("registers cannot be read: {error}"),
    }
}

fn format(r: &kvm_regs, s: &kvm_sregs) -> String {
    let segment =
        |s: &kvm_segment| format!("{:04x} base={:x} limit={:x}", s.selector, s.base, s.limit);
    format!(
        "  rip={:016x} rsp={:016x} rflags={:08x}\n\
         \x20 rax={:016x} rbx={:016x} rcx={:016x} rdx={:016x}\n\
         \x20 rsi={:016x} rdi={:016x} rbp={:016x}\n\
         \x20 r8 ={:016x} r9 ={:016x} r10={:016x} r11={:016x}\n\
         \x20 r12={:016x} r13={:016x} r14={:016x} r15={:016x}\n\
         \x20 cr0={:x} cr2={:x} cr3={:x} cr4={:x} efer={:x}\n\
         \x20 cs={}; ss={}; ds={}\n\
         \x20 gdt={:x}+{:x} idt={:x}+{:x} tr={:04x}",
        r.rip,
        r.rsp,
        r.rflags,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer,
        segment(&s.cs),
        segment(&s.ss),
        segment(&s.ds),
        s.gdt.base,
        s.gdt.limit,
        s.idt.base,
        s.idt.limit,
        s.tr.selector,
    )
}
