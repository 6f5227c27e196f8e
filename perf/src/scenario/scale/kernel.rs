//! A kernel of a few bytes: it says that it is up, by the serial port, and halts for ever.
//!
//! An ELF file of one segment, entered by PVH (XEN_ELFNOTE_PHYS32_ENTRY) in 32-bit mode with flat segments.
#![forbid(unsafe_code)]

/// What it says.
pub(super) const UP: &str = "up\n";
const LOAD_AT: u32 = 0x10_0000;
const CODE_AT: u64 = 0x1000;
const NOTE_AT: u64 = 0x200;
const COM1: u16 = 0x3f8;

/// The whole file.
pub(super) fn elf() -> Vec<u8> {
    let (code, note) = (code(), note());
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    for word in [u64::from(LOAD_AT), 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes()); // sizes and counts
    }
    segment(&mut elf, 1, CODE_AT, u64::from(LOAD_AT), code.len());
    segment(&mut elf, 4, NOTE_AT, 0, note.len());
    elf.resize(NOTE_AT as usize, 0);
    elf.extend(note);
    elf.resize(CODE_AT as usize, 0);
    elf.extend(code);
    elf
}

fn segment(elf: &mut Vec<u8>, kind: u32, offset: u64, address: u64, len: usize) {
    elf.extend(kind.to_le_bytes());
    elf.extend(7u32.to_le_bytes());
    for word in [offset, address, address, len as u64, len as u64, 4] {
        elf.extend(word.to_le_bytes());
    }
}

fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD_AT.to_le_bytes());
    note
}

fn code() -> Vec<u8> {
    let [low, high] = COM1.to_le_bytes();
    let mut code = vec![0x66, 0xba, low, high]; // mov dx, COM1
    for byte in UP.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code.extend([0xfa, 0xf4, 0xeb, 0xfd]); // cli; hlt; jmp to the hlt
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_note_and_code_are_where_the_headers_say() {
        let elf = elf();
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
        assert_eq!(word(24), u64::from(LOAD_AT));
        // Program header 0: offset, address; 1: the note.
        assert_eq!((word(64 + 8), word(64 + 16)), (CODE_AT, u64::from(LOAD_AT)));
        assert_eq!(word(64 + 56 + 8), NOTE_AT);
        assert_eq!(&elf[NOTE_AT as usize + 12..][..4], b"Xen\0");
        assert!(elf[CODE_AT as usize..].ends_with(&[0xf4, 0xeb, 0xfd]));
    }
}
