//! The control queue: commands in, one byte of answer out.
//!
//! A command is applied before its answer is published, so what the driver reads as done is done
//! (virtio 1.3, 5.1.6.5: MQ and offloads ask for that).
//!
//! Threads: the queue's own. A ring that starts at 0 belongs to a driver that has just begun: what
//! an earlier one set is forgotten. One that goes on finds what it had set, even if it had told an
//! earlier process, where the frontend keeps an in-flight region: it is saved there.

#![forbid(unsafe_code)]

use std::sync::Arc;

use berth_queue_worker::{
    Chain, Interest, QueueCounters, QueueError, QueueStart, QueueWorker, Ready, Ring,
};
use virtio_bindings::virtio_net::{VIRTIO_NET_ERR, VIRTIO_NET_OK};

use crate::ctrl::{Limits, MAX_COMMAND_LEN, parse};
use crate::state::DeviceState;

/// Commands answered before anything else gets a turn.
const BATCH: usize = 16;

/// The control queue between start and stop.
pub struct CtrlQueue {
    state: Arc<DeviceState>,
    counters: Arc<QueueCounters>,
    limits: Limits,
    chain: Chain,
    command: Vec<u8>,
    begun: bool,
}

impl CtrlQueue {
    /// The handler of the control queue.
    #[must_use]
    pub fn new(state: Arc<DeviceState>, start: &QueueStart) -> Self {
        let max_pairs = state.identity().pairs;
        Self {
            state,
            counters: Arc::clone(&start.counters),
            limits: Limits {
                features: start.features,
                max_pairs,
            },
            chain: Chain::new(),
            command: Vec::new(),
            begun: false,
        }
    }

    /// A driver that begins, or one that goes on.
    fn begin(&self, ring: &mut Ring) -> Result<(), QueueError> {
        if ring.next_avail() == 0 {
            self.state.forget_driver();
            ring.save_state(&[])?;
        } else if self.state.restore(&ring.load_state()?) {
            tracing::info!(
                "the guest goes on with the filter, address and offloads that it had set"
            );
        }
        Ok(())
    }

    /// Does what the chain asks for; true if it worked.
    fn execute(&mut self) -> bool {
        let len = self.chain.readable_len();
        if len > MAX_COMMAND_LEN {
            tracing::debug!(len, "control command is too long");
            return false;
        }
        self.command.resize(len, 0);
        let copied = self.chain.reader().read(&mut self.command);
        let command = match parse(&self.command[..copied], self.limits) {
            Ok(command) => command,
            Err(error) => {
                tracing::debug!(%error, "control command refused");
                return false;
            }
        };
        tracing::debug!(?command, "control command");
        match self.state.apply(command) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "control command failed");
                false
            }
        }
    }
}

impl QueueWorker for CtrlQueue {
    fn process(&mut self, ring: &mut Ring, _ready: Ready) -> Result<Interest, QueueError> {
        if !std::mem::replace(&mut self.begun, true) {
            self.begin(ring)?;
        }
        let mut changed = false;
        for _ in 0..BATCH {
            if !ring.pop_into(&mut self.chain)? {
                break;
            }
            let done = self.execute();
            changed |= done;
            let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
            let answered = self.chain.writer().write(&[answer]);
            ring.push_used(self.chain.head(), answered as u32)?;
            let counter = if done {
                &self.counters.requests
            } else {
                &self.counters.errors
            };
            counter.add(1);
        }
        if changed {
            // Before the driver sees the answers, which come when this returns.
            ring.save_state(&self.state.saved())?;
        }
        Ok(Interest::KICK)
    }

    fn drain(&mut self, _ring: &mut Ring) -> Result<(), QueueError> {
        // A chain keeps its memory mapped.
        self.chain = Chain::new();
        Ok(())
    }
}
