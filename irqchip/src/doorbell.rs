//! A doorbell: a guest address or port at which a write only signals an eventfd.
//!
//! KVM completes the write itself; the vCPU does not leave the kernel and this process sees nothing
//! of it. The value written is lost, so a device that needs it cannot use a doorbell, unless it
//! knows the value beforehand (`datamatch`).
//!
//! The eventfd is made once and stays, wherever the doorbell goes: a guest that moves a BAR must not
//! make us send a new kick descriptor to a backend.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use vmm_sys_util::eventfd::EventFd;

use crate::chip::{Chip, new_event};
use crate::{Error, sys};

/// Where a doorbell is and which writes ring it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorbellAddress {
    /// A write of any width and value that begins at this guest physical address. KVM knows it by
    /// the address alone and need not decode the instruction: the one to use for virtio notify.
    MmioAny {
        /// Guest physical address.
        gpa: u64,
    },
    /// A write of exactly this width.
    Mmio {
        /// Guest physical address.
        gpa: u64,
        /// Width in bytes: 1, 2, 4 or 8.
        len: u32,
        /// The only value that rings it; any value if `None`.
        datamatch: Option<u64>,
    },
    /// A write of exactly this width to an I/O port.
    Pio {
        /// Port number.
        port: u16,
        /// Width in bytes: 1, 2 or 4.
        len: u32,
        /// The only value that rings it; any value if `None`.
        datamatch: Option<u64>,
    },
}

impl DoorbellAddress {
    /// KVM_IOEVENTFD's argument; `None` if no write could ever ring it.
    fn request(&self) -> Option<kvm_ioeventfd> {
        let (addr, len, datamatch, widths, pio): (u64, u32, _, &[u32], bool) = match *self {
            Self::MmioAny { gpa } => (gpa, 0, None, &[0], false),
            Self::Mmio {
                gpa,
                len,
                datamatch,
            } => (gpa, len, datamatch, &[1, 2, 4, 8], false),
            Self::Pio {
                port,
                len,
                datamatch,
            } => (port.into(), len, datamatch, &[1, 2, 4], true),
        };
        let fits = |value: u64| len == 8 || value >> (8 * len) == 0;
        if !widths.contains(&len) || !datamatch.is_none_or(fits) {
            return None;
        }
        let mut flags = u32::from(pio) << kvm_ioeventfd_flag_nr_pio;
        flags |= u32::from(datamatch.is_some()) << kvm_ioeventfd_flag_nr_datamatch;
        let datamatch = datamatch.unwrap_or(0);
        Some(kvm_ioeventfd {
            datamatch,
            addr,
            len,
            flags,
            ..Default::default()
        })
    }
}

impl fmt::Display for DoorbellAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (len, datamatch) = match self {
            Self::MmioAny { gpa } => return write!(f, "gpa {gpa:#x} (any width)"),
            Self::Mmio {
                gpa,
                len,
                datamatch,
            } => {
                write!(f, "gpa {gpa:#x}")?;
                (len, datamatch)
            }
            Self::Pio {
                port,
                len,
                datamatch,
            } => {
                write!(f, "port {port:#x}")?;
                (len, datamatch)
            }
        };
        match datamatch {
            Some(value) => write!(f, " ({len} bytes, value {value:#x})"),
            None => write!(f, " ({len} bytes)"),
        }
    }
}

/// An eventfd that the guest signals by a write. Taken off its address when dropped.
#[derive(Debug)]
pub struct Doorbell {
    chip: Arc<Chip>,
    event: EventFd,
    /// Where it is now; held while KVM is told of a change.
    at: Mutex<Option<DoorbellAddress>>,
}

impl Doorbell {
    pub(crate) fn new(chip: &Arc<Chip>) -> Result<Self, Error> {
        Ok(Self {
            chip: Arc::clone(chip),
            event: new_event()?,
            at: Mutex::new(None),
        })
    }

    /// Signalled by each write, also of several together. Reading it does not block.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Where it is now.
    pub fn address(&self) -> Option<DoorbellAddress> {
        *self.at()
    }

    /// Puts the doorbell at an address, or moves it there. It rings at the new address before it
    /// stops ringing at the old one. Nothing happens if it is there already; on an error it stays
    /// where it was.
    ///
    /// KVM refuses an address that has another doorbell (EEXIST). A caller that moves several to
    /// addresses that overlap with the old ones removes them all first.
    pub fn place(&self, at: DoorbellAddress) -> Result<(), Error> {
        let mut current = self.at();
        if *current == Some(at) {
            return Ok(());
        }
        let request = at.request().ok_or(Error::DoorbellShape { at })?;
        self.tell_kvm(request)
            .map_err(|source| Error::PlaceDoorbell { at, source })?;
        self.chip.count_doorbell_placed();
        let old = current.replace(at);
        old.map_or(Ok(()), |old| self.take_from(old))
    }

    /// Takes the doorbell off its address, if it has one: writes there leave the kernel again.
    pub fn remove(&self) -> Result<(), Error> {
        let mut current = self.at();
        current.take().map_or(Ok(()), |old| self.take_from(old))
    }

    fn take_from(&self, at: DoorbellAddress) -> Result<(), Error> {
        self.chip.count_doorbell_removed();
        let mut request = at.request().ok_or(Error::DoorbellShape { at })?;
        request.flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        self.tell_kvm(request)
            .map_err(|source| Error::RemoveDoorbell { at, source })
    }

    fn tell_kvm(&self, mut request: kvm_ioeventfd) -> Result<(), kvm_ioctls::Error> {
        request.fd = self.event.as_raw_fd();
        sys::ioeventfd(self.chip.vm(), &request)
    }

    fn at(&self) -> MutexGuard<'_, Option<DoorbellAddress>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, "a doorbell stays behind");
        }
    }
}
