//! A chip's MSI vectors: the order in which a change reaches KVM.
//!
//! ```text
//!  mask ─▶ detach the irqfd ─▶ write the routing table, if one route differs ─▶ attach the irqfd ◀─ unmask
//! ```
//!
//! A vector is detached before its message changes and attached after, so that KVM never sends what the guest
//! has not asked for. While a [`Held`](crate::Held) has a vector, it is not attached whatever it wants.

use std::collections::BTreeMap;

use vmm_sys_util::eventfd::EventFd;

use crate::msi::Change;
use crate::routing::{Table, Vector};
use crate::{Batch, Chip, Error, Msi, MsiMessage};

/// Vectors that a batch changes, by GSI, each with the state it is to have.
type Touched<'a> = BTreeMap<u32, (&'a Msi, Vector)>;

impl Chip {
    pub(crate) fn allocate_vector(&self) -> Result<u32, Error> {
        let mut table = self.table();
        let vectors = table.vectors().len();
        table.allocate().ok_or(Error::NoGsi { vectors })
    }

    /// Detaches and forgets a vector. Its route stays in KVM's table until the next update: no
    /// irqfd leads there, and whoever gets the GSI next is attached after an update only.
    pub(crate) fn release_vector(&self, gsi: u32, event: &EventFd) {
        let mut table = self.table();
        if let Err(error) = self.set_attached(&mut table, gsi, event, false) {
            tracing::warn!(gsi, %error, "cannot detach an MSI vector");
        }
        table.release(gsi);
    }

    /// A vector's message, and whether it is masked.
    pub(crate) fn vector_setting(&self, gsi: u32) -> (Option<MsiMessage>, bool) {
        let table = self.table();
        let vector = table.vector(gsi);
        vector.map_or((None, false), |vector| (vector.message, vector.masked))
    }

    pub(crate) fn is_attached(&self, gsi: u32) -> bool {
        self.table()
            .vector(gsi)
            .is_some_and(|vector| vector.attached)
    }

    pub(crate) fn apply(&self, batch: &Batch<'_>) -> Result<(), Error> {
        let mut table = self.table();
        let mut touched = BTreeMap::new();
        for (msi, change) in batch.changes() {
            debug_assert!(msi.belongs_to(self), "a vector of another VM");
            let Some(now) = table.vector(msi.gsi()).copied() else {
                continue;
            };
            let (_, wanted) = touched.entry(msi.gsi()).or_insert((*msi, now));
            match *change {
                Change::Message(message) => wanted.message = Some(message),
                Change::Masked(masked) => wanted.masked = masked,
            }
        }
        self.detach_masked(&mut table, &touched)?;
        self.change_routes(&mut table, &touched)?;
        for (gsi, (msi, wanted)) in &touched {
            if wanted.wants_irqfd() {
                self.set_attached(&mut table, *gsi, msi.event(), true)?;
            }
        }
        Ok(())
    }

    fn detach_masked(&self, table: &mut Table, touched: &Touched<'_>) -> Result<(), Error> {
        for (gsi, (msi, _)) in touched.iter().filter(|(_, (_, wanted))| wanted.masked) {
            if let Some(vector) = table.vector_mut(*gsi) {
                vector.masked = true;
            }
            self.set_attached(table, *gsi, msi.event(), false)?;
        }
        Ok(())
    }

    /// Takes over what is wanted and tells KVM if a route differs; takes it back if KVM refuses.
    fn change_routes(&self, table: &mut Table, touched: &Touched<'_>) -> Result<(), Error> {
        let mut before = Vec::with_capacity(touched.len());
        for (gsi, (_, wanted)) in touched {
            if let Some(vector) = table.vector_mut(*gsi) {
                before.push((*gsi, *vector));
                vector.message = wanted.message;
                vector.masked = wanted.masked;
            }
        }
        let written = self.write_stale_routes(table);
        if written.is_err() {
            for (gsi, old) in before {
                if let Some(vector) = table.vector_mut(gsi) {
                    *vector = old;
                }
            }
        }
        written
    }

    fn write_stale_routes(&self, table: &mut Table) -> Result<(), Error> {
        let changed = table.stale();
        if changed.is_empty() {
            Ok(())
        } else {
            self.write_routes(table, changed)
        }
    }

    fn set_attached(
        &self,
        table: &mut Table,
        gsi: u32,
        event: &EventFd,
        attached: bool,
    ) -> Result<(), Error> {
        let Some(vector) = table.vector_mut(gsi) else {
            return Ok(());
        };
        let attached = attached && !vector.held;
        if vector.attached == attached {
            return Ok(());
        }
        if attached {
            self.vm()
                .register_irqfd(event, gsi)
                .map_err(|source| Error::Attach { gsi, source })?;
        } else {
            self.vm()
                .unregister_irqfd(event, gsi)
                .map_err(|source| Error::Detach { gsi, source })?;
        }
        vector.attached = attached;
        Ok(())
    }

    /// Detaches these vectors until [`release_vectors`](Self::release_vectors). What was written before has
    /// arrived then: KVM waits for its worker.
    pub(crate) fn hold_vectors(&self, msis: &[&Msi]) -> Result<(), Error> {
        let mut table = self.table();
        for msi in msis {
            debug_assert!(msi.belongs_to(self), "a vector of another VM");
            if let Some(vector) = table.vector_mut(msi.gsi()) {
                vector.held = true;
            }
            self.set_attached(&mut table, msi.gsi(), msi.event(), false)?;
        }
        Ok(())
    }

    /// Attaches those again that want it; the first error, after all were tried.
    pub(crate) fn release_vectors(&self, msis: &[&Msi]) -> Result<(), Error> {
        let mut table = self.table();
        let mut released = Ok(());
        for msi in msis {
            let Some(vector) = table.vector_mut(msi.gsi()) else {
                continue;
            };
            vector.held = false;
            if vector.wants_irqfd() {
                released =
                    released.and(self.set_attached(&mut table, msi.gsi(), msi.event(), true));
            }
        }
        released
    }
}
