//! The guest's only program: a monitor that executes one command at a time.
//!
//! ```text
//!  vCPU                                     its thread
//!   in al, COMMAND ───────────────────────▶ takes the result of the last command from the mailbox,
//!                                           waits for the next one, puts it into the mailbox
//!   does what the mailbox says ◀───────────
//! ```
//!
//! Interrupts are off but for the command that waits for one. An interrupt or exception stores its
//! vector and the time in the mailbox and ends the command; there is no way back to what was interrupted, so
//! each wait takes exactly one interrupt, and a fault is seen by the test that caused it.
//!
//! A vCPU starts in real mode on the page [`START`], vCPU 0 because the host puts it there and the
//! others by a startup IPI, and enters 32-bit protected mode with flat segments and no paging.
#![allow(unsafe_code, reason = "guest code in assembly, and its bounds")]

use std::arch::global_asm;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(super) const MEMORY_BYTES: usize = 1 << 20;
/// Gate stubs, 16 bytes a vector, then the monitor itself.
const STUBS: u64 = 0x1_0000;
/// Where a vCPU starts, in real mode. Its page number is the vector of a startup IPI.
pub(super) const START: u64 = 0x2_0000;
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

/// What the monitor can do. The assembly knows the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Write8 = 1,
    Write16 = 2,
    Write32 = 3,
    Read32 = 4,
    Out8 = 5,
    Out16 = 6,
    Out32 = 7,
    WriteMsr = 8,
    ReadMsr = 9,
    ReadTsc = 10,
    WaitForInterrupt = 11,
    /// As `WriteMsr`; the result is the TSC just before.
    TimedWriteMsr = 12,
    /// As `WaitForInterrupt`, and runs meanwhile.
    SpinForInterrupt = 13,
    In8 = 14,
    /// Call number `target` with its first argument `low`, two of 0 and the fourth `high`; the result is KVM's.
    Hypercall = 15,
}

pub(super) fn mailbox_of(cpu: u8) -> u64 {
    MAILBOXES + u64::from(cpu) * MAILBOX_STRIDE
}

/// Puts code and descriptor tables into a guest's memory.
pub(super) fn load(memory: &GuestMemoryMmap) {
    let (start, stubs) = code();
    memory.write_slice(start, GuestAddress(START)).unwrap();
    memory.write_slice(stubs, GuestAddress(STUBS)).unwrap();

    // Null, 0x08 code, 0x10 data: base 0, limit 4 GiB, 32 bits.
    let gdt = [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    memory.write_obj(gdt, GuestAddress(GDT)).unwrap();
    memory
        .write_obj(GDT << 16 | (8 * 3 - 1), GuestAddress(GDTR))
        .unwrap();
    memory
        .write_obj(IDT << 16 | (8 * 256 - 1), GuestAddress(IDTR))
        .unwrap();
    for vector in 0..256 {
        let stub = STUBS + vector * 16;
        // 32-bit interrupt gate, present, selector 0x08 (Intel SDM 3A, 7.11).
        let gate = (stub & 0xffff) | 0x0008 << 16 | 0x8e00 << 32 | (stub >> 16) << 48;
        memory
            .write_obj(gate, GuestAddress(IDT + vector * 8))
            .unwrap();
    }
}

/// The two pieces of guest code: what lies at [`START`], and what lies at [`STUBS`].
fn code() -> (&'static [u8], &'static [u8]) {
    unsafe extern "C" {
        static monitor_start: u8;
        static monitor_stubs: u8;
        static monitor_end: u8;
    }
    let between = |from: *const u8, to: *const u8| {
        // SAFETY: the three labels are in this order in one read-only section of this binary.
        unsafe { std::slice::from_raw_parts(from, to.offset_from_unsigned(from)) }
    };
    let [start, stubs, end] = [
        &raw const monitor_start,
        &raw const monitor_stubs,
        &raw const monitor_end,
    ];
    (between(start, stubs), between(stubs, end))
}

global_asm!(
    r#"
    .pushsection .rodata.monitor, "a", @progbits
    .balign 16
    .globl monitor_start, monitor_stubs, monitor_end

    .code16
monitor_start:
    cli
    xor  ax, ax
    mov  ds, ax
    lgdt [{gdtr}]
    lidt [{idtr}]
    mov  eax, cr0
    or   al, 1
    mov  cr0, eax
    .byte 0x66, 0xea                                    // jmp 0x08:monitor_entry
    .long {stubs} + monitor_entry - monitor_stubs
    .word 0x08

    .code32
    .balign 16
monitor_stubs:
    .rept 256
    call monitor_interrupted                            // pushes where it is, so which vector
    .balign 16
    .endr

monitor_interrupted:
    pop  eax
    shr  eax, 4
    movzx eax, al
    mov  [ebx + 20], eax
    rdtsc                                               // when
    mov  [ebx + 8], eax
    mov  [ebx + 12], edx
    mov  esp, ebx                                       // forget what was interrupted
    jmp  monitor_next

monitor_entry:
    mov  eax, 0x10
    mov  ds, eax
    mov  es, eax
    mov  ss, eax
    in   eax, {mailbox_port}
    mov  ebx, eax                                       // the mailbox, for good
    mov  esp, ebx

monitor_next:
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
    dec  esi
    jz   90f
    dec  esi
    jz   100f
    dec  esi
    jz   110f
    dec  esi
    jz   120f
    dec  esi
    jz   130f
    dec  esi
    jz   140f
    dec  esi
    jz   150f
    dec  esi
    jz   160f
    ud2

20: mov  byte ptr [ecx], al                             // Write8
    dec  edi
    jnz  20b
    jmp  monitor_next
30: mov  word ptr [ecx], ax                             // Write16
    dec  edi
    jnz  30b
    jmp  monitor_next
40: mov  dword ptr [ecx], eax                           // Write32
    dec  edi
    jnz  40b
    jmp  monitor_next
50: mov  eax, dword ptr [ecx]                           // Read32
    jmp  monitor_result
60: mov  edx, ecx                                       // Out8
61: out  dx, al
    dec  edi
    jnz  61b
    jmp  monitor_next
70: mov  edx, ecx                                       // Out16
71: out  dx, ax
    dec  edi
    jnz  71b
    jmp  monitor_next
80: mov  edx, ecx                                       // Out32
81: out  dx, eax
    dec  edi
    jnz  81b
    jmp  monitor_next
90: wrmsr                                               // WriteMsr
    jmp  monitor_next
100:
    rdmsr                                               // ReadMsr
    jmp  monitor_result
110:
    rdtsc                                               // ReadTsc
    jmp  monitor_result
120:
    sti                                                 // WaitForInterrupt
121:
    hlt
    jmp  121b

130:
    mov  esi, eax                                       // TimedWriteMsr
    mov  edi, edx
    rdtsc
    mov  [ebx + 8], eax
    mov  [ebx + 12], edx
    mov  eax, esi
    mov  edx, edi
    wrmsr
    jmp  monitor_next

140:
    sti                                                 // SpinForInterrupt
141:
    pause
    jmp  141b
150: mov  edx, ecx                                      // In8
    in   al, dx
    movzx eax, al
    jmp  monitor_result
160:
    push ebx                                            // Hypercall
    mov  ebx, eax
    mov  eax, ecx
    mov  esi, edx
    xor  ecx, ecx
    xor  edx, edx
    vmcall                                              // KVM makes it AMD's where it must
    pop  ebx

monitor_result:
    mov  [ebx + 8], eax
    mov  [ebx + 12], edx
    jmp  monitor_next

monitor_end:
    .code64
    .popsection
    "#,
    stubs = const STUBS,
    gdtr = const GDTR,
    idtr = const IDTR,
    command_port = const COMMAND_PORT,
    mailbox_port = const MAILBOX_PORT,
);
