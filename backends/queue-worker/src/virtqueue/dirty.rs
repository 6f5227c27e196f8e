//! Marks in the dirty log what a ring and its device write into guest memory.
//!
//! A chain's writable pieces are marked when it is used or put back, not as they are written: the
//! frontend looks at them after the rings have stopped, or comes round again.
//! Spec: vhost-user, "Migration".

use super::{Ring, RingError};
use crate::log::{QueueLog, RingLog};

impl Ring {
    /// What is logged from now on, also of chains that were taken before.
    pub(crate) fn set_log(&mut self, log: Option<QueueLog>) {
        self.log = log.map(|queue| Box::new(RingLog::new(queue)));
    }

    /// The chain of `head` may have been written.
    #[cold]
    pub(super) fn log_chain(&mut self, head: u16) -> Result<(), RingError> {
        let Some(mut log) = self.log.take() else {
            return Ok(());
        };
        let result = self.log_writable(&mut log, head);
        self.log = Some(log);
        result
    }

    fn log_writable(&self, log: &mut RingLog, head: u16) -> Result<(), RingError> {
        if !log.logs_data() {
            return Ok(());
        }
        let mut chain = std::mem::take(&mut log.chain);
        chain.begin(head, &self.memory);
        let result = self.follow(&mut chain).and_then(|()| {
            for piece in chain.writable() {
                // The piece was found in this memory.
                let gpa = self.memory.gpa_of(&piece).unwrap_or(u64::MAX);
                log.mark_data(gpa, piece.len())?;
            }
            Ok(())
        });
        log.chain = chain;
        result
    }

    /// `len` bytes at `offset` of the used ring were written.
    #[inline]
    pub(super) fn log_used(&mut self, offset: usize, len: usize) -> Result<(), RingError> {
        match &mut self.log {
            None => Ok(()),
            Some(log) => Ok(log.mark_used(offset, len)?),
        }
    }

    /// A chain that was taken may have been written, and is left to a successor.
    #[cold]
    pub(super) fn log_put_back(&mut self, head: Result<u16, RingError>) {
        let logged = head.and_then(|head| self.log_chain(head));
        if let (Err(error), Some(log)) = (logged, &mut self.log) {
            log.fail_later(error);
        }
    }
}
