//! The interrupt controllers of one VM, and the only writer of KVM's routing table.
//!
//! Which controllers KVM has is the [`Mode`]; everything else is the same in both: a line, a vector
//! and a doorbell are eventfds, and KVM listens to them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting,
    kvm_enable_cap, kvm_msi, kvm_pit_config,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::line::Ends;
use crate::msi::Change;
use crate::pins::Pins;
use crate::routing::{Table, Vector};
use crate::{Batch, Doorbell, Error, IOAPIC_PINS, Line, Msi, MsiMessage, Trigger};

/// Who has which interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// KVM has them all: local APICs, IOAPIC, two PICs, and the PIT.
    Kernel,
    /// KVM has the local APICs, this crate the IOAPIC ([`Chip::ioapic_write`]). There is no PIC and
    /// no PIT; APIC ids may be larger than 255.
    Split,
}

/// What this process has set up in KVM; interrupts themselves do not pass by here to be counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times the routing table was given to KVM, the first one included.
    pub routing_updates: u64,
    /// Lines that exist.
    pub lines: u64,
    /// Interrupts raised by [`Line::raise`]; those that somebody else wrote are not in it.
    pub line_raises: u64,
    /// Level interrupts whose end came to this process, which it does with the split irqchip.
    pub ends_of_interrupt: u64,
    /// MSI vectors that exist.
    pub msis: u64,
    /// MSI vectors whose eventfd KVM listens to.
    pub msis_attached: u64,
    /// Doorbells that are at an address.
    pub doorbells: u64,
    /// Times a doorbell was put at an address, moves included.
    pub doorbells_placed: u64,
}

/// The interrupt controllers and the PIT of one VM. Shared by all that hold an interrupt.
#[derive(Debug)]
pub struct Chip {
    vm: Arc<VmFd>,
    /// The routing table and the state of each vector; held while KVM is told of a change, so that
    /// what KVM has and what is here do not part.
    table: Mutex<Table>,
    /// Our own IOAPIC; none, KVM has it. Taken before `table`, never after.
    pins: Option<Mutex<Pins>>,
    /// Pins of KVM's IOAPIC that [`Chip::drive`] holds high, which KVM does not say; held while KVM is told. A
    /// leaf. The split mode's are in `pins`.
    driven: Mutex<u32>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    routing_updates: AtomicU64,
    lines: AtomicU64,
    line_raises: AtomicU64,
    ends_of_interrupt: AtomicU64,
    doorbells: AtomicU64,
    doorbells_placed: AtomicU64,
}

impl Chip {
    /// Creates the controllers that KVM is to have, and routes the pins. To be called before the VM's
    /// first vCPU; the VMM sets the TSS address itself, before this.
    pub fn new(vm: Arc<VmFd>, mode: Mode) -> Result<Arc<Self>, Error> {
        let max_routes = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let mut table = Table::new(max_routes, mode);
        match mode {
            Mode::Kernel => create_kernel_irqchip(&vm)?,
            Mode::Split => {
                split_irqchip(&vm)?;
                if use_x2apic_ids(&vm) {
                    table.extend_destinations();
                }
            }
        }
        let chip = Self {
            vm,
            table: Mutex::new(table),
            pins: (mode == Mode::Split).then(|| Mutex::new(Pins::new())),
            driven: Mutex::default(),
            counts: Counts::default(),
        };
        chip.write_routes(&mut chip.table(), Vec::new())?;
        Ok(Arc::new(chip))
    }

    /// Who has which controller.
    pub fn mode(&self) -> Mode {
        match self.pins {
            None => Mode::Kernel,
            Some(_) => Mode::Split,
        }
    }

    /// Whether messages reach APIC ids from 256 to 32767 through address bits 11 to 5. Only then may
    /// a guest be told so (`KVM_FEATURE_MSI_EXT_DEST_ID`).
    pub fn has_extended_destinations(&self) -> bool {
        self.table().has_extended_destinations()
    }

    /// The guest reads the IOAPIC's page at this offset. Zeros if KVM has the IOAPIC: then no such
    /// access comes out of it.
    pub fn ioapic_read(&self, offset: u64, data: &mut [u8]) {
        match self.pins() {
            Some(pins) => pins.ioapic.read(offset, data),
            None => data.fill(0),
        }
    }

    /// The guest writes the IOAPIC's page at this offset.
    ///
    /// # Errors
    /// KVM may refuse a route that the guest has chosen, or an irqfd; the entry is then as before.
    pub fn ioapic_write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        match self.pins() {
            Some(mut pins) => pins.write(self, offset, data),
            None => Ok(()),
        }
    }

    /// A vCPU ended a level interrupt of our IOAPIC (`KVM_EXIT_IOAPIC_EOI`).
    pub fn end_of_interrupt(&self, vector: u8) {
        self.counts
            .ends_of_interrupt
            .fetch_add(1, Ordering::Relaxed);
        if let Some(mut pins) = self.pins() {
            pins.end_of_interrupt(self, vector);
        }
    }

    /// A source on an IOAPIC pin, attached at once.
    pub fn line(self: &Arc<Self>, pin: u32, trigger: Trigger) -> Result<Line, Error> {
        Line::new(self, pin, trigger)
    }

    /// Drives an IOAPIC pin high or low, with a system call for each change: for tests. A pin is as high
    /// as the highest of what drives it.
    pub fn drive(&self, pin: u32, high: bool) -> Result<(), Error> {
        if pin >= IOAPIC_PINS {
            return Err(Error::NoPin { pin });
        }
        let driven = match self.pins() {
            Some(mut pins) => pins.drive(self, pin, high),
            None => self.drive_kernel_pin(pin, high),
        };
        driven.map_err(|source| Error::Drive { pin, source })
    }

    fn drive_kernel_pin(&self, pin: u32, high: bool) -> Result<(), kvm_ioctls::Error> {
        let mut driven = self.kernel_driven();
        self.vm.set_irq_line(pin, high)?;
        *driven = *driven & !(1 << pin) | u32::from(high) << pin;
        Ok(())
    }

    /// Pins of KVM's IOAPIC that are driven high.
    pub(crate) fn kernel_driven(&self) -> MutexGuard<'_, u32> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An MSI vector. It raises nothing before it has a message; until then, and while it is
    /// masked, what is written to its eventfd stays pending.
    pub fn msi(self: &Arc<Self>) -> Result<Msi, Error> {
        Msi::new(self)
    }

    /// A doorbell that is nowhere yet.
    pub fn doorbell(self: &Arc<Self>) -> Result<Doorbell, Error> {
        Doorbell::new(self)
    }

    /// Changes several vectors with one update of KVM's table, or none: the messages of vectors
    /// that stay masked are kept for later.
    ///
    /// # Errors
    /// If KVM refuses the new table, all messages stay as they were and nothing is unmasked; what
    /// was to be masked is. If it refuses an irqfd, which it does for want of memory only, vectors
    /// with a higher GSI stay detached until they are unmasked again.
    pub fn batch<'a>(&self, fill: impl FnOnce(&mut Batch<'a>)) -> Result<(), Error> {
        let mut batch = Batch::default();
        fill(&mut batch);
        self.apply(&batch)
    }

    /// What is set up now, and how often it changed.
    pub fn counters(&self) -> Counters {
        let table = self.table();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            routing_updates: read(&self.counts.routing_updates),
            lines: read(&self.counts.lines),
            line_raises: read(&self.counts.line_raises),
            ends_of_interrupt: read(&self.counts.ends_of_interrupt),
            msis: table.vectors().len() as u64,
            msis_attached: table.vectors().filter(|vector| vector.attached).count() as u64,
            doorbells: read(&self.counts.doorbells),
            doorbells_placed: read(&self.counts.doorbells_placed),
        }
    }

    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(crate) fn pins(&self) -> Option<MutexGuard<'_, Pins>> {
        let pins = self.pins.as_ref()?;
        Some(pins.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Leads a pin of our IOAPIC to a message.
    pub(crate) fn set_pin_route(&self, pin: u32, message: MsiMessage) -> Result<(), Error> {
        let mut table = self.table();
        let before = table.set_pin(pin, Some(message));
        if before == Some(message) {
            return Ok(());
        }
        self.write_routes(&mut table, vec![pin]).inspect_err(|_| {
            table.set_pin(pin, before);
        })
    }

    /// Sends a message at once, past the routing table.
    pub(crate) fn send(&self, message: MsiMessage) -> Result<(), kvm_ioctls::Error> {
        let MsiMessage { address, data } = self.table().destination(message);
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // 0, nobody took it, is what happens to a message for an APIC that is off.
        self.vm.signal_msi(msi).map(|_| ())
    }

    pub(crate) fn attach_line(&self, ends: &Arc<Ends>) -> Result<(), Error> {
        let gsi = ends.pin;
        match (self.pins(), &ends.resample) {
            (Some(mut pins), _) => pins.add(self, ends)?,
            (None, Some(resample)) => self
                .vm
                .register_irqfd_with_resample(&ends.event, resample, gsi)
                .map_err(|source| Error::Attach { gsi, source })?,
            (None, None) => self
                .vm
                .register_irqfd(&ends.event, gsi)
                .map_err(|source| Error::Attach { gsi, source })?,
        }
        self.counts.lines.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn detach_line(&self, ends: &Arc<Ends>) -> Result<(), Error> {
        self.counts.lines.fetch_sub(1, Ordering::Relaxed);
        let gsi = ends.pin;
        match self.pins() {
            Some(mut pins) => pins.remove(self, ends),
            None => self
                .vm
                .unregister_irqfd(&ends.event, gsi)
                .map_err(|source| Error::Detach { gsi, source }),
        }
    }

    pub(crate) fn raise_line(&self, ends: &Ends) -> std::io::Result<()> {
        match self.pins() {
            Some(mut pins) => pins.raise(ends)?,
            None => ends.event.write(1)?,
        }
        self.counts.line_raises.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

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

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is complete or undone before anything here could panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, batch: &Batch<'_>) -> Result<(), Error> {
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

    fn write_routes(&self, table: &mut Table, changed: Vec<u32>) -> Result<(), Error> {
        let entries = table.entries();
        let refused = |source| Error::SetRoutes {
            routes: entries.len(),
            changed,
            source,
        };
        // More entries than the wrapper takes: KVM would say the same.
        let written = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
            .and_then(|routing| self.vm.set_gsi_routing(&routing));
        written.map_err(refused)?;
        table.set_routed();
        self.counts.routing_updates.fetch_add(1, Ordering::Relaxed);
        Ok(())
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
        if vector.attached == attached {
            return Ok(());
        }
        if attached {
            self.vm
                .register_irqfd(event, gsi)
                .map_err(|source| Error::Attach { gsi, source })?;
        } else {
            self.vm
                .unregister_irqfd(event, gsi)
                .map_err(|source| Error::Detach { gsi, source })?;
        }
        vector.attached = attached;
        Ok(())
    }
}

/// Vectors that a batch changes, by GSI, each with the state it is to have.
type Touched<'a> = BTreeMap<u32, (&'a Msi, Vector)>;

/// Bookkeeping for [`Counters`].
impl Chip {
    pub(crate) fn count_doorbell_placed(&self) {
        self.counts.doorbells_placed.fetch_add(1, Ordering::Relaxed);
        self.counts.doorbells.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_doorbell_removed(&self) {
        self.counts.doorbells.fetch_sub(1, Ordering::Relaxed);
    }
}

fn create_kernel_irqchip(vm: &VmFd) -> Result<(), Error> {
    vm.create_irq_chip().map_err(Error::CreateIrqchip)?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(Error::CreatePit)
}

/// Local APICs in KVM, which tells us of the end of a level interrupt of the first GSIs.
fn split_irqchip(vm: &VmFd) -> Result<(), Error> {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [IOAPIC_PINS.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(Error::SplitIrqchip)
}

/// Makes KVM take destinations of 32 bits, 255 for no broadcast in x2APIC mode. Older hosts cannot.
fn use_x2apic_ids(vm: &VmFd) -> bool {
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    let cap = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [flags.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).is_ok()
}

/// An eventfd for an interrupt or a doorbell: nobody may block on either side of it.
pub(crate) fn new_event() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd)
}
