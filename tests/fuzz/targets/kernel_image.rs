//! A kernel file: bzImage header, decompressors, ELF loader, relocations, multiboot images. The first byte picks the entry.
#![no_main]

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::LazyLock;

use berth_vmm::boot::kernel;
use berth_vmm::config::{KernelEntry, MemoryConfig, PayloadConfig};
use berth_vmm::memory::GuestRam;
use libfuzzer_sys::fuzz_target;

static RAM: LazyLock<GuestRam> = LazyLock::new(|| {
    GuestRam::new(&MemoryConfig::of(4 << 20)).expect("4 MiB of guest memory")
});

fuzz_target!(|data: &[u8]| {
    let Some((&first, image)) = data.split_first() else {
        return;
    };
    let entry = match first % 5 {
        0 => KernelEntry::Auto,
        1 => KernelEntry::Pvh,
        2 => KernelEntry::Linux64,
        3 => KernelEntry::BzImage,
        _ => KernelEntry::Multiboot,
    };
    let payload = PayloadConfig {
        kernel: PathBuf::from("kernel"),
        entry,
        initramfs: None,
        cmdline: String::new(),
    };
    let len = image.len() as u64;
    match kernel::load_from(&RAM, &payload, &mut Cursor::new(image), len) {
        Ok(kernel) => assert!(kernel.end.0 <= RAM.size_bytes()),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
