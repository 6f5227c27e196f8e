//! What a storm's client has seen.

use anyhow::{Result, ensure};

/// What went wrong, and how much went right.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) completed: u64,
    pub(super) kills: u32,
    pub(super) in_flight_at_kills: u64,
    pub(super) errors: Vec<String>,
    pub(super) mismatches: Vec<String>,
    pub(super) faults: Vec<String>,
    /// Requests that never came back.
    pub(super) missing: u64,
    pub(super) longest_pause_ms: u128,
}

impl Tally {
    /// Nothing went wrong.
    ///
    /// # Errors
    /// Something did: how much, and the first of each kind.
    pub(super) fn all_well(&self) -> Result<()> {
        let first = |list: &[String]| {
            list.first()
                .map_or(String::new(), |one| format!(" ({one})"))
        };
        ensure!(
            self.errors.is_empty()
                && self.mismatches.is_empty()
                && self.faults.is_empty()
                && self.missing == 0,
            "after {} kills and {} requests: {} errors{}, {} mismatches{}, {} used entries too many{}, {} missing",
            self.kills,
            self.completed,
            self.errors.len(),
            first(&self.errors),
            self.mismatches.len(),
            first(&self.mismatches),
            self.faults.len(),
            first(&self.faults),
            self.missing
        );
        Ok(())
    }
}
