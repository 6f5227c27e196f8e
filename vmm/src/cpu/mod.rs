//! vCPUs: identity, registers, threads.

pub mod cpuid;
pub mod msr;
pub mod regs;
pub mod topology;
