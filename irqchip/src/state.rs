//! Saved state: every interrupt and every clock of a VM, wherever it was on its way.
//!
//! ```text
//!  device ─▶ eventfd ─▶ IOAPIC, PIC, MSI route ─▶ local APIC IRR ─▶ ISR ─▶ end of interrupt
//!              │             │                        │              │
//!         VectorState    Controllers, driven      VcpuState: local APIC, events, deadline
//!         pending        PIT, clock
//! ```
//!
//! [`ChipState`] is one VM's, [`VcpuState`] one vCPU's; both are taken while no vCPU runs. The binary form
//! is ours, little-endian, of fixed order: `BIRQ`, version (u16), kind (u16), fields. What reads it trusts
//! nothing: a length, a number or a bit that cannot be is refused by the name of its field, and so is what
//! follows the last field. A newer version is refused, never guessed at.
//!
//! Not here: registers, memory, MSI-X tables. A device restores its own and makes its lines and vectors in
//! the order in which it first did; [`Chip::restore`](crate::Chip::restore) fills them.

#![forbid(unsafe_code)]

use crate::ioapic::{Entry, Ioapic};
use crate::{IOAPIC_PINS, Mode, MsiMessage};

/// The only version that is read. 1 had neither `driven` nor `ioapic.ended`, 2 `pending` in split mode only.
pub const STATE_VERSION: u16 = 3;
const MAGIC: [u8; 4] = *b"BIRQ";
const KIND_CHIP: u16 = 1;
const KIND_VCPU: u16 = 2;

/// `struct kvm_irqchip`'s controller, as KVM has it.
pub(crate) const CONTROLLER_LEN: usize = 512;
/// `struct kvm_pit_state2`.
pub(crate) const PIT_LEN: usize = 112;
/// `struct kvm_lapic_state`.
pub(crate) const LAPIC_LEN: usize = 1024;
/// `struct kvm_vcpu_events`.
pub(crate) const EVENTS_LEN: usize = 64;
/// More vectors than KVM can route.
const MAX_VECTORS: u32 = 4096;
/// More MSRs than a vCPU's state has.
const MAX_MSRS: u32 = 64;

/// Saved state that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("saved interrupt state: {field}: {why}")]
pub struct StateError {
    /// The field at fault.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl StateError {
    pub(crate) fn new(field: &'static str, why: impl Into<String>) -> Self {
        let why = why.into();
        Self { field, why }
    }
}

/// Controllers, routes, vectors and clock of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChipState {
    pub(crate) controllers: Controllers,
    /// Pins that [`Chip::drive`](crate::Chip::drive) holds high.
    pub(crate) driven: u32,
    /// Pins of which a line was raised that KVM did not listen to.
    pub(crate) pending: u32,
    pub(crate) vectors: Vec<VectorState>,
    /// KVM clock, in nanoseconds.
    pub(crate) clock_ns: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Controllers {
    /// KVM's own, as it gives them: both PICs and the IOAPIC, then the PIT.
    Kernel {
        chips: Box<[[u8; CONTROLLER_LEN]; 3]>,
        pit: Box<[u8; PIT_LEN]>,
    },
    /// Our IOAPIC, and level pins of which no local APIC has the interrupt, so that its end, if it had one, was
    /// on its way to us.
    Split { ioapic: Box<Ioapic>, ended: u32 },
}

/// One MSI vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VectorState {
    pub(crate) gsi: u32,
    pub(crate) message: Option<MsiMessage>,
    pub(crate) masked: bool,
    pub(crate) pending: bool,
}

/// A vCPU's local APIC, timers and events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState {
    pub(crate) lapic: Box<[u8; LAPIC_LEN]>,
    pub(crate) events: Box<[u8; EVENTS_LEN]>,
    pub(crate) mp_state: u32,
    /// Index and value, in the order in which they are to be written.
    pub(crate) msrs: Vec<(u32, u64)>,
}

impl ChipState {
    /// Who had the controllers; a chip of the other mode does not take the state.
    pub fn mode(&self) -> Mode {
        match self.controllers {
            Controllers::Kernel { .. } => Mode::Kernel,
            Controllers::Split { .. } => Mode::Split,
        }
    }

    /// The binary form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = header(KIND_CHIP);
        match &self.controllers {
            Controllers::Kernel { chips, pit } => {
                bytes.push(0);
                bytes.extend(chips.iter().flatten());
                bytes.extend(pit.iter());
            }
            Controllers::Split { ioapic, ended } => {
                bytes.push(1);
                bytes.push(ioapic.select());
                bytes.extend(ioapic.id().to_le_bytes());
                let entries = ioapic.entries().iter();
                bytes.extend(entries.flat_map(|entry| entry.bits().to_le_bytes()));
                bytes.extend(ended.to_le_bytes());
            }
        }
        bytes.extend(self.driven.to_le_bytes());
        bytes.extend(self.pending.to_le_bytes());
        bytes.extend(self.clock_ns.to_le_bytes());
        bytes.extend((self.vectors.len() as u32).to_le_bytes());
        for vector in &self.vectors {
            bytes.extend(vector.gsi.to_le_bytes());
            let flags = [vector.message.is_some(), vector.masked, vector.pending];
            bytes.extend(flags.map(u8::from));
            if let Some(message) = vector.message {
                bytes.extend(message.address.to_le_bytes());
                bytes.extend(message.data.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads the binary form.
    ///
    /// # Errors
    /// Names the first field that cannot be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader::new(bytes, KIND_CHIP)?;
        let controllers = match reader.array("mode")? {
            [0] => kernel_controllers(&mut reader)?,
            [1] => split_controllers(&mut reader)?,
            [mode] => {
                let why = format!("{mode} is neither 0 (kernel) nor 1 (split)");
                return Err(StateError::new("mode", why));
            }
        };
        let driven = reader.pins("driven")?;
        let pending = reader.pins("pending")?;
        let clock_ns = reader.u64("clock")?;
        let count = reader.count("vectors", MAX_VECTORS)?;
        let mut vectors: Vec<VectorState> = Vec::new();
        for _ in 0..count {
            let vector = reader.vector()?;
            if vectors.last().is_some_and(|last| last.gsi >= vector.gsi) {
                let why = format!("{} is out of order", vector.gsi);
                return Err(StateError::new("vectors.gsi", why));
            }
            vectors.push(vector);
        }
        reader.end()?;
        Ok(Self {
            controllers,
            driven,
            pending,
            vectors,
            clock_ns,
        })
    }
}

fn kernel_controllers(reader: &mut Reader<'_>) -> Result<Controllers, StateError> {
    let chips = [
        reader.array("pic.master")?,
        reader.array("pic.slave")?,
        reader.array("ioapic")?,
    ];
    Ok(Controllers::Kernel {
        chips: Box::new(chips),
        pit: Box::new(reader.array("pit")?),
    })
}

fn split_controllers(reader: &mut Reader<'_>) -> Result<Controllers, StateError> {
    let [select] = reader.array("ioapic.select")?;
    let id = reader.u32("ioapic.id")?;
    let mut entries = Vec::new();
    for pin in 0..IOAPIC_PINS {
        let bits = reader.u64("ioapic.entry")?;
        let entry = Entry::from_bits(bits).ok_or_else(|| {
            let why = format!("pin {pin} cannot be {bits:#018x}");
            StateError::new("ioapic.entry", why)
        })?;
        entries.push(entry);
    }
    let entries = entries.try_into().expect("one was pushed for each pin");
    let ioapic = Ioapic::from_parts(select, id, entries).ok_or_else(|| {
        StateError::new("ioapic.id", format!("{id:#x} has bits that an id has not"))
    })?;
    Ok(Controllers::Split {
        ioapic: Box::new(ioapic),
        ended: reader.pins("ioapic.ended")?,
    })
}

impl VcpuState {
    const SPURIOUS: usize = 0xf0;
    const IN_SERVICE: usize = 0x100;
    const REQUEST: usize = 0x200;

    /// Whether the local APIC has an interrupt with this vector, waiting or in service.
    pub(crate) fn has_interrupt(&self, vector: u8) -> bool {
        // 32 vectors in four bytes of every sixteen (Intel SDM 3A, 11.8.4).
        let byte = usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        let bits = self.lapic[Self::IN_SERVICE + byte] | self.lapic[Self::REQUEST + byte];
        bits >> (vector % 8) & 1 != 0
    }

    /// Whether the guest ends level interrupts at the IOAPIC itself (Intel SDM 3A, 11.8.5).
    pub(crate) fn directs_ends(&self) -> bool {
        self.lapic[Self::SPURIOUS + 1] & 1 << 4 != 0
    }

    /// The binary form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = header(KIND_VCPU);
        bytes.extend(self.lapic.iter());
        bytes.extend(self.events.iter());
        bytes.extend(self.mp_state.to_le_bytes());
        bytes.extend((self.msrs.len() as u32).to_le_bytes());
        for (index, value) in &self.msrs {
            bytes.extend(index.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    /// Reads the binary form.
    ///
    /// # Errors
    /// Names the first field that cannot be. What only KVM can judge, it judges on restore.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader::new(bytes, KIND_VCPU)?;
        let lapic = Box::new(reader.array("lapic")?);
        let events = Box::new(reader.array("events")?);
        let mp_state = reader.u32("mp_state")?;
        let mut msrs = Vec::new();
        for _ in 0..reader.count("msrs", MAX_MSRS)? {
            let index = reader.u32("msrs.index")?;
            if !crate::save::MSRS.contains(&index) {
                let why = format!("{index:#x} is not of a clock or a local APIC");
                return Err(StateError::new("msrs.index", why));
            }
            msrs.push((index, reader.u64("msrs.value")?));
        }
        reader.end()?;
        Ok(Self {
            lapic,
            events,
            mp_state,
            msrs,
        })
    }
}

fn header(kind: u16) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(STATE_VERSION.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes
}

/// Takes fields off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], kind: u16) -> Result<Self, StateError> {
        let mut reader = Self(bytes);
        let magic: [u8; 4] = reader.array("magic")?;
        if magic != MAGIC {
            return Err(StateError::new("magic", "this is no interrupt state"));
        }
        let version = u16::from_le_bytes(reader.array("version")?);
        if version != STATE_VERSION {
            let why = format!("{version} is not {STATE_VERSION}, the only one known");
            return Err(StateError::new("version", why));
        }
        let found = u16::from_le_bytes(reader.array("kind")?);
        if found != kind {
            let why = format!("{found} is not {kind} (1 a chip's, 2 a vCPU's)");
            return Err(StateError::new("kind", why));
        }
        Ok(reader)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], StateError> {
        let Some((array, rest)) = self.0.split_first_chunk::<N>() else {
            let why = format!("{} bytes left, {N} needed", self.0.len());
            return Err(StateError::new(field, why));
        };
        self.0 = rest;
        Ok(*array)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, StateError> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, StateError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A bit for each IOAPIC pin.
    fn pins(&mut self, field: &'static str) -> Result<u32, StateError> {
        let pins = self.u32(field)?;
        if pins >> IOAPIC_PINS != 0 {
            let why = format!("{pins:#x} names pins that do not exist");
            return Err(StateError::new(field, why));
        }
        Ok(pins)
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, StateError> {
        match self.array(field)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [value] => Err(StateError::new(field, format!("{value} is not 0 or 1"))),
        }
    }

    fn count(&mut self, field: &'static str, most: u32) -> Result<u32, StateError> {
        let count = self.u32(field)?;
        if count > most {
            let why = format!("{count} are more than {most}");
            return Err(StateError::new(field, why));
        }
        Ok(count)
    }

    fn vector(&mut self) -> Result<VectorState, StateError> {
        let gsi = self.u32("vectors.gsi")?;
        if !(IOAPIC_PINS..MAX_VECTORS).contains(&gsi) {
            let why = format!("{gsi} is no vector's");
            return Err(StateError::new("vectors.gsi", why));
        }
        let has_message = self.flag("vectors.has_message")?;
        let masked = self.flag("vectors.masked")?;
        let pending = self.flag("vectors.pending")?;
        let message = if has_message {
            let address = self.u64("vectors.address")?;
            let data = self.u32("vectors.data")?;
            Some(MsiMessage { address, data })
        } else {
            None
        };
        Ok(VectorState {
            gsi,
            message,
            masked,
            pending,
        })
    }

    fn end(&self) -> Result<(), StateError> {
        match self.0.len() {
            0 => Ok(()),
            more => Err(StateError::new("end", format!("{more} bytes too many"))),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
