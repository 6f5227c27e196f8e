//! Kernels, initramfs, command line and ACPI tables in guest memory.
//!
//! ```text
//!   acpi::build ──▶ rsdp ─┐
//!   kernel::load ─────────┼─▶ Handover ─┬─ zero_page ─▶ Entry::Linux64 ─┐
//!   initramfs, cmdline ───┘             ├─ pvh ───────▶ Entry::Pvh ─────┼─▶ cpu::regs::setup
//!                                       └─ multiboot ─▶ Entry::Multiboot┘
//! ```
//!
//! Everything here runs in the main thread before the vCPUs start, and again when the guest reboots.
//! Files are the operator's but are checked as if they were not: sizes and offsets in them are compared
//! with the file and with guest memory before use. Where things lie is said by
//! [`crate::memory::layout`]; which entries there are, and who keeps KASLR, by docs/boot.md.

pub mod acpi;
pub mod bzimage;
pub mod cmdline;
pub mod decompress;
pub mod elf;
pub mod initramfs;
pub mod kaslr;
pub mod kernel;
pub mod lz4;
pub mod memmap;
pub mod multiboot;
pub mod pvh;
#[cfg(test)]
mod testing;
pub mod zero_page;

use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryError};

use crate::config::PayloadConfig;
use crate::memory::GuestRam;
use initramfs::Initramfs;
use kernel::EntryPoint;

/// What a path names that is no file to load, asked before it is opened: the sandbox lets nobody open a directory,
/// and a permission that is denied would say less.
fn instead_of_a_file(path: &Path) -> Option<&'static str> {
    let kind = std::fs::metadata(path).ok()?.file_type();
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => None,
        (_, true) => Some("a directory"),
        _ => Some("not a regular file"),
    }
}

/// How the boot processor starts; for [`crate::cpu::regs::setup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, start info in `ebx`.
    Pvh {
        /// First instruction.
        rip: GuestAddress,
        /// `hvm_start_info`.
        start_info: GuestAddress,
    },
    /// 32-bit protected mode without paging, multiboot's magic in `eax`, information in `ebx`.
    Multiboot {
        /// First instruction.
        rip: GuestAddress,
        /// Multiboot information.
        info: GuestAddress,
    },
    /// 64-bit mode with low memory mapped one to one, zero page in `rsi`.
    Linux64 {
        /// First instruction.
        rip: GuestAddress,
        /// `struct boot_params`.
        zero_page: GuestAddress,
    },
}

/// Why there is nothing to start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] initramfs::Error),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
    /// The page that tells the kernel about the rest.
    #[error("cannot write the kernel's boot parameters to guest memory")]
    Parameters(#[source] GuestMemoryError),
}

/// What every kernel is told, whichever way it is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handover {
    /// Command line with its NUL.
    pub cmdline: GuestAddress,
    /// First root file system.
    pub initramfs: Option<Initramfs>,
    /// ACPI root pointer.
    pub rsdp: GuestAddress,
}

/// Puts kernel, initramfs, command line and boot parameters into guest memory. What was there before
/// may be anything: what the kernel expects to be zero is made zero. `rsdp` comes from ACPI.
pub fn load(ram: &GuestRam, payload: &PayloadConfig, rsdp: GuestAddress) -> Result<Entry, Error> {
    let kernel = kernel::load(ram, payload)?;
    let initramfs = payload
        .initramfs
        .as_deref()
        .map(|path| initramfs::load(ram, path, kernel.end, kernel.initrd_addr_max()))
        .transpose()?;
    let cmdline = kernel.cmdline(payload);
    let handover = Handover {
        cmdline: cmdline::write(ram, &cmdline, kernel.cmdline_max())?,
        initramfs,
        rsdp,
    };
    tracing::debug!(entry = ?kernel.entry, end = %format_args!("{:#x}", kernel.end.0), ?initramfs, "kernel loaded");
    match kernel.entry {
        EntryPoint::Pvh(rip) => pvh::write(ram, &handover)
            .map(|start_info| Entry::Pvh { rip, start_info })
            .map_err(Error::Parameters),
        EntryPoint::Multiboot(rip) => multiboot::write(ram, &handover)
            .map(|info| Entry::Multiboot { rip, info })
            .map_err(Error::Parameters),
        EntryPoint::Linux64(rip) => zero_page::write(ram, &handover, &kernel)
            .map(|zero_page| Entry::Linux64 { rip, zero_page })
            .map_err(Error::Parameters),
    }
}
