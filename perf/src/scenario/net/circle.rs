//! Frames that go round without virtio: read from the tap into memory that the other core then sends
//! them from again.
//!
//! ```text
//!   CPU 1: read ──▶ buffers ──copy──▶ TX ring of a packet socket ──▶ tap ─┐   CPU 0: Circle
//!            ▲                                                            │
//!            └────────────────────────────────────────────────────────────┘
//! ```
//!
//! The same as testpmd and a daemon do, as far as the kernel and the caches are concerned. It
//! matters by what way a frame gets to the tap: one from a TX ring lies in pages, which cost the
//! reader more than the one buffer that send() would make; and a buffer that another core has just
//! looked at costs more than one that nobody did.
//!
//! Kernel: Documentation/networking/packet_mmap.rst, "Transmission process"; the header is that of
//! TPACKET_V2, and sizes and options are those of DPDK's net_af_packet.
#![allow(
    unsafe_code,
    reason = "a ring that is shared with the kernel, and buffers that two threads use in turn"
)]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::tap;
use crate::sys::{SharedMemory, check};

/// Buffers, as many as testpmd's receive ring has.
const BUFFERS: u64 = 1024;
/// Room in each: a distance as of DPDK's buffers, which spreads them over the caches.
const BUFFER_LEN: usize = 2304;

const PACKET_VERSION: libc::c_int = 10;
const PACKET_TX_RING: libc::c_int = 13;
const PACKET_LOSS: libc::c_int = 14;
const TPACKET_V2: libc::c_int = 1;
const AVAILABLE: u32 = 0;
const SEND_REQUEST: u32 = 1;
/// Where a frame begins in its slot: behind its header (TPACKET2_HDRLEN less the address in it).
const HEADER_LEN: usize = 32;

const SLOT_LEN: usize = 2048;
const SLOTS: usize = 512;
const BLOCK_LEN: usize = 4096;

/// `struct tpacket_req`.
#[repr(C)]
struct RingRequest {
    block_size: libc::c_uint,
    blocks: libc::c_uint,
    frame_size: libc::c_uint,
    frames: libc::c_uint,
}

/// Memory for frames, which two threads use in turn.
pub(super) struct Buffers {
    memory: SharedMemory,
}

impl Buffers {
    /// Buffers that all have `frame` in them.
    pub(super) fn full_of(frame: &[u8]) -> Result<Buffers> {
        let mut memory = SharedMemory::new(BUFFERS as usize * BUFFER_LEN)?;
        for buffer in memory.bytes_mut().chunks_exact_mut(BUFFER_LEN) {
            buffer[..frame.len()].copy_from_slice(frame);
        }
        Ok(Buffers { memory })
    }

    fn at(&self, number: u64) -> *mut u8 {
        self.memory.at((number % BUFFERS) as usize * BUFFER_LEN)
    }

    /// Reads frame `number` from the tap into its buffer. Fewer than [`BUFFERS`] are under way, so
    /// that nobody looks at this buffer meanwhile.
    pub(super) fn read(&self, tap: &File, number: u64) -> Result<usize> {
        // SAFETY: a buffer of that length, which is mapped as long as `self` lives. Whoever looks at
        // it while the kernel writes gets bytes that are not worth anything, and only sends them.
        let n = unsafe { libc::read(tap.as_raw_fd(), self.at(number).cast(), BUFFER_LEN) };
        usize::try_from(n).map_err(|_| Error::last_os_error())
    }
}

/// A packet socket on the tap with a TX ring.
pub(super) struct TxRing {
    socket: OwnedFd,
    slots: NonNull<u8>,
    next: usize,
}

impl TxRing {
    pub(super) fn new() -> Result<TxRing> {
        let socket = tap::packet_socket()?;
        tap::set_option(&socket, PACKET_VERSION, &TPACKET_V2)?;
        // A frame that the tap does not take is lost, and does not stop the ring.
        tap::set_option(&socket, PACKET_LOSS, &1)?;
        let request = RingRequest {
            block_size: BLOCK_LEN as libc::c_uint,
            blocks: (SLOTS * SLOT_LEN / BLOCK_LEN) as libc::c_uint,
            frame_size: SLOT_LEN as libc::c_uint,
            frames: SLOTS as libc::c_uint,
        };
        tap::set_option(&socket, PACKET_TX_RING, &request)?;
        // SAFETY: a new mapping of the whole ring at an address of the kernel's choice.
        let slots = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SLOTS * SLOT_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                socket.as_raw_fd(),
                0,
            )
        };
        if slots == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let slots = NonNull::new(slots.cast()).ok_or_else(|| Error::other("mmap gave 0"))?;
        tap::bind(&socket)?;
        Ok(TxRing {
            socket,
            slots,
            next: 0,
        })
    }

    /// Sends `count` frames of `len` bytes from the buffers from number `first` on, as far as there
    /// is room; how many it took.
    pub(super) fn send(
        &mut self,
        buffers: &Buffers,
        first: u64,
        count: u64,
        len: usize,
    ) -> Result<u64> {
        assert!(HEADER_LEN + len <= SLOT_LEN && len <= BUFFER_LEN);
        let mut taken = 0;
        while taken < count {
            let number = first.wrapping_add(taken);
            // SAFETY: `next` is below SLOTS, so in the mapping; a slot begins with its status, which
            // the kernel changes too.
            let (slot, status) = unsafe {
                let slot = self.slots.as_ptr().add(self.next * SLOT_LEN);
                (slot, AtomicU32::from_ptr(slot.cast()))
            };
            if status.load(Ordering::Acquire) != AVAILABLE {
                break;
            }
            // SAFETY: the slot is ours while it is available, and both ends have `len` bytes; the
            // second field of its header is the frame's length.
            unsafe {
                std::ptr::copy_nonoverlapping(buffers.at(number), slot.add(HEADER_LEN), len);
                slot.add(4).cast::<u32>().write(len as u32);
            }
            // The frame is there before the kernel takes it.
            status.store(SEND_REQUEST, Ordering::Release);
            self.next = (self.next + 1) % SLOTS;
            taken += 1;
        }
        // SAFETY: no message: the kernel looks at the ring.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            )
        };
        match check(sent as libc::c_int) {
            Ok(_) => Ok(taken),
            // What is in the ring goes with the next call.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => {
                Ok(taken)
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for TxRing {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nobody else knows.
        unsafe { libc::munmap(self.slots.as_ptr().cast(), SLOTS * SLOT_LEN) };
    }
}
