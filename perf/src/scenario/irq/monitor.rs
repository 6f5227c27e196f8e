//! The guest's only program: it does one thing at a time, and says so by a read of a port.
//!
//! ```text
//!  vCPU                                     its thread
//!   in al, COMMAND ───────────────────────▶ takes the clock and the mailbox, waits for the next command, puts
//!                                           it into the mailbox, takes the clock
//!   does what the mailbox says ◀───────────
//! ```
//!
//! Interrupts are off but for the command that waits for one. An interrupt or exception stores its vector and
//! the TSC in the mailbox and ends the command; nothing goes back to what was interrupted. So each wait takes
//! exactly one interrupt, and a fault is an answer with a vector that nobody asked for.
//!
//! vCPU 0 starts in real mode at [`START`] because the host puts it there, the other by a startup IPI; both
//! enter 32-bit protected mode with flat segments and no paging (Intel SDM 3A, 11.9.1, 12.4).
#![allow(unsafe_code, reason = "guest code in assembly, and its bounds")]

use std::arch::global_asm;

use anyhow::Result;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(super) const MEMORY_BYTES: usize = 1 << 20;
/// Gate stubs, 16 bytes a vector, then the monitor itself.
const STUBS: u64 = 0x1_0000;
/// Where a vCPU starts, in real mode. Its page number is the vector of a startup IPI.
pub(super) const START: u64 = 0x2_0000;
/// Memory that nobody uses.
pub(super) const SCRATCH: u32 = 0x8_0000;
/// Operands of LGDT and LIDT: limit and base.
const GDTR: u64 = 0x500;
const IDTR: u64 = 0x508;
const GDT: u64 = 0x600;
const IDT: u64 = 0x1000;
/// A vCPU's stack ends where its mailbox begins.
const MAILBOXES: u64 = 0x4_0000;
const MAILBOX_STRIDE: u64 = 0x1000;

/// Read when the vCPU is ready for a command.
pub(super) const COMMAND_PORT: u16 = 0xe0;
/// Read once at the start: the address of the vCPU's mailbox.
pub(super) const MAILBOX_PORT: u16 = 0xe4;
/// Writes here leave the kernel and come to nothing.
pub(super) const EXIT_PORT: u16 = 0xe8;
/// The same for memory.
pub(super) const EXIT_GPA: u32 = 0xd200_0000;
/// `Mailbox::vector` if nothing interrupted the command.
pub(super) const NO_VECTOR: u32 = !0;

/// A command for the monitor, and its result. The assembly knows the offsets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mailbox {
    /// An [`Operation`].
    pub(super) operation: u32,
    /// Address, port or MSR.
    pub(super) target: u32,
    /// Value to write, or that was read.
    pub(super) low: u32,
    pub(super) high: u32,
    /// How often to do it, at least once.
    pub(super) count: u32,
    /// What interrupted the command.
    pub(super) vector: u32,
}

// SAFETY: `repr(C)` of six u32: no padding, every bit pattern is valid.
unsafe impl vm_memory::ByteValued for Mailbox {}

impl Mailbox {
    /// The 64-bit result.
    pub(super) fn value(&self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

/// What the monitor can do. The assembly knows the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Write32 = 1,
    Out16 = 2,
    WriteMsr = 3,
    ReadMsr = 4,
    ReadTsc = 5,
    WaitForInterrupt = 6,
    /// As `WriteMsr`; the result is the TSC just before.
    TimedWriteMsr = 7,
}

pub(super) fn mailbox_of(cpu: u8) -> u64 {
    MAILBOXES + u64::from(cpu) * MAILBOX_STRIDE
}

/// Puts code and descriptor tables into a guest's memory.
pub(super) fn load(memory: &GuestMemoryMmap) -> Result<()> {
    let (start, stubs) = code();
    memory.write_slice(start, GuestAddress(START))?;
    memory.write_slice(stubs, GuestAddress(STUBS))?;
    // Null, 0x08 code, 0x10 data: base 0, limit 4 GiB, 32 bits.
    let gdt = [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    memory.write_obj(gdt, GuestAddress(GDT))?;
    memory.write_obj(GDT << 16 | (8 * 3 - 1), GuestAddress(GDTR))?;
    memory.write_obj(IDT << 16 | (8 * 256 - 1), GuestAddress(IDTR))?;
    for vector in 0..256 {
        let stub = STUBS + vector * 16;
        // 32-bit interrupt gate, present, selector 0x08 (Intel SDM 3A, 7.11).
        let gate = (stub & 0xffff) | 0x0008 << 16 | 0x8e00 << 32 | (stub >> 16) << 48;
        memory.write_obj(gate, GuestAddress(IDT + vector * 8))?;
    }
    Ok(())
}

/// The two pieces of guest code: what lies at [`START`], and what lies at [`STUBS`].
fn code() -> (&'static [u8], &'static [u8]) {
    unsafe extern "C" {
        static perf_monitor_start: u8;
        static perf_monitor_stubs: u8;
        static perf_monitor_end: u8;
    }
    let between = |from: *const u8, to: *const u8| {
        // SAFETY: the three labels are in this order in one read-only section of this binary.
        unsafe { std::slice::from_raw_parts(from, to.offset_from_unsigned(from)) }
    };
    let [start, stubs, end] = [
        &raw const perf_monitor_start,
        &raw const perf_monitor_stubs,
        &raw const perf_monitor_end,
    ];
    (between(start, stubs), between(stubs, end))
}

global_asm!(
    r#"
    .pushsection .rodata.perf_monitor, "a", @progbits
    .balign 16
    .globl perf_monitor_start, perf_monitor_stubs, perf_monitor_end

    .code16
perf_monitor_start:
    cli
    xor  ax, ax
    mov  ds, ax
    lgdt [{gdtr}]
    lidt [{idtr}]
    mov  eax, cr0
    or   al, 1
    mov  cr0, eax
    .byte 0x66, 0xea                                    // jmp 0x08:perf_monitor_entry
    .long {stubs} + perf_monitor_entry - perf_monitor_stubs
    .word 0x08

    .code32
    .balign 16
perf_monitor_stubs:
    .rept 256
    call perf_monitor_interrupted                       // pushes where it is, so which vector
    .balign 16
    .endr

perf_monitor_interrupted:
    pop  eax
    shr  eax, 4
    movzx eax, al
    mov  [ebx + 20], eax
    rdtsc                                               // when
    mov  [ebx + 8], eax
    mov  [ebx + 12], edx
    mov  esp, ebx                                       // forget what was interrupted
    jmp  perf_monitor_next

perf_monitor_entry:
    mov  eax, 0x10
    mov  ds, eax
    mov  es, eax
    mov  ss, eax
    in   eax, {mailbox_port}
    mov  ebx, eax                                       // the mailbox, for good
    mov  esp, ebx

perf_monitor_next:
    in   al, {command_port}
    mov  ecx, [ebx + 4]                                 // target
    mov  eax, [ebx + 8]                                 // low
    mov  edx, [ebx + 12]                                // high
    mov  edi, [ebx + 16]                                // count
    mov  esi, [ebx]                                     // operation
    dec  esi
    jz   20f
    dec  esi
    jz   30f
    dec  esi
    jz   40f
    dec  esi
    jz   50f
    dec  esi
    jz   60f
    dec  esi
    jz   70f
    dec  esi
    jz   80f
    ud2

20: mov  dword ptr [ecx], eax                           // Write32
    dec  edi
    jnz  20b
    jmp  perf_monitor_next
30: mov  edx, ecx                                       // Out16
31: out  dx, ax
    dec  edi
    jnz  31b
    jmp  perf_monitor_next
40: wrmsr                                               // WriteMsr
    jmp  perf_monitor_next
50: rdmsr                                               // ReadMsr
    jmp  perf_monitor_result
60: rdtsc                                               // ReadTsc
    jmp  perf_monitor_result
70: sti                                                 // WaitForInterrupt
71: hlt
    jmp  71b
80: mov  esi, eax                                       // TimedWriteMsr
    mov  edi, edx
    rdtsc
    mov  [ebx + 8], eax
    mov  [ebx + 12], edx
    mov  eax, esi
    mov  edx, edi
    wrmsr
    jmp  perf_monitor_next

perf_monitor_result:
    mov  [ebx + 8], eax
    mov  [ebx + 12], edx
    jmp  perf_monitor_next

perf_monitor_end:
    .code64
    .popsection
    "#,
    stubs = const STUBS,
    gdtr = const GDTR,
    idtr = const IDTR,
    command_port = const COMMAND_PORT,
    mailbox_port = const MAILBOX_PORT,
);
