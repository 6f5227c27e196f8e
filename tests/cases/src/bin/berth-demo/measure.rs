//! What the daemons counted.

use anyhow::Result;
use berth_tests_framework::daemons::Daemon;

/// Doorbells and interrupts of one daemon.
#[derive(Debug)]
pub(crate) struct Notifications {
    pub(crate) daemon: String,
    pub(crate) doorbells: u64,
    pub(crate) interrupts: u64,
    pub(crate) requests: u64,
}

/// Totals since the daemons started.
pub(crate) fn notifications(daemons: &[&Daemon]) -> Result<Vec<Notifications>> {
    daemons
        .iter()
        .map(|daemon| {
            Ok(Notifications {
                daemon: daemon.process().name().to_owned(),
                doorbells: daemon.total("berth_kicks_total")?,
                interrupts: daemon.total("berth_calls_total")?,
                requests: daemon.total("berth_requests_total")?,
            })
        })
        .collect()
}
