//! vCPUs: identity, registers, threads.
//!
//! ```text
//!   Vcpus ── pause, resume ─▶ Gate ◀── pass ── thread vcpuN ── KVM_RUN ─▶ exits ─▶ Bus
//!     └──── kick (immediate_exit, signal) ───────────▲              └─▶ GuestEvents (a dead vCPU)
//! ```

pub mod affinity;
mod counters;
pub mod cpuid;
mod exits;
pub mod features;
mod gate;
pub mod hypervisor;
pub mod msr;
mod perf;
pub mod regs;
mod stats;
pub mod topology;
mod vcpu;

pub use exits::Buses;
pub use perf::counts_doorbells;
pub use vcpu::{Error, Vcpus};
