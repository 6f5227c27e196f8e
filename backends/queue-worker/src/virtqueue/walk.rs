//! Following the descriptors of one chain.
//!
//! ```text
//!   head ─▶ desc ─NEXT─▶ desc ─▶ …             in the ring's table, at most its size of them
//!            └─INDIRECT─▶ a table of its own   in guest memory, at most MAX_CHAIN, none inside it
//! ```
//!
//! Each descriptor is fetched once and then checked, so what the driver changes meanwhile is either
//! seen or not. Spec: virtio 1.3, 2.7.5 and 2.7.5.3.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::{DESC_SIZE, MAX_CHAIN, Ring, RingError};
use crate::chain::Chain;
use crate::guest_memory::GuestSlice;

impl Ring {
    /// Walks the descriptors of `chain.head()`.
    pub(super) fn follow(&self, chain: &mut Chain) -> Result<(), RingError> {
        let head = chain.head();
        let mut walk = Walk {
            table: self.desc_table(),
            len: usize::from(self.layout.size),
            next: Some(head),
            seen: 0,
            limit: usize::from(self.layout.size),
        };
        while let Some(desc) = walk.step(head)? {
            if desc.has(VRING_DESC_F_INDIRECT) {
                if !self.indirect || desc.has(VRING_DESC_F_NEXT) {
                    return Err(RingError::UnexpectedIndirect { head });
                }
                return self.follow_indirect(chain, &desc);
            }
            add_buffer(chain, &desc)?;
        }
        Ok(())
    }

    fn follow_indirect(&self, chain: &mut Chain, desc: &Desc) -> Result<(), RingError> {
        let (gpa, len) = (desc.addr, desc.len);
        let count = len as usize / DESC_SIZE;
        if count == 0 || !(len as usize).is_multiple_of(DESC_SIZE) || count > MAX_CHAIN {
            return Err(RingError::BadIndirect { gpa, len });
        }
        let head = chain.head();
        let mut walk = Walk {
            table: self.memory.slice(gpa, len as usize)?,
            len: count,
            next: Some(0),
            seen: 0,
            limit: count,
        };
        while let Some(desc) = walk.step(head)? {
            if desc.has(VRING_DESC_F_INDIRECT) {
                return Err(RingError::UnexpectedIndirect { head });
            }
            add_buffer(chain, &desc)?;
        }
        Ok(())
    }
}

/// One descriptor, fetched.
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// A walk along one table of descriptors.
struct Walk<'a> {
    table: GuestSlice<'a>,
    len: usize,
    next: Option<u16>,
    seen: usize,
    limit: usize,
}

impl Walk<'_> {
    fn step(&mut self, head: u16) -> Result<Option<Desc>, RingError> {
        let Some(index) = self.next else {
            return Ok(None);
        };
        let len = self.len;
        if usize::from(index) >= len {
            return Err(RingError::BadIndex { index, len });
        }
        if self.seen == self.limit {
            let limit = self.limit;
            return Err(RingError::Endless { head, limit });
        }
        self.seen += 1;
        let offset = usize::from(index) * DESC_SIZE;
        let addr = u64::from_le(self.table.load(offset)?);
        let rest = u64::from_le(self.table.load(offset + 8)?);
        let desc = Desc {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        };
        self.next = desc.has(VRING_DESC_F_NEXT).then_some(desc.next);
        Ok(Some(desc))
    }
}

fn add_buffer(chain: &mut Chain, desc: &Desc) -> Result<(), RingError> {
    let writable = desc.has(VRING_DESC_F_WRITE);
    if !writable && chain.has_writable() {
        let head = chain.head();
        return Err(RingError::BadOrder { head });
    }
    chain.add(desc.addr, desc.len, writable)?;
    Ok(())
}
