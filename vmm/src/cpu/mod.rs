//! vCPUs: identity, registers, threads.
