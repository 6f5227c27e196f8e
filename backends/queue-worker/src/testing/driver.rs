//! The driver's side of a split virtqueue.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::TIMEOUT;
use super::ram::GuestRam;
use crate::features;
use crate::sys;

/// One buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Buffer {
    /// The device reads it.
    pub fn readable(gpa: u64, len: u32) -> Buffer {
        Buffer {
            gpa,
            len,
            writable: false,
        }
    }

    /// The device writes it.
    pub fn writable(gpa: u64, len: u32) -> Buffer {
        Buffer {
            gpa,
            len,
            writable: true,
        }
    }
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct DriverQueue {
    ram: Arc<GuestRam>,
    index: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    event_idx: bool,
    free: Vec<u16>,
    /// Length of the chain that starts at each head, in descriptors of the ring.
    next_of: Vec<Vec<u16>>,
    avail_idx: u16,
    kicked_idx: u16,
    last_used: u16,
    kicks: u64,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl DriverQueue {
    /// An empty queue in `ram`.
    pub fn new(ram: &Arc<GuestRam>, index: u16, size: u16, features: u64) -> DriverQueue {
        let entries = u64::from(size);
        let event = || sys::event().unwrap();
        DriverQueue {
            ram: Arc::clone(ram),
            index,
            size,
            desc: ram.alloc(16 * entries, 16),
            avail: ram.alloc(6 + 2 * entries, 2),
            used: ram.alloc(6 + 8 * entries, 4),
            event_idx: features & 1 << features::RING_EVENT_IDX != 0,
            free: (0..size).rev().collect(),
            next_of: vec![Vec::new(); usize::from(size)],
            avail_idx: 0,
            kicked_idx: 0,
            last_used: 0,
            kicks: 0,
            kick: event(),
            call: event(),
            err: event(),
        }
    }

    /// Index of the virtqueue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How often the driver has kicked.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// The driver's kick fd.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The driver's call fd.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The frontend's err fd.
    pub fn err_fd(&self) -> BorrowedFd<'_> {
        self.err.as_fd()
    }

    /// Guest addresses of descriptor table, available and used ring.
    pub fn gpas(&self) -> [u64; 3] {
        [self.desc, self.avail, self.used]
    }

    /// Frontend addresses of the same.
    pub fn uvas(&self) -> [u64; 3] {
        self.gpas().map(|gpa| self.ram.uva(gpa))
    }

    /// Writes one descriptor of the table at `table`, whatever it says.
    pub fn write_desc(&self, table: u64, n: u16, addr: u64, len: u32, flags_next: (u16, u16)) {
        let at = table + 16 * u64::from(n);
        self.ram.write(at, &addr.to_le_bytes());
        self.ram.write(at + 8, &len.to_le_bytes());
        self.ram.write(at + 12, &flags_next.0.to_le_bytes());
        self.ram.write(at + 14, &flags_next.1.to_le_bytes());
    }

    /// Makes a request available, without kicking; its head. `None` where the table is full.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let chain: Vec<u16> = buffers.iter().filter_map(|_| self.free.pop()).collect();
        for (n, buffer) in buffers.iter().enumerate() {
            let next = chain.get(n + 1);
            let flags = flags_of(buffer, next.is_some());
            let next = next.copied().unwrap_or(0);
            self.write_desc(self.desc, chain[n], buffer.gpa, buffer.len, (flags, next));
        }
        let head = *chain.first()?;
        self.next_of[usize::from(head)] = chain;
        self.offer(head);
        Some(head)
    }

    /// The same through an indirect table, which takes one descriptor of the ring.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let head = self.free.pop()?;
        let table = self.ram.alloc(16 * buffers.len() as u64, 16);
        for (n, buffer) in buffers.iter().enumerate() {
            let flags = flags_of(buffer, n + 1 < buffers.len());
            let (n, next) = (n as u16, n as u16 + 1);
            self.write_desc(table, n, buffer.gpa, buffer.len, (flags, next));
        }
        let flags = VRING_DESC_F_INDIRECT as u16;
        let len = 16 * buffers.len() as u32;
        self.write_desc(self.desc, head, table, len, (flags, 0));
        self.next_of[usize::from(head)] = vec![head];
        self.offer(head);
        Some(head)
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx & (self.size - 1));
        self.ram
            .write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Writes avail.idx, whatever it says.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        let slice = self.ram.slice(self.avail + 2, 2);
        let field = slice.atomic_u16(0).unwrap();
        field.store(idx.to_le(), Ordering::Release);
    }

    /// avail.idx as the driver wrote it.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Kicks if the device wants it, as a driver does.
    pub fn kick_if_wanted(&mut self) {
        let (old, new) = (self.kicked_idx, self.avail_idx);
        self.kicked_idx = new;
        // The index is visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.field(self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(self.field(self.used)) & VRING_USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Kicks, wanted or not.
    pub fn kick(&mut self) {
        self.kicks += 1;
        sys::write_event(self.kick.as_fd()).unwrap();
    }

    fn field(&self, gpa: u64) -> u16 {
        let slice = self.ram.slice(gpa, 2);
        u16::from_le(slice.atomic_u16(0).unwrap().load(Ordering::Acquire))
    }

    /// used.idx as the device wrote it: where a frontend has the next backend go on.
    pub fn used_idx(&self) -> u16 {
        self.field(self.used + 2)
    }

    /// Requests offered and not answered, as far as this driver has looked.
    pub fn outstanding(&self) -> u16 {
        self.avail_idx.wrapping_sub(self.last_used)
    }

    /// The next used entry, if there is one: head and length.
    pub fn poll_used(&mut self) -> Option<(u16, u32)> {
        if self.field(self.used + 2) == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used & (self.size - 1));
        let entry = self.ram.read(self.used + 4 + 8 * slot, 8);
        let id = u32::from_le_bytes(entry[..4].try_into().unwrap());
        let len = u32::from_le_bytes(entry[4..].try_into().unwrap());
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(id).expect("used id above 16 bits");
        let chain = std::mem::take(&mut self.next_of[usize::from(head)]);
        assert!(!chain.is_empty(), "head {head} came back twice");
        self.free.extend(chain);
        Some((head, len))
    }

    /// Waits for the next used entry by the call fd.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.want_signal();
            if let Some(used) = self.poll_used() {
                return used;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(wait_readable(&self.call, left), "no completion in time");
            let _ = sys::read_event(self.call.as_fd());
        }
    }

    /// Polls for the next used entry, as drivers do that want no signals.
    pub fn spin_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(used) = self.poll_used() {
                return used;
            }
            assert!(Instant::now() < deadline, "no completion in time");
            std::thread::yield_now();
        }
    }

    /// Asks for a signal at the next used entry (EVENT_IDX).
    fn want_signal(&self) {
        if self.event_idx {
            let gpa = self.avail + 4 + 2 * u64::from(self.size);
            let slice = self.ram.slice(gpa, 2);
            let event = slice.atomic_u16(0).unwrap();
            event.store(self.last_used.to_le(), Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// Sets VRING_AVAIL_F_NO_INTERRUPT, or clears it.
    pub fn set_no_interrupt(&self, on: bool) {
        let slice = self.ram.slice(self.avail, 2);
        let flags = slice.atomic_u16(0).unwrap();
        flags.store(u16::from(on).to_le(), Ordering::SeqCst);
    }

    /// Offers a request, kicks, waits for it; the length the device wrote.
    pub fn run(&mut self, buffers: &[Buffer]) -> u32 {
        let head = self.add(buffers).expect("ring is full");
        self.kick_if_wanted();
        let (used, len) = self.wait_used();
        assert_eq!(used, head);
        len
    }

    /// Waits until the backend says that the queue is broken.
    pub fn wait_err(&self) {
        assert!(wait_readable(&self.err, TIMEOUT), "err fd was not raised");
        let _ = sys::read_event(self.err.as_fd());
    }

    /// Waits for a call, and takes it.
    pub fn wait_call(&self) {
        assert!(wait_readable(&self.call, TIMEOUT), "no call in time");
        let _ = sys::read_event(self.call.as_fd());
    }

    /// Calls since this was asked last.
    pub fn take_calls(&self) -> u64 {
        sys::read_event(self.call.as_fd()).unwrap_or(0)
    }

    /// For a queue that starts anew: everything back to its initial state, memory zeroed.
    pub fn reset(&mut self) {
        let size = usize::from(self.size);
        for (gpa, len) in [
            (self.desc, 16 * size),
            (self.avail, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ] {
            self.ram.slice(gpa, len).fill(0, len, 0).unwrap();
        }
        self.free = (0..self.size).rev().collect();
        self.next_of = vec![Vec::new(); size];
        self.avail_idx = 0;
        self.kicked_idx = 0;
        self.last_used = 0;
    }
}

fn flags_of(buffer: &Buffer, more: bool) -> u16 {
    let mut flags = 0;
    if buffer.writable {
        flags |= VRING_DESC_F_WRITE;
    }
    if more {
        flags |= VRING_DESC_F_NEXT;
    }
    flags as u16
}

fn wait_readable(event: &OwnedFd, timeout: Duration) -> bool {
    let mut slots = [sys::poll_slot(event.as_raw_fd(), libc::POLLIN)];
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    sys::poll(&mut slots, timeout_ms).unwrap();
    slots[0].revents != 0
}
