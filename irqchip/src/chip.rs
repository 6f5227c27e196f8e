//! The interrupt controllers of one VM, and the only writer of KVM's routing table.
//!
//! Which controllers KVM has is the [`Mode`]; everything else is the same in both: a line, a vector
//! and a doorbell are eventfds, and KVM listens to them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting,
    kvm_enable_cap, kvm_msi, kvm_pit_config,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::line::Ends;
use crate::pins::Pins;
use crate::routing::Table;
use crate::wires::Wires;
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
    /// Lines and driven pins of KVM's IOAPIC; the split mode's are in `pins`. A leaf.
    wires: Mutex<Wires>,
    /// A [`Held`](crate::Held) exists.
    held: AtomicBool,
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
        Self::create(vm, mode, mode == Mode::Split)
    }

    /// The same for a guest that has no x2APIC mode: APIC ids are bytes in either [`Mode`]. KVM then has an
    /// interrupt reach all APICs that share an id, as the architecture says; with ids of 32 bits only one.
    pub fn with_short_ids(vm: Arc<VmFd>, mode: Mode) -> Result<Arc<Self>, Error> {
        Self::create(vm, mode, false)
    }

    fn create(vm: Arc<VmFd>, mode: Mode, long_ids: bool) -> Result<Arc<Self>, Error> {
        let max_routes = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let mut table = Table::new(max_routes, mode);
        match mode {
            Mode::Kernel => create_kernel_irqchip(&vm)?,
            Mode::Split => split_irqchip(&vm)?,
        }
        if long_ids && use_x2apic_ids(&vm) {
            table.extend_destinations();
        }
        let chip = Self {
            vm,
            table: Mutex::new(table),
            pins: (mode == Mode::Split).then(|| Mutex::new(Pins::new())),
            wires: Mutex::default(),
            held: AtomicBool::new(false),
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
            None => self.wires().drive(self, pin, high),
        };
        driven.map_err(|source| Error::Drive { pin, source })
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

    pub(crate) fn wires(&self) -> MutexGuard<'_, Wires> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the chip is held, or is not; returns what it was.
    pub(crate) fn set_held(&self, held: bool) -> bool {
        self.held.swap(held, Ordering::SeqCst)
    }

    pub(crate) fn attach_line(&self, ends: &Arc<Ends>) -> Result<(), Error> {
        match self.pins() {
            Some(mut pins) => pins.add(self, ends)?,
            None => self.wires().add(self, ends)?,
        }
        self.counts.lines.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn detach_line(&self, ends: &Arc<Ends>) -> Result<(), Error> {
        self.counts.lines.fetch_sub(1, Ordering::Relaxed);
        match self.pins() {
            Some(mut pins) => pins.remove(self, ends),
            None => self.wires().remove(self, ends),
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

    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is complete or undone before anything here could panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write_routes(&self, table: &mut Table, changed: Vec<u32>) -> Result<(), Error> {
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
}

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
