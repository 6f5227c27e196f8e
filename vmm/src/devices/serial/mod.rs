//! The first serial port (COM1, a 16550A) and the place on the host where its bytes go.
//!
//! ```text
//!  guest ─▶ port (vCPU thread) ─▶ output queue ─▶ thread serial-out ─▶ file, terminal, pty, socket
//!  guest ◀─ port ◀─ input queue ◀─ event loop ◀─ terminal, pty, socket
//! ```
//!
//! The port belongs to one boot of the machine; the queues and the host's end outlive a reboot.
//!
//! Output never holds a vCPU for long: the queue takes [`output::CAPACITY`] bytes, a full queue is waited
//! for [`output::PATIENCE`], and from then on bytes are dropped and counted until the reader moves again.
//! Where nobody can be reading (no client on the socket, no one at the pty) they are dropped at once.
//! Input is not lost: the event loop stops reading the host's end while the input queue is full.
//!
//! Reference: National Semiconductor PC16550D data sheet; the register model is vm-superio's.

pub mod host;
pub mod output;
pub mod port;
mod sink;
pub mod tty;

/// First port of COM1.
pub const PORT: u64 = 0x3f8;
/// Ports of a 16550.
pub const PORT_LEN: u64 = 8;
/// Interrupt pin of COM1.
pub const PIN: u32 = 4;
