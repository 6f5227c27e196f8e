//! The 16550 as the guest sees it, and the queue of input on its way there.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use super::output::Output;
use crate::bus::BusDevice;

/// Bytes of input that wait for the guest, at most.
pub const INPUT_CAPACITY: usize = 64 << 10;
/// Bytes of the receive FIFO.
const FIFO_SIZE: usize = 64;
/// Offset of the data register (with DLAB off).
const DATA: u64 = 0;
/// Offset of the interrupt enable register (with DLAB off).
const INTERRUPT_ENABLE: u64 = 1;
/// Offset of the interrupt identification register.
const INTERRUPT_ID: u64 = 2;
/// Offset of the line control register.
const LINE_CONTROL: u64 = 3;
/// Offset of the modem control register.
const MODEM_CONTROL: u64 = 4;
/// Line control: the first two registers are the divisor.
const DLAB: u8 = 1 << 7;
/// Interrupt enable: received data.
const IER_RDA: u8 = 1 << 0;
/// Interrupt identification: none is pending.
const IIR_NONE: u8 = 1 << 0;
/// Interrupt identification: the transmitter is empty.
const IIR_THRE: u8 = 1 << 1;
/// Interrupt identification: received data.
const IIR_RDA: u8 = 1 << 2;
/// Modem control: request to send. Without it the other side must keep its bytes.
const RTS: u8 = 1 << 1;

/// Input from the host, in order, and the way to tell the event loop that there is room again.
pub struct Input {
    /// Locked after the port's registers where both are.
    queue: Mutex<VecDeque<u8>>,
    room: EventFd,
}

impl Input {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// How many bytes [`push`](Self::push) takes now.
    pub fn room(&self) -> usize {
        INPUT_CAPACITY - self.lock().len().min(INPUT_CAPACITY)
    }

    /// Adds bytes that came from the host; no more than [`room`](Self::room).
    pub fn push(&self, bytes: &[u8]) {
        self.lock().extend(bytes);
    }

    /// Signalled when a queue that was full has room.
    pub fn room_event(&self) -> &EventFd {
        &self.room
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Raises the port's interrupt, an edge.
pub struct RaiseInterrupt(pub Box<dyn Fn() -> io::Result<()> + Send>);

impl Trigger for RaiseInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)()
    }
}

struct Uart {
    registers: Serial<RaiseInterrupt, NoEvents, Output>,
    interrupt_enable: u8,
    line_control: u8,
    /// Whether the guest has ever raised RTS; a guest that never does has no flow control.
    uses_rts: bool,
    rts: bool,
}

impl Uart {
    /// Received data is a condition, not an event: it is reported until all of it is read (data sheet,
    /// table III), whereas the model forgets it with the first read of this register or of a byte. A
    /// driver that takes a part, as Linux does with more than 256 bytes, would not look for the rest.
    fn interrupt_id(&mut self) -> u8 {
        let value = self.registers.read(INTERRUPT_ID as u8);
        let data = self.registers.fifo_capacity() < FIFO_SIZE;
        if !data || self.interrupt_enable & IER_RDA == 0 {
            return value;
        }
        if value & (IIR_NONE | IIR_THRE) == IIR_THRE {
            // Data has priority; this makes the model remember the transmitter.
            let enable = self.interrupt_enable;
            self.write(INTERRUPT_ENABLE, enable);
        }
        value & !(IIR_NONE | IIR_THRE) | IIR_RDA
    }

    fn write(&mut self, offset: u64, byte: u8) {
        match offset {
            INTERRUPT_ENABLE if self.line_control & DLAB == 0 => self.interrupt_enable = byte,
            LINE_CONTROL => self.line_control = byte,
            MODEM_CONTROL => {
                self.rts = byte & RTS != 0;
                self.uses_rts |= self.rts;
            }
            _ => {}
        }
        if let Err(error) = self.registers.write(offset as u8, byte) {
            tracing::debug!(?error, "serial port write");
        }
    }
}

/// The port.
pub struct SerialPort {
    /// Protects the registers; never held while a reader is waited for.
    uart: Mutex<Uart>,
    output: Output,
    input: Arc<Input>,
}

impl SerialPort {
    /// A port whose output goes to `output` and whose input comes from `input`.
    pub fn new(interrupt: RaiseInterrupt, output: Output, input: Arc<Input>) -> Self {
        Self {
            output: output.clone(),
            uart: Mutex::new(Uart {
                registers: Serial::new(interrupt, output),
                interrupt_enable: 0,
                line_control: 0,
                uses_rts: false,
                rts: false,
            }),
            input,
        }
    }

    /// Moves waiting input into the receive FIFO; to be called after [`Input::push`].
    pub fn receive(&self) {
        self.fill(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, uart: &mut Uart) {
        if uart.uses_rts && !uart.rts {
            return;
        }
        let mut queue = self.input.lock();
        let was_full = queue.len() >= INPUT_CAPACITY;
        while uart.registers.fifo_capacity() > 0 && !queue.is_empty() {
            let (front, _) = queue.as_slices();
            match uart.registers.enqueue_raw_bytes(front) {
                // In loopback the line is cut: the bytes wait.
                Ok(0) | Err(_) => break,
                Ok(taken) => drop(queue.drain(..taken)),
            }
        }
        if was_full
            && queue.len() < INPUT_CAPACITY
            && let Err(error) = self.input.room.write(1)
        {
            tracing::warn!(%error, "cannot ask for more serial input");
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        let mut uart = self.lock();
        *byte = if offset == INTERRUPT_ID {
            uart.interrupt_id()
        } else {
            uart.registers.read(offset as u8)
        };
        if offset == DATA {
            self.fill(&mut uart);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[byte] = data else { return };
        if offset == DATA {
            self.output.wait_for_room();
        }
        let mut uart = self.lock();
        uart.write(offset, byte);
        if offset != DATA {
            self.fill(&mut uart);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const IER: u64 = 1;
    const IIR: u64 = 2;
    const LSR: u64 = 5;

    struct Line {
        port: SerialPort,
        input: Arc<Input>,
        interrupts: Arc<AtomicUsize>,
    }

    fn line() -> Line {
        let interrupts = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&interrupts);
        let raise = move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let input = Arc::new(Input::new().unwrap());
        Line {
            port: SerialPort::new(
                RaiseInterrupt(Box::new(raise)),
                Output::unread(),
                Arc::clone(&input),
            ),
            input,
            interrupts,
        }
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    }

    /// Takes all that the port offers, as a driver does.
    fn drain(port: &SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(port, LSR) & 1 != 0 {
            bytes.push(read(port, DATA));
        }
        bytes
    }

    #[test]
    fn a_megabyte_pasted_arrives_whole_and_in_order() {
        let line = line();
        let sent: Vec<u8> = (0..1usize << 20).map(|at| (at * 31 % 251) as u8).collect();
        let mut rest = sent.as_slice();
        let mut received = Vec::new();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(line.input.room().min(rest.len()));
            line.input.push(now);
            line.port.receive();
            rest = later;
            received.extend(drain(&line.port));
        }
        assert_eq!(received, sent);
    }

    #[test]
    fn a_full_queue_says_when_it_has_room() {
        let line = line();
        line.port.write(MODEM_CONTROL, &[RTS]);
        line.port.write(MODEM_CONTROL, &[0]);
        line.input.push(&vec![7; INPUT_CAPACITY]);
        line.port.receive();
        assert_eq!(line.input.room(), 0, "the guest holds the sender by RTS");
        assert!(line.input.room_event().read().is_err());
        line.port.write(MODEM_CONTROL, &[RTS]);
        assert!(line.input.room() > 0);
        assert!(line.input.room_event().read().is_ok());
    }

    #[test]
    fn input_interrupts_a_driver_that_wants_it() {
        let line = line();
        line.port.write(IER, &[1]);
        line.input.push(b"x");
        line.port.receive();
        assert_eq!(line.interrupts.load(Ordering::Relaxed), 1);
        assert_eq!(drain(&line.port), b"x");
    }

    /// As Linux's driver: at most 256 bytes, then the identification register again.
    fn handle_interrupt(port: &SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(port, IIR) & IIR_NONE == 0 {
            for _ in 0..256 {
                if read(port, LSR) & 1 == 0 {
                    break;
                }
                bytes.push(read(port, DATA));
            }
        }
        bytes
    }

    #[test]
    fn a_driver_that_takes_a_part_finds_the_rest() {
        for len in 1..1000 {
            let line = line();
            line.port.write(IER, &[IER_RDA]);
            line.input.push(&vec![b'x'; len]);
            line.port.receive();
            assert_eq!(line.interrupts.load(Ordering::Relaxed), 1);
            assert_eq!(handle_interrupt(&line.port).len(), len);
        }
    }

    #[test]
    fn received_data_goes_before_an_empty_transmitter_and_neither_is_lost() {
        let line = line();
        line.port.write(IER, &[IER_RDA | 2]);
        line.input.push(b"x");
        line.port.receive();
        assert_eq!(read(&line.port, IIR) & 0xf, IIR_RDA);
        assert_eq!(read(&line.port, DATA), b'x');
        assert_eq!(read(&line.port, IIR) & 0xf, IIR_THRE);
        assert_eq!(read(&line.port, IIR) & 0xf, IIR_NONE);
    }

    #[test]
    fn the_model_has_the_fifo_that_we_think() {
        let line = line();
        assert_eq!(line.port.lock().registers.fifo_capacity(), FIFO_SIZE);
    }

    #[test]
    fn wide_accesses_do_nothing() {
        let line = line();
        line.input.push(b"x");
        line.port.receive();
        let mut wide = [0; 4];
        line.port.read(DATA, &mut wide);
        assert_eq!(wide, [0xff; 4]);
        line.port.write(IER, &wide);
        assert_eq!(drain(&line.port), b"x");
    }
}
