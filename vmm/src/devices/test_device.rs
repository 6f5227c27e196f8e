//! What test programs expect beside a PC: `--platform test-device=on`.
//!
//! The programs of kvm-unit-tests are made for QEMU's `pc-testdev` and `isa-debug-exit`; this is the same
//! to a guest. It is off by default: a guest may end the process with it.
//!
//! ```text
//!  0x00e0..0x00e3  four bytes that keep what was written, for accesses of any width
//!  0x00e8..0x00eb  the same four bytes
//!  0x00e4          written with a guest physical address: KVM forgets its mapping of that page
//!  0x00f4..0x00f7  written with V: the process ends with (V << 1) | 1, of which 8 bits are kept
//!  0x2000..0x2017  written: interrupt line N of 24 goes high (not 0) or low (0)
//!  0xff00_0000     64 KiB of memory-mapped I/O that keep what was written
//! ```
//!
//! Called on vCPU threads. Nothing waits for anything but a lock of this file, held for a copy, or one
//! ioctl (lines) or madvise (flush).

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{self, BusDevice};
use crate::cpu::Buses;
use crate::vm::{GuestEvent, GuestEvents};

/// Ports that keep four bytes; both ranges are the same four.
const ECHO_PORTS: [u64; 2] = [0xe0, 0xe8];
const ECHO_LEN: u64 = 4;
const FLUSH_PORT: u64 = 0xe4;
const EXIT_PORT: u64 = 0xf4;
const EXIT_LEN: u64 = 4;
const LINES_PORT: u64 = 0x2000;
/// One port for each pin of an IOAPIC.
const LINES: u64 = 24;
const IOMEM_START: u64 = 0xff00_0000;
const IOMEM_LEN: u64 = 0x1_0000;

/// Drives an interrupt line: its number, and whether it is high.
pub type DriveLine = Box<dyn Fn(u32, bool) + Send + Sync>;
/// Makes KVM forget its mapping of the page at a guest physical address.
pub type FlushPage = Box<dyn Fn(u64) + Send + Sync>;

/// Puts the device on the buses.
pub fn insert(
    buses: &Buses,
    drive: DriveLine,
    flush: FlushPage,
    events: GuestEvents,
) -> Result<(), bus::Error> {
    let echo = Arc::new(Echo::new(ECHO_LEN));
    for port in ECHO_PORTS {
        buses
            .pio
            .insert(port, ECHO_LEN, Arc::clone(&echo) as Arc<dyn BusDevice>)?;
    }
    buses.pio.insert(
        FLUSH_PORT,
        4,
        Arc::new(WriteOnly(move |_, address: u32| flush(address.into()))),
    )?;
    let end = move |_, value: u32| {
        events.send(GuestEvent::Exit(exit_code(value)));
    };
    buses
        .pio
        .insert(EXIT_PORT, EXIT_LEN, Arc::new(WriteOnly(end)))?;
    let lines = WriteOnly(move |line, level| drive(line, level != 0));
    buses.pio.insert(LINES_PORT, LINES, Arc::new(lines))?;
    let iomem = Arc::new(Echo::new(IOMEM_LEN));
    buses.mmio.insert(IOMEM_START, IOMEM_LEN, iomem)
}

/// The process's exit code for what the guest has written: never 0, as that is the answer of a guest that
/// powered off.
fn exit_code(value: u32) -> u8 {
    (value << 1 | 1) as u8
}

/// Bytes that keep what was written to them.
struct Echo(Mutex<Vec<u8>>);

impl Echo {
    fn new(len: u64) -> Self {
        Self(Mutex::new(vec![0; len as usize]))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Echo {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data
            .iter_mut()
            .zip(self.lock().iter().skip(offset as usize))
        {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (to, from) in self.lock().iter_mut().skip(offset as usize).zip(data) {
            *to = *from;
        }
    }
}

/// A port range whose writes do something and which reads as zeros: called with the offset and the value.
struct WriteOnly<F>(F);

impl<F: Fn(u32, u32) + Send + Sync> BusDevice for WriteOnly<F> {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut word = [0; 4];
        for (to, from) in word.iter_mut().zip(data) {
            *to = *from;
        }
        (self.0)(offset as u32, u32::from_le_bytes(word));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    struct Board {
        buses: Buses,
        lines: Receiver<(u32, bool)>,
        pages: Receiver<u64>,
        events: Receiver<GuestEvent>,
    }

    fn board() -> Board {
        let buses = Buses::default();
        let (to_lines, lines) = channel();
        let (to_pages, pages) = channel();
        let (to_events, events) = channel();
        insert(
            &buses,
            Box::new(move |line, high| to_lines.send((line, high)).unwrap()),
            Box::new(move |page| to_pages.send(page).unwrap()),
            GuestEvents::new(move |event| to_events.send(event).unwrap()),
        )
        .unwrap();
        Board {
            buses,
            lines,
            pages,
            events,
        }
    }

    #[test]
    fn a_value_ends_the_process_doubled_and_one_added() {
        for (value, code) in [(0u32, 1), (1, 3), (0x55, 0xab), (0x80, 1), (u32::MAX, 0xff)] {
            let board = board();
            board.buses.pio.write(EXIT_PORT, &value.to_le_bytes());
            assert_eq!(board.events.try_recv(), Ok(GuestEvent::Exit(code)));
        }
        let board = board();
        board.buses.pio.write(EXIT_PORT, &[2]);
        assert_eq!(board.events.try_recv(), Ok(GuestEvent::Exit(5)));
    }

    #[test]
    fn each_port_of_the_lines_is_one_line() {
        let board = board();
        for line in 0..24 {
            assert!(board.buses.pio.write(LINES_PORT + line, &[1]));
            assert!(board.buses.pio.write(LINES_PORT + line, &[0, 0, 0, 0]));
            assert_eq!(board.lines.try_recv(), Ok((line as u32, true)));
            assert_eq!(board.lines.try_recv(), Ok((line as u32, false)));
        }
        assert!(!board.buses.pio.write(LINES_PORT + 24, &[1]));
        assert!(board.lines.try_recv().is_err());
    }

    #[test]
    fn bytes_come_back_in_any_width() {
        let board = board();
        let (pio, mmio) = (&board.buses.pio, &board.buses.mmio);
        pio.write(0xe0, &0x1234_5678u32.to_le_bytes());
        pio.write(0xe2, &[0xaa]);
        let mut word = [0; 4];
        pio.read(0xe8, &mut word);
        assert_eq!(u32::from_le_bytes(word), 0x12aa_5678);
        let mut half = [0; 2];
        pio.read(0xe1, &mut half);
        assert_eq!(half, [0x56, 0xaa]);

        mmio.write(
            IOMEM_START + IOMEM_LEN - 8,
            &0x1122_3344_5566_7788u64.to_le_bytes(),
        );
        let mut byte = [0];
        mmio.read(IOMEM_START + IOMEM_LEN - 1, &mut byte);
        assert_eq!(byte, [0x11]);
        let mut past = [0xff; 8];
        mmio.read(IOMEM_START + IOMEM_LEN - 1, &mut past);
        assert_eq!(
            past,
            [0x11, 0, 0, 0, 0, 0, 0, 0],
            "behind the end there is nothing"
        );
        mmio.write(IOMEM_START + IOMEM_LEN - 1, &[1; 8]);
    }

    #[test]
    fn a_page_is_flushed_by_its_address() {
        let board = board();
        board
            .buses
            .pio
            .write(FLUSH_PORT, &0xdead_b123u32.to_le_bytes());
        assert_eq!(board.pages.try_recv(), Ok(0xdead_b123));
    }
}
