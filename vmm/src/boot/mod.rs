//! Kernels, initramfs, command line and ACPI tables in guest memory.
